"""Pipeline plans that parity and collectives are tested on: every schedule, with stages that are unlike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import optax
import pytest

from galvatron_jax.runtime.program import StepProgram
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage
from galvatron_jax.spec.strategy import LayerStrategy

from .matrix import AXES, MICROBATCH, megatron, plain, traced, ulysses

MIXES: dict[int, dict[str, tuple[LayerStrategy, ...]]] = {
    2: {
        "every-kind": (
            plain(dp="b", tp="c"), megatron("c", dp="b", zero=3), ulysses("c", dp="b"),
            plain(dp="bc", zero=2, remat="full"),
        ),
        "dp-and-tp": (plain(dp="bc"), plain(dp="bc"), plain(tp="bc"), plain(dp="bc", zero=1)),
        "dp": (plain(dp="bc"),),
        "alike": (plain(dp="bc", zero=1),),
        "zero3": (plain(dp="bc", zero=3), megatron("bc", zero=3, remat="dots"), plain(dp="bc", zero=3)),
    },
    4: {
        "every-kind": (plain(dp="c"), plain(tp="c"), megatron("c"), ulysses("c", zero=3), plain(dp="c", zero=1)),
        "dp-and-tp": (plain(dp="c"), plain(dp="c", zero=2), plain(tp="c")),
        "zero3": (plain(dp="c", zero=3, remat="full"), megatron("c"), plain(dp="c", zero=3)),
    },
}  # fmt: skip
"""Per pipeline degree, strategies that the layers of a model take in turn, over the axes inside a stage. Stages have
loops where layers take the same."""

SCHEDULES = (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ONE_F_ONE_B_STASH, Schedule.INTERLEAVED)

STARTS: dict[str, dict[int, tuple[int, ...]]] = {
    "gpt2_tied_dropout": {2: (0, 2), 4: (0, 1, 3, 4)},
    "llama": {2: (0, 3), 4: (0, 1, 3, 4)},
    "t5": {2: (0, 3), 4: (0, 2, 4, 5)},
    "swin": {2: (0, 4), 4: (0, 2, 3, 7)},
    "moe": {2: (0, 2), 4: (0, 1, 2, 3)},
    "gpt2_large_vocabulary": {2: (0, 2)},
}
"""Per model and number of virtual stages, their first layers: never an even share."""

LAYERS = {"gpt2_tied_dropout": 6, "llama": 6, "t5": 7, "swin": 10, "moe": 4, "gpt2_large_vocabulary": 6}
"""Layers of each model, embedding and head included."""

SAMPLE = {
    ("gpt2_tied_dropout", 2, Schedule.ONE_F_ONE_B, "every-kind"), ("llama", 4, Schedule.ONE_F_ONE_B_STASH, "dp-and-tp"),
    ("t5", 2, Schedule.ONE_F_ONE_B_STASH, "dp-and-tp"), ("gpt2_tied_dropout", 2, Schedule.INTERLEAVED, "zero3"),
    ("moe", 2, Schedule.GPIPE, "dp-and-tp"), ("llama", 2, Schedule.ONE_F_ONE_B, "alike"),
    ("gpt2_tied_dropout", 2, Schedule.ONE_F_ONE_B_STASH, "alike"),
    ("gpt2_large_vocabulary", 2, Schedule.ONE_F_ONE_B, "zero3"),
}  # fmt: skip
"""What runs without `slow`."""


@dataclasses.dataclass(frozen=True)
class PipelineCase:
    """A model in stages."""

    model: str
    degree: int
    schedule: Schedule
    mix: str
    num_microbatches: int = 4

    def __str__(self) -> str:
        return f"{self.model}-pp{self.degree}-{self.schedule}-{self.mix}"

    @property
    def starts(self) -> tuple[int, ...]:
        """First layers of the virtual stages."""
        count = self.degree * (2 if self.schedule is Schedule.INTERLEAVED else 1)
        if count == 8:
            return _eighths(LAYERS[self.model])
        return STARTS[self.model][count]

    def plan(self) -> Plan:
        """The plan."""
        return plan_in_stages(
            self.model,
            self.starts,
            MIXES[self.degree][self.mix],
            degree=self.degree,
            schedule=self.schedule,
            num_microbatches=self.num_microbatches,
        )

    def build(self, optimizer: optax.GradientTransformation) -> StepProgram:
        """Its step on the virtual devices."""
        return build_step(traced(self.model), self.plan(), optimizer)


def _eighths(layers: int) -> tuple[int, ...]:
    return (*range(7), layers - 1)


def plan_in_stages(
    model: str,
    starts: Sequence[int],
    cycle: Sequence[LayerStrategy],
    *,
    degree: int,
    schedule: Schedule,
    num_microbatches: int,
) -> Plan:
    """A plan whose layers take strategies in turn.

    Args:
        model: name of a model of the tests.
        starts: first layer of each virtual stage.
        cycle: the strategies.
        degree: groups of devices, 2 or 4.
        schedule: which one.
        num_microbatches: of a step.
    """
    layers = len(traced(model).spec.layers)
    along = AXES[: degree // 2]
    stages = [
        Stage(groups=tuple(LayerGroup(start=i, stop=i + 1, strategy=cycle[i % len(cycle)]) for i in range(start, stop)))
        for start, stop in zip(starts, (*starts[1:], layers), strict=True)
    ]
    return Plan(
        model=model,
        mesh=tuple(MeshAxis(name=name, size=2) for name in AXES),
        global_batch=MICROBATCH * num_microbatches,
        num_microbatches=num_microbatches,
        schedule=schedule,
        stages=tuple(stages),
        pipeline_axes=along,
        batch_axes=AXES[degree // 2 :],
    )


def cases() -> Iterable[PipelineCase]:
    """Every model, degree, schedule and mix for which the model has layers enough."""
    for model in STARTS:
        for degree, mixes in MIXES.items():
            for schedule in SCHEDULES:
                stages = degree * (2 if schedule is Schedule.INTERLEAVED else 1)
                if stages <= LAYERS[model] and (stages == 8 or stages in STARTS[model]):
                    yield from (PipelineCase(model, degree, schedule, mix) for mix in mixes if mix != "dp")


def parameters(*, every: int = 1, sample: int = len(SAMPLE)) -> list:
    """The cases for `pytest.mark.parametrize`: all but the sample is slow.

    Args:
        every: takes one of so many of those beyond the sample.
        sample: how many of the sample are not slow.
    """
    quick = [case for case in cases() if (case.model, case.degree, case.schedule, case.mix) in SAMPLE]
    rest = [case for case in cases() if case not in quick][::every]
    marks = [() if number < sample else (pytest.mark.slow,) for number in range(len(quick))] + [
        (pytest.mark.slow,)
    ] * len(rest)
    return [pytest.param(case, id=str(case), marks=mark) for case, mark in zip(quick + rest, marks, strict=True)]
