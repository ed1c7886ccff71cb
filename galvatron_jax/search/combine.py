"""Combinations of the choices of some stages of a cut, while the others are only bounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.fronts import StageFront, pareto
from galvatron_jax.search.minima import Weight
from galvatron_jax.search.pipeline import Pipeline, StageSum

_MOST = 400_000
"""Combinations beyond which a cut is left open."""
_FEW = 20_000
"""Combinations up to which those that others beat are dropped."""
_ROUNDING = 1e-11
_EQUAL = 1e-13
"""Relative difference of sums in another order."""
_LEAST = 1e-9
"""Of limits, of the largest one: less is none."""
_LEAST_S = 1e-300


class TooManyError(Exception):
    """A cut takes too much work, or time is up."""


@dataclass(frozen=True, eq=False)
class Priced:
    """Prices of the stages' seconds, and what they prove."""

    weights: tuple[Weight, ...]
    least: tuple[float, ...]
    """Per stage, the least weighted seconds."""

    @property
    def bound_s(self) -> float:
        """No plan of the cut is faster."""
        return math.fsum(self.least)


@dataclass(frozen=True, eq=False)
class Placements:
    """Choices of some stages, those first that may give the fastest step."""

    columns: np.ndarray
    """Seconds of every kind of tick and once a step, at least: of those stages, and of what bounds the others.
    float64[placements, kinds + 1]"""
    chosen: np.ndarray
    """Point of each stage's front. int64[placements, stages placed]"""
    stages: tuple[int, ...]
    """Those placed."""

    def __len__(self) -> int:
        return len(self.columns)


@dataclass(frozen=True, eq=False)
class Combining:
    """Combines the choices of one cut's stages."""

    problem: Pipeline
    priced: Priced
    floors: np.ndarray
    """What each stage takes at least in every kind of tick and once a step. float64[stages, kinds + 1]"""

    @classmethod
    def of(cls, problem: Pipeline, bounds: Bounds, ends: Sequence[tuple[int, int]], priced: Priced) -> Combining:
        """Bounds what the stages take.

        Args:
            problem: the problem.
            bounds: its own.
            ends: of the stages: first layer, and the layer after the last.
            priced: prices that bound the cut.
        """
        floors = np.stack([_floor(problem, bounds, stage, *one) for stage, one in enumerate(ends)])
        return cls(problem, priced, floors)

    def with_floor(self, stage: int, columns: np.ndarray) -> Combining:
        """The same where a stage is known to take more.

        Args:
            stage: its number.
            columns: every choice of it. float64[choices, kinds + 1]
        """
        floors = self.floors.copy()
        floors[stage] = np.maximum(floors[stage], columns.min(0, initial=np.inf))
        return replace(self, floors=floors)

    @property
    def count(self) -> np.ndarray:
        """How often the columns count in a step. float64[kinds + 1]."""
        return np.append(self.problem.kinds.count, 1.0)

    def columns(self, stage: int, forward_s: np.ndarray, backward_s: np.ndarray, once_s: np.ndarray) -> np.ndarray:
        """Seconds of a stage's choices in every kind of tick and once a step. float64[choices, kinds + 1]."""
        kinds = self.problem.kinds
        ticks = kinds.forward[:, stage] * forward_s[:, None] + kinds.backward[:, stage] * backward_s[:, None]
        return np.concatenate([ticks, once_s[:, None]], axis=1)

    def of_front(self, stage: int, front: StageFront) -> np.ndarray:
        """The same of a front."""
        return self.columns(stage, front.forward_s, front.backward_s, front.once_s)

    def within(self, stage: int, total: StageSum, most: np.ndarray) -> bool:
        """Whether a stage's choice takes no more than some seconds in every kind of tick and once a step.

        Args:
            stage: its number.
            total: of the choice.
            most: float64[kinds + 1]
        """
        seconds = (np.array([part]) for part in (total.forward_s, total.backward_s, total.once_s))
        return bool((self.columns(stage, *seconds)[0] <= most * (1 + _EQUAL)).all())

    def sides(self, stage: int, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same, as upper limits on weighted sums of a stage's seconds.

        Returns:
            Weights of its seconds forward, backward and once a step, float64[limits, 3]; and the limits.
        """
        kinds = self.problem.kinds
        ahead, back = kinds.forward[:, stage], kinds.backward[:, stage]
        rows, limits = [], []
        for does_forward, does_backward in ((True, False), (False, True), (True, True)):
            ticks = (ahead == does_forward) & (back == does_backward)
            if ticks.any():
                rows.append((float(does_forward), float(does_backward), 0.0))
                limits.append(most[:-1][ticks].min())
        rows.append((0.0, 0.0, 1.0))
        limits.append(most[-1])
        return np.array(rows), np.maximum(limits, _LEAST * max(limits) + _LEAST_S)

    def place(self, fronts: Mapping[int, StageFront], upper_s: float) -> Placements:
        """The combinations of some stages' choices that a step faster than `upper_s` may have.

        Args:
            fronts: all useful choices of those stages.
            upper_s: seconds to beat.

        Raises:
            TooManyError: when there are too many.
        """
        stages, weights = tuple(fronts), self.priced.weights
        columns = [self.of_front(s, fronts[s]) for s in stages]
        cost = [
            weights[s].forward * fronts[s].forward_s
            + weights[s].backward * fronts[s].backward_s
            + weights[s].once * fronts[s].once_s
            for s in stages
        ]
        apart = [s for s in range(self.problem.num_stages) if s not in fronts]
        others = math.fsum(self.priced.least[s] for s in apart)
        placed = self.floors.max(0)[None]
        spent, chosen = np.zeros(1), np.zeros((1, 0), np.int64)
        for place, own in enumerate(columns):
            if len(placed) * len(own) > 20 * _MOST:
                raise TooManyError
            rest = others + math.fsum(one.min(initial=np.inf) for one in cost[place + 1 :])
            row, point = np.nonzero(spent[:, None] + cost[place] + rest < upper_s * (1 + _ROUNDING))
            grown = np.maximum(placed[row], own[point])
            alive = np.flatnonzero(grown @ self.count < upper_s * (1 - _ROUNDING))
            if len(alive) > _MOST:
                raise TooManyError
            row, point, grown = row[alive], point[alive], grown[alive]
            if len(alive) < _FEW:
                kept = pareto(grown)
                row, point, grown = row[kept], point[kept], grown[kept]
            placed, spent = grown, spent[row] + cost[place][point]
            chosen = np.concatenate([chosen[row], point[:, None]], axis=1)
        order = np.argsort(placed @ self.count, kind="stable")
        return Placements(placed[order], chosen[order], stages)


def _floor(problem: Pipeline, bounds: Bounds, stage: int, start: int, stop: int) -> np.ndarray:
    """What a stage takes at least in every kind of tick and once a step. float64[kinds + 1]."""
    kinds = problem.kinds
    forward, backward, once = (part[stop] - part[start] for part in (bounds.forward, bounds.backward, bounds.once))
    if problem.recomputes and stop == len(problem.layers):
        forward = 0.0
    ahead, back = kinds.forward[:, stage], kinds.backward[:, stage]
    ticks = ahead * forward + back * backward
    both = float(bounds.busy[stage, start, stop])
    ticks = np.where(ahead & back, np.maximum(ticks, both), ticks) if math.isfinite(both) else ticks
    return np.append(ticks, max(once, 0.0)) * (1 - _ROUNDING)
