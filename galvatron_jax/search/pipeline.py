"""The problem that the pipeline search solves, as arrays: layers with options, cut into stages on a schedule.

Layers run in order of *virtual stages*; virtual stage `k` lies on device group `k % degree`. Minimise the makespan of
the schedule's table (forward and backward seconds of every stage) plus the largest once-a-step seconds of a group,
such that every group's bytes fit. Values that cross a cut wait in the plan-wide layout, so stages meet nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from galvatron_jax.cost.pipeline import passing_seconds, residuals_kept
from galvatron_jax.cost.schedules import TickKinds, in_flight, makespan, recomputes, tick_kinds
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.strategy import LayerStrategy

_PER_OPTION = (
    "forward_s", "backward_s", "once_s", "static_bytes", "residual_bytes", "workspace_bytes", "boundary",
)  # fmt: skip
"""Fields of `StageOptions` with a figure for each option."""


@dataclass(frozen=True, eq=False)
class StageOptions:
    """What one layer can do as part of a stage. Layers alike share one object."""

    strategies: tuple[LayerStrategy, ...]
    forward_s: np.ndarray
    """Per micro-batch. float64[options]"""
    backward_s: np.ndarray
    """Per micro-batch, recomputation of the whole stage excluded. float64[options]"""
    once_s: np.ndarray
    """Per step: gradient synchronisation and update. float64[options]"""
    static_bytes: np.ndarray
    """Parameters, optimizer state, gradients. int64[options]"""
    residual_bytes: np.ndarray
    """Per micro-batch in flight. int64[options]"""
    workspace_bytes: np.ndarray
    """int64[options]"""
    boundary: np.ndarray
    """Class of the layouts at the layer's boundary. int64[options]"""
    num_classes: int
    enter_s: np.ndarray
    """Seconds, forward and backward, from the plan-wide layout where a stage begins with it. float64[classes, 2]"""
    leave_s: np.ndarray
    """The same to the plan-wide layout where a stage ends with it. float64[classes, 2]"""
    flat_bytes: np.ndarray | None = None
    """In each flat array of the stage's state and gradients; None where groups are looked at by themselves.
    int64[options, arrays]"""

    def __len__(self) -> int:
        return len(self.forward_s)


@dataclass(frozen=True)
class Cut:
    """What lies between two layers where a stage ends: sent on, and kept by the next stage until its backward."""

    bytes: int = 0
    """Of one micro-batch on one device."""
    forward_s: float = 0.0
    """To send it."""
    backward_s: float = 0.0
    """To send its gradient back."""


@dataclass(frozen=True)
class Tie:
    """A parameter that several layers use: stages that hold it add its gradients up."""

    users: tuple[int, ...]
    """Layers, ascending."""
    exchange_s: float
    """Per step, for a stage while another one holds it too."""


@dataclass(frozen=True)
class Held:
    """A value with several readers: a stage in which it is made keeps it."""

    producer: int
    last: int
    """Last layer that reads it."""
    bytes: int


@dataclass(frozen=True, eq=False)
class Pipeline:
    """One way to feed the batch through stages."""

    schedule: Schedule
    degree: int
    """Groups of devices."""
    num_chunks: int
    """Virtual stages on each."""
    num_microbatches: int
    layers: tuple[StageOptions, ...]
    """Each as the first of its stage to use its parameters."""
    repeats: tuple[StageOptions | None, ...]
    """Each where an earlier layer of its stage holds a parameter that it shares."""
    moves: tuple[np.ndarray, ...]
    """Before each layer but the first, where no cut is: seconds from a class of the layer before to one of this,
    forward and backward. float64[classes before, classes here, 2]"""
    cuts: tuple[Cut, ...]
    """Per layer, where a stage begins with it; the first is empty."""
    held: tuple[Held, ...] = ()
    ties: tuple[Tie, ...] = ()
    fixed_bytes: int = 0
    """On every device whatever the strategies: batch, state, unread parameters."""
    slots_alike: bool = False
    """Whether every group has room for as many micro-batches in flight as any other."""

    @property
    def num_stages(self) -> int:
        """Virtual stages."""
        return self.degree * self.num_chunks

    @property
    def recomputes(self) -> bool:
        """Whether backward begins with the stage's forward."""
        return recomputes(self.schedule)

    @cached_property
    def passing(self) -> np.ndarray:
        """Seconds of each stage for what moves between stages; see `cost.pipeline.passing_seconds`."""
        return passing_seconds(self.cuts, recomputes=self.recomputes)

    @cached_property
    def own_in_flight(self) -> tuple[int, ...]:
        """Per virtual stage, micro-batches whose input it holds at once."""
        return in_flight(
            self.schedule,
            num_stages=self.degree,
            num_microbatches=self.num_microbatches,
            num_chunks=self.num_chunks,
        )

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """Per virtual stage, micro-batches whose input it has room for."""
        own = self.own_in_flight
        if not self.slots_alike:
            return own
        chunks = [own[first : first + self.degree] for first in range(0, self.num_stages, self.degree)]
        return tuple(max(chunk) for chunk in chunks for _ in chunk)

    @cached_property
    def kinds(self) -> TickKinds:
        """The schedule's ticks, equal ones folded."""
        return tick_kinds(
            self.schedule,
            num_stages=self.degree,
            num_microbatches=self.num_microbatches,
            num_chunks=self.num_chunks,
        )

    def options(self, layer: int, start: int) -> StageOptions:
        """Options of a layer in a stage that begins at `start`."""
        repeat = self.repeats[layer]
        return self.layers[layer] if repeat is None or not self.shares(layer, start) else repeat

    def shares(self, layer: int, start: int) -> bool:
        """Whether an earlier layer of the stage holds a parameter that this one uses too."""
        return any(layer in tie.users and any(start <= user < layer for user in tie.users) for tie in self.ties)

    def residuals_kept(self, stage: int) -> int:
        """Micro-batches whose residuals a virtual stage holds at once; see `cost.pipeline.residuals_kept`."""
        return residuals_kept(self.in_flight[stage], recomputes=self.recomputes)

    def exchange_s(self, start: int, stop: int) -> float:
        """Seconds per step that a stage spends on parameters which other stages hold too."""
        return sum(
            tie.exchange_s
            for tie in self.ties
            if any(start <= user < stop for user in tie.users) and any(not start <= u < stop for u in tie.users)
        )

    def kept_bytes(self, stage: int, start: int, stop: int) -> int:
        """Bytes that a stage keeps whatever its options: its inputs in flight, and held values made in it."""
        inputs = self.in_flight[stage] * self.cuts[start].bytes if start else 0
        return inputs + self.residuals_kept(stage) * self.made_bytes(start, stop)

    def made_bytes(self, start: int, stop: int) -> int:
        """Bytes of held values that are made in a stage, for one micro-batch."""
        return sum(held.bytes for held in self.held if start <= held.producer < stop)


def together(problems: Sequence[Pipeline]) -> Pipeline:
    """A problem with the plans of several that differ in the layouts of tied parameters alone, and with more.

    Layers that share a parameter need not agree on its layout, so no plan of any of the problems beats its best one.
    """
    if len(problems) == 1:
        return problems[0]
    made: dict[tuple[int, ...], StageOptions] = {}
    return replace(
        problems[0],
        layers=tuple(_together(each, made) for each in zip(*(one.layers for one in problems), strict=True)),
        repeats=tuple(
            None if each[0] is None else _together([one for one in each if one is not None], made)
            for each in zip(*(one.repeats for one in problems), strict=True)
        ),
        ties=tuple(
            Tie(each[0].users, min(tie.exchange_s for tie in each))
            for each in zip(*(one.ties for one in problems), strict=True)
        ),
    )


def _together(every: Sequence[StageOptions], made: dict[tuple[int, ...], StageOptions]) -> StageOptions:
    unlike = list({id(options): options for options in every}.values())
    if len(unlike) == 1:
        return unlike[0]
    key = tuple(map(id, unlike))
    if key not in made:
        strategies = tuple(strategy for options in unlike for strategy in options.strategies)
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(options, name) for options in unlike]) for name in _PER_OPTION
        }
        made[key] = replace(unlike[0], strategies=strategies, flat_bytes=None, **columns)
    return made[key]


@dataclass(frozen=True)
class StageSum:
    """One virtual stage with chosen options."""

    forward_s: float
    backward_s: float
    once_s: float
    resident_bytes: int
    """What its group holds all the time: static, inputs and residuals in flight."""
    passing_bytes: int
    """What it holds while it works: workspace, and residuals that backward recomputes."""


@dataclass(frozen=True)
class PipelineSolution:
    """Cuts and one option per layer, and what they sum to."""

    starts: tuple[int, ...]
    """First layer of each virtual stage."""
    options: tuple[int, ...]
    seconds: float
    bytes: tuple[int, ...]
    """Per device group, without `Pipeline.fixed_bytes`."""
    stages: tuple[StageSum, ...]


def sum_stage(problem: Pipeline, stage: int, start: int, stop: int, options: tuple[int, ...]) -> StageSum:
    """Sums up one virtual stage.

    Args:
        problem: the problem.
        stage: its number.
        start: its first layer.
        stop: the layer after its last.
        options: of its layers.
    """
    last = stop == len(problem.layers)
    layers = [problem.options(index, start) for index in range(start, stop)]
    pairs = list(zip(layers, options, strict=True))
    own = np.array([sum(x.forward_s[o] for x, o in pairs), sum(x.backward_s[o] for x, o in pairs)])
    for offset, ((before, left), (here, right)) in enumerate(itertools.pairwise(pairs)):
        own = own + problem.moves[start + offset][before.boundary[left], here.boundary[right]]
    if start:
        own = own + layers[0].enter_s[layers[0].boundary[options[0]]]
    forward, backward = float(own[0]), float(own[1])
    recomputed = forward
    if not last:
        away = layers[-1].leave_s[layers[-1].boundary[options[-1]]]
        forward, backward = forward + float(away[0]), backward + float(away[1])
    residual = sum(int(x.residual_bytes[o]) for x, o in pairs)
    static = sum(int(x.static_bytes[o]) for x, o in pairs)
    workspace = max(int(x.workspace_bytes[o]) for x, o in pairs)
    kept = problem.kept_bytes(stage, start, stop)
    if problem.recomputes:
        backward += recomputed
        forward = 0.0 if last else forward
        resident, passing = static + kept, residual + workspace
    else:
        resident, passing = static + kept + problem.residuals_kept(stage) * residual, workspace
    there, back = problem.passing[:, start, stop].tolist()
    forward, backward = forward + there, backward + back
    once = sum(float(x.once_s[o]) for x, o in pairs) + problem.exchange_s(start, stop)
    return StageSum(forward, backward, once, resident, passing)


def evaluate(problem: Pipeline, starts: tuple[int, ...], options: tuple[int, ...]) -> PipelineSolution:
    """Sums up one choice of cuts and options."""
    stops = (*starts[1:], len(problem.layers))
    stages = tuple(
        sum_stage(problem, stage, start, stop, options[start:stop])
        for stage, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )
    return PipelineSolution(starts, options, step_seconds(problem, stages), group_bytes(problem, stages), stages)


def step_seconds(problem: Pipeline, stages: tuple[StageSum, ...]) -> float:
    """The schedule's makespan, and the slowest group's work once a step."""
    forward = np.array([stage.forward_s for stage in stages])
    backward = np.array([stage.backward_s for stage in stages])
    once = max(sum(stage.once_s for stage in stages[group :: problem.degree]) for group in range(problem.degree))
    return float(makespan(problem.kinds, forward, backward)) + once


def group_bytes(problem: Pipeline, stages: tuple[StageSum, ...]) -> tuple[int, ...]:
    """Bytes per device group: what its stages hold, and the most that one of them passes through."""
    groups = [stages[group :: problem.degree] for group in range(problem.degree)]
    return tuple(sum(s.resident_bytes for s in group) + max(s.passing_bytes for s in group) for group in groups)
