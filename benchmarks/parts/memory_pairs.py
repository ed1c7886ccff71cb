"""Models and plans whose memory is predicted and compiled: what `memory_accuracy.py` goes through.

The models are shallow and of realistic width, so that each compiles in seconds. A layer's bytes do not depend on how
many layers there are, and all of what depends on their number is there from two on.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from parts.trace_zoo import trace_zoo

from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel
from galvatron_jax.trace.model import Traced

MODELS = {
    "gpt2": ("gpt2", "medium", {"vocab_size": 50304}),
    "llama": (
        "llama", "llama2-7b",
        {"num_layers": 16, "width": 2048, "num_heads": 16, "num_kv_heads": 4, "mlp_width": 5632, "seq_length": 2048},
    ),
    "t5": ("t5", "base", {}),
    "vit": ("vit", "large", {"image_size": 256, "pooling": "mean"}),
    "moe": (
        "moe", "tiny",
        {
            "num_layers": 12, "width": 1024, "num_heads": 16, "num_kv_heads": 4, "mlp_width": 2816, "seq_length": 1024,
            "vocab_size": 32000, "num_experts": 8, "experts_per_token": 2,
        },
    ),
}  # fmt: skip
"""Family, preset and what is changed of it, by name."""

DTYPES = {"f32": {}, "bf16": {"dtype": "bfloat16"}, "pure": {"dtype": "bfloat16", "param_dtype": "bfloat16"}}
"""float32; bfloat16 with float32 parameters; all bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model and a plan for it."""

    model: str
    """Key of `MODELS`."""
    dtype: str = "bf16"
    """Key of `DTYPES`."""
    devices: int = 8
    strategy: LayerStrategy
    pp: int = 1
    schedule: Schedule = Schedule.NONE
    chunks: int = 1
    microbatches: int = 1
    batch: int = 2
    """Examples of a micro-batch on each shard of the batch."""

    @property
    def name(self) -> str:
        """All of it in one word, such as `gpt2-bf16-8-zero3-remat:full-m4x2`."""
        parts = [self.model, self.dtype, str(self.devices), self.strategy.short()]
        if self.pp > 1:
            parts.append(f"pp{self.pp}-{self.schedule}" + (f"-v{self.chunks}" if self.chunks > 1 else ""))
        return "-".join([*parts, f"m{self.microbatches}x{self.batch}"])

    @property
    def axes(self) -> tuple[MeshAxis, ...]:
        """The mesh: axes of two, the slowest first; nodes have eight devices."""
        names = "abcdef"[: self.devices.bit_length() - 1]
        inner = names[-3:]
        return tuple(MeshAxis(name=n, size=2, level="intra" if n in inner else "inter") for n in names)

    @property
    def microbatch(self) -> int:
        """Examples of a micro-batch, over all devices."""
        return self.batch * 2 ** len(self.strategy.dp)

    def plan(self, layers: int, name: str) -> Plan:
        """The plan for a model of so many layers, its stages as even as can be."""
        stages = self.pp * self.chunks
        cuts = [round(stage * layers / stages) for stage in range(stages + 1)]
        return Plan(
            model=name,
            mesh=self.axes,
            global_batch=self.microbatch * self.microbatches,
            num_microbatches=self.microbatches,
            schedule=self.schedule,
            stages=tuple(
                Stage(groups=(LayerGroup(start=start, stop=stop, strategy=self.strategy),))
                for start, stop in itertools.pairwise(cuts)
            ),
            pipeline_axes=tuple(axis.name for axis in self.axes[: self.pp.bit_length() - 1]),
            batch_axes=self.strategy.dp,
        )

    def traced(self) -> Traced:
        """The model at the plan's micro-batch."""
        return _traced(self.model, self.dtype, self.microbatch)


@functools.lru_cache(maxsize=4)
def _traced(model: str, dtype: str, microbatch: int) -> Traced:
    name, preset, changes = MODELS[model]
    return trace_zoo(name, preset, microbatch=microbatch, called=f"{model}-{dtype}", **changes, **DTYPES[dtype])


def _plan(
    dp: str = "", tp: str = "", *, megatron: bool = False, ulysses: str = "", zero: int = 0, remat: str = "none"
) -> LayerStrategy:
    sp, kind = (tp, SequenceParallel.MEGATRON) if megatron else (ulysses, SequenceParallel.ULYSSES)
    return LayerStrategy(
        dp=tuple(dp), tp=tuple(tp), sp=tuple(sp), sp_kind=kind if sp else SequenceParallel.NONE,
        zero=zero, remat=Remat(remat),
    )  # fmt: skip


_STASH, _GPIPE, _1F1B, _TURNS = (
    Schedule.ONE_F_ONE_B_STASH, Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED,
)  # fmt: skip
_ALL, _64 = "abc", "abcdef"


def _of(model: str, *rows: dict) -> list[Pair]:
    return [Pair(model=model, **row) for row in rows]


PAIRS = [
    *_of(
        "gpt2",
        {"strategy": _plan(_ALL)},
        {"strategy": _plan(_ALL), "dtype": "f32"},
        {"strategy": _plan(_ALL), "dtype": "pure"},
        {"strategy": _plan(_ALL, zero=1), "microbatches": 4},
        {"strategy": _plan(_ALL, zero=2), "microbatches": 4},
        {"strategy": _plan(_ALL, zero=3), "microbatches": 2, "dtype": "f32"},
        {"strategy": _plan(_ALL, zero=3, remat="full"), "batch": 4},
        {"strategy": _plan(_ALL, remat="attention"), "batch": 4},
        {"strategy": _plan(_ALL, remat="dots"), "batch": 4},
        {"strategy": _plan("a", "bc"), "batch": 4},
        {"strategy": _plan("a", "bc", megatron=True, remat="full"), "batch": 4, "microbatches": 8},
        {"strategy": _plan("a", ulysses="bc", zero=3), "batch": 4},
        {"strategy": _plan("c"), "pp": 4, "schedule": _1F1B, "microbatches": 8},
        {"strategy": _plan("c", zero=1), "pp": 4, "schedule": _STASH, "microbatches": 8},
        {"strategy": _plan("bc", remat="full"), "pp": 2, "schedule": _GPIPE, "microbatches": 8},
        {"strategy": _plan("bcdef", zero=3), "pp": 2, "schedule": _1F1B, "microbatches": 4, "devices": 64},
    ),
    *_of(
        "llama",
        {"strategy": _plan(_ALL, zero=2), "batch": 1},
        {"strategy": _plan(_ALL, zero=3), "batch": 1},
        {"strategy": _plan(_ALL, zero=3, remat="full"), "batch": 2, "dtype": "f32"},
        {"strategy": _plan(_ALL, zero=1, remat="attention"), "batch": 2, "dtype": "pure"},
        {"strategy": _plan("ab", "c", remat="dots"), "batch": 2},
        {"strategy": _plan("ab", "c", megatron=True, zero=1), "batch": 2, "microbatches": 4},
        {"strategy": _plan("a", "bc", megatron=True, remat="attention"), "batch": 2, "dtype": "f32"},
        {"strategy": _plan("a", ulysses="bc", zero=3, remat="full"), "batch": 2, "microbatches": 2},
        {"strategy": _plan("abcd", "ef", zero=3), "batch": 2, "devices": 64},
        {"strategy": _plan(_64, zero=3, remat="full"), "batch": 1, "devices": 64},
        {"strategy": _plan("b", "c", megatron=True), "pp": 2, "schedule": _1F1B, "microbatches": 4, "batch": 2},
        {"strategy": _plan("bc", zero=2, remat="full"), "pp": 2, "schedule": _STASH, "microbatches": 4, "batch": 1},
        {"strategy": _plan("c", remat="full"), "pp": 4, "schedule": _GPIPE, "microbatches": 8, "batch": 1},
        {"strategy": _plan("cd", "ef", zero=1), "pp": 4, "schedule": _1F1B, "microbatches": 8, "devices": 64},
    ),
    *_of(
        "t5",
        {"strategy": _plan(_ALL), "batch": 4},
        {"strategy": _plan(_ALL, zero=1), "batch": 4, "dtype": "f32"},
        {"strategy": _plan(_ALL, zero=2, remat="full"), "batch": 8},
        {"strategy": _plan(_ALL, zero=3), "batch": 4, "microbatches": 2},
        {"strategy": _plan("ab", "c", remat="attention"), "batch": 8},
        {"strategy": _plan("a", "bc", megatron=True), "batch": 8, "dtype": "f32"},
        {"strategy": _plan("ab", ulysses="c", zero=1), "batch": 8},
        {"strategy": _plan(_64, zero=3, remat="dots"), "batch": 4, "devices": 64},
        {"strategy": _plan("bc"), "pp": 2, "schedule": _1F1B, "microbatches": 4, "batch": 4},
        {"strategy": _plan("bc", zero=2), "pp": 2, "schedule": _STASH, "microbatches": 4, "batch": 4, "dtype": "f32"},
    ),
    *_of(
        "vit",
        {"strategy": _plan(_ALL), "batch": 16},
        {"strategy": _plan(_ALL), "batch": 16, "dtype": "f32"},
        {"strategy": _plan(_ALL, zero=2, remat="attention"), "batch": 16},
        {"strategy": _plan(_ALL, zero=3, remat="full"), "batch": 32},
        {"strategy": _plan(_ALL, zero=1, remat="dots"), "batch": 16, "microbatches": 4},
        {"strategy": _plan("ab", "c"), "batch": 32},
        {"strategy": _plan("a", "bc", megatron=True, remat="full"), "batch": 32, "dtype": "f32"},
        {"strategy": _plan("ab", ulysses="c", zero=3), "batch": 16, "microbatches": 2},
        {"strategy": _plan(_64, zero=1), "batch": 16, "devices": 64},
        {"strategy": _plan("c"), "pp": 4, "schedule": _1F1B, "microbatches": 8, "batch": 16},
        {"strategy": _plan("c"), "pp": 4, "schedule": _STASH, "microbatches": 8, "batch": 16},
        {"strategy": _plan("bc", zero=3), "pp": 2, "schedule": _GPIPE, "microbatches": 4, "batch": 16},
    ),
    *_of(
        "moe",
        {"strategy": _plan(_ALL, zero=1), "batch": 2},
        {"strategy": _plan(_ALL, zero=2), "batch": 1, "dtype": "f32"},
        {"strategy": _plan(_ALL, zero=3), "batch": 2},
        {"strategy": _plan(_ALL, zero=3, remat="full"), "batch": 2, "microbatches": 2},
        {"strategy": _plan("ab", "c", remat="attention"), "batch": 2},
        {"strategy": _plan("a", "bc", megatron=True, zero=1), "batch": 2},
        {"strategy": _plan("ab", ulysses="c", zero=1, remat="dots"), "batch": 2},
        {"strategy": _plan("abc", "def", zero=1), "batch": 2, "devices": 64},
        {"strategy": _plan("bc", zero=1), "pp": 2, "schedule": _1F1B, "microbatches": 4, "batch": 1},
        {"strategy": _plan("b", "c"), "pp": 2, "schedule": _STASH, "microbatches": 4, "batch": 1},
    ),
]  # fmt: skip
"""All pairs."""

SAMPLE = frozenset(range(0, len(PAIRS), 5))
