"""The best options for the stages of one cut, exactly.

1. Over mixtures of the choices known for each stage the step is a small linear program. Its prices say what a second of
   every stage is worth; the layer search finds each stage's best choice at those prices, and what the choices cost
   together bounds every plan of the cut from below (Dantzig & Wolfe, as in `polish`).
2. What a choice costs beyond its stage's best at those prices must be less than what the best plan known takes beyond
   that bound: few choices are left, and they are listed.
3. Combinations of them are built up stage by stage, and dropped when they cost too much.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.fronts import (
    BACKWARD,
    FORWARD,
    ONCE,
    RESIDENT,
    WORKSPACE,
    FrontBuilder,
    Labels,
    Limits,
    StageFront,
    pareto,
)  # fmt: skip
from galvatron_jax.search.minima import StageMinima, Weight, sending, stage_chain
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, evaluate
from galvatron_jax.search.polish import StageChoices, best_pure, stage_weights
from galvatron_jax.search.suffixes import Suffixes

_ROUNDS = 30
_MOST = 400_000
"""Labels, and combinations, beyond which a cut is left open."""
_ROUNDING = 1e-11


class TooManyError(Exception):
    """A cut takes too much work, or time is up."""


@dataclass(frozen=True, eq=False)
class _Priced:
    """Prices of the stages' seconds, and what they prove."""

    weights: tuple[Weight, ...]
    least: tuple[float, ...]
    """Per stage, the least weighted seconds."""

    @property
    def bound_s(self) -> float:
        return math.fsum(self.least)


@dataclass
class CutSolver:
    """Solves one cut."""

    problem: Pipeline
    bounds: Bounds
    minima: StageMinima
    starts: tuple[int, ...]
    upper_s: float
    """Only faster solutions count."""
    deadline: float | None = None
    best: PipelineSolution | None = None
    labels: int = 0
    _grew: bool = False
    bound_s: float = 0.0
    """No options of the cut take less, among those faster than `upper_s`; infinite once the best is known."""

    def run(self) -> None:
        """Finds the best solution, or a bound where that takes too much."""
        try:
            priced = self._price()
            if self.bound_s >= self._below:
                self.bound_s = math.inf
                return
            fronts = [self._front(priced, stage) for stage in range(len(self.starts))]
            self._combine(priced, fronts)
            self.bound_s = math.inf
        except TooManyError:
            return

    @property
    def _below(self) -> float:
        return self.upper_s * (1 - _ROUNDING)

    def _ends(self, stage: int) -> tuple[int, int]:
        return self.starts[stage], (*self.starts, len(self.problem.layers))[stage + 1]

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TooManyError

    # ------------------------------------------------------------------------------------------ prices

    def _price(self) -> _Priced:
        """The prices that bound the cut best."""
        stages = [StageChoices(number, *self._ends(number)) for number in range(len(self.starts))]
        problem = self.problem
        key = (problem.schedule, problem.degree, problem.num_microbatches)
        # What bounds a cut like this one may do at once. Stages that weigh nothing there have no good choices yet.
        begin = [weights for weights in (self.minima.known.weights.get(key), _even(problem)) if weights]
        best = _Priced((), ())
        for number in range(_ROUNDS):
            self._check_time()
            weights = begin[number] if number < len(begin) else _as_weights(stage_weights(problem, stages))
            found = _Priced(weights, tuple(self._add(stages, weights)))
            if not best.weights or found.bound_s > best.bound_s:
                best, self.bound_s = found, max(self.bound_s, found.bound_s)
            if self.bound_s >= self._below or (number >= len(begin) and not self._grew):
                break
        self.minima.known.weights[key] = best.weights
        if self.bound_s < self._below:
            self._offer(best_pure(problem, stages, self.starts))
        return best

    def _add(self, stages: list[StageChoices], weights: tuple[Weight, ...]) -> list[float]:
        least, self._grew = [], False
        for stage, weight in zip(stages, weights, strict=True):
            found = self.minima.least(stage.number, stage.start, stage.stop, weight)
            least.append(found.seconds)
            if found.options is not None:
                self._grew |= stage.add(self.problem, found.options, self.minima.budget_bytes)
            elif not stage.sums:
                raise TooManyError
        return least

    def _offer(self, found: PipelineSolution | None) -> None:
        if found is not None and found.seconds < self._below and max(found.bytes) <= self.minima.budget_bytes:
            self.best, self.upper_s = found, found.seconds

    # ------------------------------------------------------------------------------------------ choices

    def _front(self, priced: _Priced, stage: int) -> StageFront:
        """The choices of a stage that a plan faster than the best known may make."""
        start, stop = self._ends(stage)
        count = self.problem.num_microbatches
        room = self.upper_s - priced.bound_s
        asked = [
            (priced.weights[stage], priced.least[stage] + room),
            (Weight(1.0, 1.0, 1 / count), self.bounds.longest_stage(self.upper_s)),
        ]
        rules = [self._rule(stage, start, stop, weight, most * (1 + _ROUNDING)) for weight, most in asked]
        builder = _CutFronts(
            self.problem, self.bounds, Limits(self.minima.budget_bytes), rules=rules, deadline=self.deadline
        )
        front = builder.front(stage, start, stop)
        self.labels += builder.grown
        return front

    def _rule(self, stage: int, start: int, stop: int, weight: Weight, most: float) -> _Rule:
        most -= sending(self.problem, start, stop, weight)
        limit = self.minima.limit(stage, start, stop)
        chain = stage_chain(self.problem, stage, start, stop, weight)
        completions = Suffixes.of(chain, limit_bytes=limit, below=most)
        return _Rule(np.array([*weight.inside(self.problem, stage), weight.once]), most, completions)

    # ------------------------------------------------------------------------------------------ combinations

    def _combine(self, priced: _Priced, fronts: list[StageFront]) -> None:
        kinds, stages = self.problem.kinds, range(len(fronts))
        if not all(len(front) for front in fronts):
            return
        ticks = [
            kinds.forward[:, s] * fronts[s].forward_s[:, None] + kinds.backward[:, s] * fronts[s].backward_s[:, None]
            for s in stages
        ]
        columns = [np.concatenate([ticks[s], fronts[s].once_s[:, None]], axis=1) for s in stages]
        cost = [
            priced.weights[s].forward * fronts[s].forward_s
            + priced.weights[s].backward * fronts[s].backward_s
            + priced.weights[s].once * fronts[s].once_s
            for s in stages
        ]
        count = np.append(kinds.count, 1.0)
        floors = np.stack([one.min(0) for one in columns])
        placed = np.zeros((1, len(count)))
        spent, chosen = np.zeros(1), np.zeros((1, 0), np.int64)
        for s in stages:
            self._check_time()
            if len(placed) * len(cost[s]) > 20 * _MOST:
                raise TooManyError
            rest = math.fsum(one.min() for one in cost[s + 1 :])
            floor = floors[s + 1 :].max(0, initial=0.0)
            total = spent[:, None] + cost[s] + rest
            row, point = np.nonzero(total < self.upper_s * (1 + _ROUNDING))
            grown = np.maximum(placed[row], columns[s][point])
            seconds = np.maximum(grown, floor) @ count
            alive = np.flatnonzero(seconds < self._below)
            if len(alive) > _MOST:
                raise TooManyError
            row, point, grown = row[alive], point[alive], grown[alive]
            if len(alive) < 20_000:
                kept = pareto(np.maximum(grown, floor))
                row, point, grown = row[kept], point[kept], grown[kept]
            placed, spent = grown, spent[row] + cost[s][point]
            chosen = np.concatenate([chosen[row], point[:, None]], axis=1)
            self.labels += len(placed)
        if len(placed):
            best = chosen[int((placed @ count).argmin())]
            options = tuple(o for s in stages for o in fronts[s].options[int(best[s])])
            self._offer(evaluate(self.problem, self.starts, options))


def _as_weights(rows: np.ndarray) -> tuple[Weight, ...]:
    return tuple(Weight(*(float(part) for part in row)) for row in rows)


def _even(problem: Pipeline) -> tuple[Weight, ...]:
    """Every second of a group worth alike: no more in all than a step's."""
    share = 1.0 / problem.num_stages
    kinds = problem.kinds
    forward, backward = ((kinds.count @ active) * share for active in (kinds.forward, kinds.backward))
    return tuple(Weight(float(one), float(other), share) for one, other in zip(forward, backward, strict=True))


@dataclass(frozen=True, eq=False)
class _Rule:
    """A bound on a stage's weighted seconds."""

    weight: np.ndarray
    """Of a label's seconds forward, backward and once a step. float64[3]"""
    most: float
    suffixes: Suffixes


@dataclass
class _CutFronts(FrontBuilder):
    """Grows the front of one stage of a cut: what its end is, is known."""

    rules: list[_Rule] = field(default_factory=list)
    deadline: float | None = None

    def _prune(self, labels: Labels, stage: int, start: int, stop: int) -> Labels:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TooManyError
        alive = np.arange(len(labels.classes))
        for rule in self.rules:
            columns = labels.columns[alive]
            needed = columns[:, RESIDENT], columns[:, WORKSPACE]
            least = rule.suffixes.least(stop - start, labels.classes[alive], *needed)
            alive = alive[columns[:, [FORWARD, BACKWARD, ONCE]] @ rule.weight + least <= rule.most]
        labels = labels.take(alive)
        kept = [
            members[pareto(labels.columns[members])]
            for members in (np.flatnonzero(labels.classes == here) for here in np.unique(labels.classes))
        ]
        index = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        self.grown += len(index)
        if self.grown > _MOST:
            raise TooManyError
        return labels.take(index)
