"""The matrix of (model, plan) that parity and collectives are tested on: every kind of plan, mixed over the layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import optax
import pytest
from flax import nnx

from galvatron_jax.runtime.step import Step, build_step
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Stage
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from galvatron_jax.trace.model import Traced, trace
from tests.models import MODELS

MICROBATCH = 8
"""Examples of one micro-batch, over all eight devices."""
AXES = ("a", "b", "c")


def megatron(tp: str, *, dp: str = "", **more: object) -> LayerStrategy:
    """Tensor and Megatron's sequence parallelism; axes have one letter each."""
    return LayerStrategy(dp=tuple(dp), tp=tuple(tp), sp=tuple(tp), sp_kind=SequenceParallel.MEGATRON, **more)


def ulysses(sp: str, *, dp: str = "", tp: str = "", **more: object) -> LayerStrategy:
    """Ulysses' sequence parallelism; axes have one letter each."""
    return LayerStrategy(dp=tuple(dp), tp=tuple(tp), sp=tuple(sp), sp_kind=SequenceParallel.ULYSSES, **more)


def plain(*, dp: str = "", tp: str = "", **more: object) -> LayerStrategy:
    """Data and tensor parallelism; axes have one letter each."""
    return LayerStrategy(dp=tuple(dp), tp=tuple(tp), **more)


CYCLES: dict[str, tuple[LayerStrategy, ...]] = {
    "dp8": (plain(dp="abc"),),
    "tp8": (plain(tp="abc"),),
    "tp4-zero3": (plain(dp="a", tp="bc"), plain(dp="abc", zero=3)),
    "megatron-ulysses-dp": (megatron("bc", dp="a"), ulysses("bc", dp="a"), plain(dp="abc")),
    "zeros": (plain(dp="ab", tp="c", zero=1), plain(dp="ab", tp="c", zero=2), megatron("bc", dp="a", zero=3)),
    "remats": (
        plain(dp="abc", zero=1, remat="full"),
        plain(dp="a", tp="bc", remat="dots"),
        ulysses("c", dp="ab", zero=3, remat="attention"),
    ),
    "ulysses-with-tp": (ulysses("b", dp="a", tp="c"), ulysses("bc", dp="a", zero=2, remat="full")),
    "tp4": (plain(dp="a", tp="bc"),),
    "zero3": (plain(dp="abc", zero=3),),
    "tp2-everywhere": (plain(dp="ab", tp="c"),),
    "zero2-tp2": (plain(dp="ab", tp="c", zero=2),),
    "zero3-ulysses": (ulysses("bc", dp="a", zero=3, remat="full"), megatron("bc", dp="a", zero=3)),
    "zero3-full": (plain(dp="abc", zero=3, remat="full"),),
    "gathers": (megatron("bc", dp="a", remat="gathers"), ulysses("bc", dp="a", zero=3, remat="gathers")),
    "idle": (plain(dp="a"), plain(dp="bc"), plain(dp="c", tp="b"), plain(dp="ab")),
}
"""Strategies that the layers of a model take in turn, over a mesh of three axes of two devices."""

PLANS: dict[str, tuple[str, ...]] = {
    "gpt2": ("tp4-zero3", "megatron-ulysses-dp", "zeros", "remats", "ulysses-with-tp", "dp8"),
    "gpt2_large_vocabulary": ("zero3", "zero2-tp2", "zero3-ulysses", "zero3-full"),
    "gpt2_tied_dropout": ("tp4-zero3", "megatron-ulysses-dp", "zeros", "remats", "gathers"),
    "llama": ("megatron-ulysses-dp", "zeros", "tp4-zero3", "remats", "zero3-full", "gathers"),
    "llama_tp_over_kv": ("tp8", "tp4-zero3", "megatron-ulysses-dp", "ulysses-with-tp"),
    "bert": ("tp4-zero3", "megatron-ulysses-dp", "zeros", "tp8"),
    "bert_dropout": ("ulysses-with-tp", "remats", "zeros"),
    "vit": ("tp4-zero3", "megatron-ulysses-dp", "remats"),
    "vit_mean": ("zeros", "tp4-zero3", "ulysses-with-tp"),
    "swin": ("tp4-zero3", "zeros", "megatron-ulysses-dp", "remats"),
    "t5": ("tp4-zero3", "megatron-ulysses-dp", "zeros", "remats", "dp8", "idle"),
    "t5_gated_untied": ("ulysses-with-tp", "tp8", "zero3-full"),
    "moe": ("tp4-zero3", "zeros", "megatron-ulysses-dp", "remats"),
    "mamba": ("tp4-zero3", "zeros", "remats"),
    "mamba_depthwise": ("tp4-zero3", "megatron-ulysses-dp", "zero3-full"),
    "unet": ("tp4-zero3", "zeros", "zero3-full"),
    "linen_gpt": ("tp4-zero3", "megatron-ulysses-dp", "zeros"),
    "linen_llama": ("tp4-zero3", "remats", "ulysses-with-tp"),
    "linen_vit": ("zeros", "megatron-ulysses-dp", "tp4-zero3"),
    "nnx_scan_gpt": ("tp4-zero3", "zeros", "tp2-everywhere", "remats"),
    "linen_scan_gpt": ("megatron-ulysses-dp", "tp4-zero3", "zero3-full"),
    "batchnorm_net": ("tp4-zero3", "zeros", "zero3-full"),
    "plain_mlp": ("tp4-zero3", "zeros", "zero3-full"),
    "recurrent_dense": ("tp4-zero3", "zeros", "remats"),
    "recurrent_diagonal": ("tp4-zero3", "megatron-ulysses-dp", "zero3-full"),
    "remat_gpt": ("tp4-zero3", "megatron-ulysses-dp", "remats"),
    "refined_bias": ("dp8", "tp2-everywhere", "megatron-ulysses-dp", "remats", "zeros", "idle"),
}
"""Per model, at least three unlike cycles."""

ACCUMULATED = {
    ("gpt2_tied_dropout", "zeros"), ("llama", "zeros"), ("bert", "tp4-zero3"), ("swin", "tp4-zero3"),
    ("t5", "zeros"), ("batchnorm_net", "zeros"), ("gpt2", "zeros"), ("gpt2", "dp8"),
    ("nnx_scan_gpt", "zeros"), ("linen_vit", "zeros"), ("moe", "zeros"), ("gpt2_large_vocabulary", "zero2-tp2"),
}  # fmt: skip
"""What also runs with four micro-batches."""

SAMPLE = {
    ("gpt2", "megatron-ulysses-dp", 1), ("gpt2_tied_dropout", "zeros", 4), ("llama_tp_over_kv", "tp8", 1),
    ("bert", "tp4-zero3", 4), ("t5", "megatron-ulysses-dp", 1), ("mamba", "tp4-zero3", 1),
    ("batchnorm_net", "zeros", 4), ("linen_vit", "zeros", 1), ("nnx_scan_gpt", "tp4-zero3", 1),
    ("moe", "remats", 1), ("gpt2_large_vocabulary", "zero3-ulysses", 1), ("gpt2_large_vocabulary", "zero2-tp2", 4),
    ("refined_bias", "tp2-everywhere", 1), ("llama", "gathers", 1), ("t5", "idle", 1),
}  # fmt: skip
"""What runs without `slow`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model under a plan."""

    model: str
    cycle: str
    num_microbatches: int = 1

    def __str__(self) -> str:
        suffix = f"-m{self.num_microbatches}" if self.num_microbatches > 1 else ""
        return f"{self.model}-{self.cycle}{suffix}"

    @property
    def global_batch(self) -> int:
        return MICROBATCH * self.num_microbatches

    def plan(self) -> Plan:
        return plan_of(traced(self.model), CYCLES[self.cycle], num_microbatches=self.num_microbatches)

    def build(self, optimizer: optax.GradientTransformation) -> Step:
        return build_step(traced(self.model), self.plan(), optimizer)


def _cases() -> Iterable[Case]:
    for model, cycles in PLANS.items():
        for cycle in cycles:
            yield Case(model, cycle)
            if (model, cycle) in ACCUMULATED:
                yield Case(model, cycle, 4)


def parameters() -> list:
    """The matrix for `pytest.mark.parametrize`: all but the sample is slow."""
    return [
        pytest.param(
            case,
            id=str(case),
            marks=() if (case.model, case.cycle, case.num_microbatches) in SAMPLE else (pytest.mark.slow,),
        )
        for case in _cases()
    ]


@functools.cache
def traced(name: str, microbatch: int = MICROBATCH) -> Traced:
    """A model of the tests, traced at one micro-batch."""
    case = MODELS[name]
    batch = case.batch(microbatch)
    if case.flavour == "linen":
        return trace(case.make(), case.loss_fn, batch, name=name)
    build = case.make()

    def make(seed: int | None) -> nnx.Module:
        return build(nnx.Rngs(jax.random.key(0 if seed is None else seed)))

    return trace(nnx.eval_shape(lambda: make(0)), case.loss_fn, batch, make=make, name=name)


def plan_of(model: Traced, cycle: Sequence[LayerStrategy], *, num_microbatches: int = 1) -> Plan:
    """A plan in which the layers take the strategies in turn."""
    groups = tuple(
        LayerGroup(start=i, stop=i + 1, strategy=cycle[i % len(cycle)]) for i in range(len(model.spec.layers))
    )
    return Plan(
        model=model.spec.name,
        mesh=tuple(MeshAxis(name=name, size=2) for name in AXES),
        global_batch=MICROBATCH * num_microbatches,
        num_microbatches=num_microbatches,
        stages=(Stage(groups=groups),),
        batch_axes=AXES,
    )
