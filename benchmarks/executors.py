"""The local executor beside XLA's own partitioner: one plan compiled by both, for 8 H100s that need not be here.

Every pair of a model and a plan of one stage is compiled twice by XLA's GPU compiler: as the planner's own device
programs (`local`), and as sharding constraints that XLA partitions (`annotate`). Beside each other stand peak and
temporary memory, kernels, collectives, and the time that the compiled schedules take when they are run through on
paper. Needs the `verify` extra, and no GPU.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
from harness import Claim, Outcome, run
from parts.trace_zoo import trace_zoo

from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Stage
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel
from galvatron_jax.trace.model import Traced
from galvatron_jax.verify.replay import replay
from galvatron_jax.verify.targets import target_devices

CLUSTER, DEVICES = "h100x8", 8
LIMIT = 1.05
EXECUTORS = ("local", "annotate")

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "medium", {"vocab_size": 50304}),
    "llama": ("llama", "tinyllama-1b", {"num_heads": 16, "num_kv_heads": 8, "seq_length": 1024}),
    "t5": ("t5", "base", {"num_heads": 8, "head_dim": 96}),
    "vit": ("vit", "large", {"image_size": 256, "pooling": "mean"}),
    "moe": (
        "moe", "tiny",
        {
            "num_layers": 12, "width": 1024, "num_heads": 16, "num_kv_heads": 8, "mlp_width": 2816, "seq_length": 1024,
            "vocab_size": 32000, "num_experts": 8, "experts_per_token": 2,
        },
    ),
}  # fmt: skip
"""Family, preset and what is changed of it; all layers are there, since what they share weighs more among few."""

DTYPES = {
    "bf16": {"dtype": "bfloat16", "param_dtype": "bfloat16"},
    "mixed": {"dtype": "bfloat16", "param_dtype": "float32"},
}
"""All bfloat16; or parameters and gradients in float32."""


def _plan(
    dp: str = "", tp: str = "", *, megatron: bool = False, ulysses: str = "", zero: int = 0, remat: str = "none"
) -> LayerStrategy:
    sp, kind = (tp, SequenceParallel.MEGATRON) if megatron else (ulysses, SequenceParallel.ULYSSES)
    return LayerStrategy(
        dp=tuple(dp), tp=tuple(tp), sp=tuple(sp), sp_kind=kind if sp else SequenceParallel.NONE,
        zero=zero, remat=Remat(remat),
    )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A model and a plan."""

    model: str
    strategy: LayerStrategy
    microbatches: int = 1
    dtype: str = "bf16"
    sums: str | None = None
    """Type in which local sums gradients; None for their own."""

    @property
    def name(self) -> str:
        name = f"{self.model}-{self.dtype} {self.strategy.short()} m{self.microbatches}"
        return name if self.sums is None else f"{name} sums in {self.sums}"


PAIRS = (
    Pair("gpt2", _plan("abc")),
    Pair("gpt2", _plan("abc", zero=1), 2),
    Pair("gpt2", _plan("abc", zero=2), 2),
    Pair("gpt2", _plan("abc", zero=3, remat="full")),
    Pair("gpt2", _plan("a", "bc", megatron=True, remat="full"), 2),
    Pair("gpt2", _plan("", "abc")),
    Pair("llama", _plan("abc")),
    Pair("llama", _plan("abc", zero=2), 2),
    Pair("llama", _plan("abc", zero=3)),
    Pair("llama", _plan("ab", "c")),
    Pair("llama", _plan("a", "bc")),
    Pair("llama", _plan("", "abc")),
    Pair("llama", _plan("a", "bc", megatron=True)),
    Pair("llama", _plan("a", "bc", megatron=True, remat="gathers")),
    Pair("llama", _plan("a", "bc", megatron=True, remat="full"), 2),
    Pair("llama", _plan("a", "bc", megatron=True, zero=3)),
    Pair("llama", _plan("a", ulysses="bc")),
    Pair("llama", _plan("a", ulysses="bc", zero=3, remat="full")),
    Pair("llama", _plan("ab", "c", zero=3, remat="full"), 2),
    Pair("llama", _plan("abc"), dtype="mixed"),
    Pair("llama", _plan("abc", zero=3, remat="full"), 2, dtype="mixed"),
    Pair("llama", _plan("abc"), dtype="mixed", sums="bfloat16"),
    Pair("llama", _plan("abc", zero=3, remat="full"), 2, dtype="mixed", sums="bfloat16"),
    Pair("t5", _plan("abc")),
    Pair("t5", _plan("ab", "c", zero=1)),
    Pair("t5", _plan("ab", "c", zero=2)),
    Pair("t5", _plan("a", "bc", megatron=True, remat="full"), 2),
    Pair("vit", _plan("abc", zero=3)),
    Pair("vit", _plan("a", "bc")),
    Pair("moe", _plan("abc")),
    Pair("moe", _plan("a", "bc", zero=1)),
)

BETTER = {
    Pair("gpt2", _plan("abc", zero=1), 2): Pair("gpt2", _plan("abc", zero=2), 2),
    Pair("llama", _plan("a", "bc", megatron=True)): Pair("llama", _plan("a", "bc", megatron=True, remat="gathers")),
    Pair("llama", _plan("abc"), dtype="mixed"): Pair("llama", _plan("abc"), dtype="mixed", sums="bfloat16"),
    Pair("llama", _plan("abc", zero=3, remat="full"), 2, dtype="mixed"): Pair(
        "llama", _plan("abc", zero=3, remat="full"), 2, dtype="mixed", sums="bfloat16"
    ),
    Pair("t5", _plan("ab", "c", zero=1)): Pair("t5", _plan("ab", "c", zero=2)),
}
"""Where XLA's partitioner does something else than the plan says, the plan that says so (reasons in the README)."""


@functools.lru_cache(maxsize=2)
def traced(model: str, dtype: str) -> Traced:
    """The model at micro-batches of eight."""
    name, preset, changes = MODELS[model]
    return trace_zoo(name, preset, microbatch=DEVICES, called=f"{model}-{dtype}", **changes, **DTYPES[dtype])


def compiled(pair: Pair, executor: str) -> dict[str, Any]:
    """What one executor's program needs."""
    model = traced(pair.model, pair.dtype)
    whole = LayerGroup(start=0, stop=len(model.spec.layers), strategy=pair.strategy)
    plan = Plan(
        model=model.spec.name,
        mesh=tuple(MeshAxis(name=name, size=2) for name in "abc"),
        global_batch=DEVICES * pair.microbatches,
        num_microbatches=pair.microbatches,
        stages=(Stage(groups=(whole,)),),
        batch_axes=pair.strategy.dp,
        executor=executor,
        gradient_sum_dtype=pair.sums if executor == "local" else None,
    )
    begin = time.perf_counter()
    step = build_step(model, plan, optax.adamw(1e-3), devices=target_devices("h100", DEVICES))
    program = step.compiled
    memory, span = program.memory_analysis(), replay(program.as_text(), cluster_preset(CLUSTER))
    operands: Counter[str] = Counter()
    for one, count in span.traffic.items():
        operands[one.operation] += one.bytes * count
    return {
        "peak_bytes": memory.peak_memory_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": span.kernels,
        "collective_bytes": dict(sorted(operands.items())),
        "wire_bytes": round(sum(one.wire_bytes * count for one, count in span.traffic.items())),
        "replayed_s": span.seconds,
        "compute_s": span.compute_s,
        "communication_s": span.communication_s,
        "exposed_s": span.exposed_s,
        "compile_s": round(time.perf_counter() - begin, 1),
    }


COMPARED = {
    "peak_bytes": "peak memory",
    "temporary_bytes": "temporary memory",
    "wire_bytes": "bytes on the links",
    "replayed_s": "replayed time",
}


def compare(pair: Pair) -> dict[str, Any]:
    """Both executors, and their ratios: local over annotate."""
    found = {executor: compiled(pair, executor) for executor in EXECUTORS}
    local, other = (found[executor] for executor in EXECUTORS)
    ratios = {key: round(local[key] / max(other[key], 1e-9), 4) for key in (*COMPARED, "kernels")}
    jax.clear_caches()
    return {"pair": pair.name, **found, "local_over_annotate": ratios}


def measure(full: bool, only: str | None = None) -> Outcome:
    """All pairs; those with a text in their name by `--only`."""
    results = []
    for pair in PAIRS:
        if only is not None and only not in pair.name:
            continue
        row = compare(pair)
        results.append(row)
        shown = "  ".join(f"{key.split('_')[0]} {value:5.3f}" for key, value in row["local_over_annotate"].items())
        print(f"{pair.name:56} {shown}", flush=True)
    return Outcome(results, claims(results))


def claims(results: list[dict[str, Any]]) -> list[Claim]:
    """The median of all pairs, and the worst of those for which no better one was measured."""
    measured = {row["pair"] for row in results}
    unlike = {pair.name for pair, better in BETTER.items() if better.name in measured}
    found = []
    for key, what in COMPARED.items():
        ratios = [row["local_over_annotate"][key] for row in results]
        alike = [row["local_over_annotate"][key] for row in results if row["pair"] not in unlike]
        found += [
            Claim(f"{what}, local / annotate, median of {len(ratios)} pairs", statistics.median(ratios), LIMIT),
            Claim(f"{what}, local / annotate, worst of {len(alike)} pairs alike", max(alike), LIMIT),
        ]
    return found


if __name__ == "__main__":
    run(measure, devices="compiling for 8 H100", options={"only": {"help": "only pairs with this in their name"}})
