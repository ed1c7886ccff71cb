"""Good cuts of a pipeline in no time: those that the bounds were found with, moved by a layer as long as that helps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.cost.schedules import makespan
from galvatron_jax.search.fronts import StageFront
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, evaluate
from galvatron_jax.search.sketch import SketchBuilder

_STARTS = 2
"""Cuts to begin from, the fastest."""
_MOVES = 100
_BETTER = 1e-9

Starts = tuple[int, ...]
"""First layer of each virtual stage."""


def draft(problem: Pipeline, builder: SketchBuilder, cuts: Iterable[Starts]) -> PipelineSolution | None:
    """The best solution that moving cuts leads to; None where none of them fits.

    Args:
        problem: the problem.
        builder: of the options that stages get.
        cuts: to begin from.
    """
    count, stages = len(problem.layers), problem.num_stages
    even = tuple(round(stage * count / stages) for stage in range(stages))
    moving = _Moving(problem, builder)
    starts = list(dict.fromkeys([*cuts, even]))
    seconds = moving.seconds(starts)
    best: tuple[float, Starts] = math.inf, ()
    for place in np.argsort(seconds, kind="stable")[:_STARTS]:
        if math.isfinite(seconds[place]):
            best = min(best, moving.descend(starts[place], float(seconds[place])))
    if not best[1]:
        return None
    ends = (*best[1], count)
    options = tuple(
        option for stage in range(stages) for option in builder.front(stage, ends[stage], ends[stage + 1]).options[0]
    )
    return evaluate(problem, best[1], options)


@dataclass
class _Moving:
    problem: Pipeline
    builder: SketchBuilder
    _sums: dict[tuple[int, int, int], tuple[float, ...]] = field(default_factory=dict)
    _known: dict[Starts, float] = field(default_factory=dict)

    def descend(self, starts: Starts, seconds: float) -> tuple[float, Starts]:
        """The cuts that single moves lead to, and their seconds."""
        for _ in range(_MOVES):
            moved = list(dict.fromkeys(self._moves(starts)))
            found = self.seconds(moved)
            best = int(np.argmin(found)) if len(found) else -1
            if best < 0 or found[best] >= seconds * (1 - _BETTER):
                break
            seconds, starts = float(found[best]), moved[best]
        return seconds, starts

    def _moves(self, starts: Starts) -> Iterator[Starts]:
        """One cut moved by a layer; or a layer given from the slowest stage to any other, through those between."""
        count = len(self.problem.layers)
        loads = [sum(self._sum(*ends)[:2]) for ends in _stages(starts, count)]
        slowest = int(np.argmax(loads))
        for cut in range(1, len(starts)):
            yield from (self._shifted(starts, cut, cut, step) for step in (-1, 1))
            if cut <= slowest:
                yield self._shifted(starts, cut, slowest, 1)
            else:
                yield self._shifted(starts, slowest + 1, cut, -1)

    def _shifted(self, starts: Starts, first: int, last: int, step: int) -> Starts:
        """Some cuts moved; as they were where a stage would be left empty."""
        moved = starts[:first] + tuple(cut + step for cut in starts[first : last + 1]) + starts[last + 1 :]
        ends = (*moved, len(self.problem.layers))
        return moved if all(one < other for one, other in itertools.pairwise(ends)) else starts

    def seconds(self, cuts: list[Starts]) -> np.ndarray:
        """Seconds of a step for each of some cuts; infinite where a stage does not fit. float64[cuts]."""
        new = [starts for starts in dict.fromkeys(cuts) if starts not in self._known]
        if new:
            count = len(self.problem.layers)
            sums = np.array([[self._sum(*ends) for ends in _stages(starts, count)] for starts in new])
            self._known.update(zip(new, self._step(sums), strict=True))
        return np.array([self._known[starts] for starts in cuts])

    def _step(self, sums: np.ndarray) -> np.ndarray:
        problem, groups = self.problem, self.problem.degree
        by_group = sums.reshape(len(sums), problem.num_chunks, groups, 5)
        once = by_group[..., 2].sum(1).max(1)
        needed = by_group[..., 3].sum(1) + by_group[..., 4].max(1)
        fits = (needed <= self.builder.budget_bytes).all(1)
        seconds = np.full(len(sums), np.inf)
        seconds[fits] = makespan(problem.kinds, sums[fits, :, 0], sums[fits, :, 1]) + once[fits]
        return seconds

    def _sum(self, stage: int, start: int, stop: int) -> tuple[float, ...]:
        """Forward, backward, once a step, resident and passing bytes; all infinite where the stage does not fit."""
        key = (stage, start, stop)
        if key not in self._sums:
            self._sums[key] = _sums_of(self.builder.front(stage, start, stop))
        return self._sums[key]


def _sums_of(front: StageFront) -> tuple[float, ...]:
    if not len(front):
        return (math.inf,) * 5
    columns = (front.forward_s, front.backward_s, front.once_s, front.resident_bytes, front.passing_bytes)
    return tuple(float(column[0]) for column in columns)


def _stages(starts: Starts, count: int) -> Iterator[tuple[int, int, int]]:
    ends = (*starts, count)
    return ((stage, ends[stage], ends[stage + 1]) for stage in range(len(starts)))
