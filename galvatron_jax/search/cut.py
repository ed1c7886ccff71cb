"""The best options for the stages of one cut, exactly.

1. Over mixtures of the choices known for each stage the step is a small linear program. Its prices say what a second of
   every stage is worth; the layer search finds each stage's best choice at those prices, and what the choices cost
   together bounds every plan of the cut from below (Dantzig & Wolfe, as in `polish`).
2. What a choice costs beyond its stage's best at those prices must be less than what the best plan known takes beyond
   that bound: few choices are left of stages whose seconds have a price, and they are listed and combined.
3. The other stages wait for those. Of each, one choice that is fast enough for the best combination is sought; with
   them that is the best plan. Only where a stage has none are its choices listed too.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.combine import Combining, Placements, Priced, TooManyError
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
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, evaluate, sum_stage
from galvatron_jax.search.polish import StageChoices, best_pure, stage_weights
from galvatron_jax.search.suffixes import Suffixes

_ROUNDS = 30
_KNOWN = 12
"""Prices of cuts that are remembered, the latest."""
_MOST = 400_000
"""Labels beyond which a cut is left open."""
_ROUNDING = 1e-11
_HEAVY = 0.01
"""Part of all prices from which on a stage's choices are listed at once."""
_TRIES = 12
"""To find a choice that is fast enough."""
_STEP = 4.0
"""Logarithm of the weight that something gains which takes twice as long as it may."""


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
        stages = [StageChoices(number, *self._ends(number)) for number in range(len(self.starts))]
        try:
            self._guess()
            priced = self._price(stages) if self.bound_s < self._below else Priced((), ())
            if self.bound_s < self._below:
                self._settle(priced, stages)
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

    def _price(self, stages: list[StageChoices]) -> Priced:
        """The prices that bound the cut best."""
        problem = self.problem
        # What bounds a cut like this one may do at once. Stages that weigh nothing there have no good choices yet.
        begin = [*self._known[:1], _even(problem)]
        best = Priced((), ())
        for number in range(_ROUNDS):
            self._check_time()
            weights = begin[number] if number < len(begin) else _as_weights(stage_weights(problem, stages))
            found = Priced(weights, tuple(self._add(stages, weights)))
            if not best.weights or found.bound_s > best.bound_s:
                best, self.bound_s = found, max(self.bound_s, found.bound_s)
            if self.bound_s >= self._below or (number >= len(begin) and not self._grew):
                break
        self.minima.known.weights[self._kind] = (best.weights, *self._known)[:_KNOWN]
        if self.bound_s < self._below:
            self._offer(best_pure(problem, stages, self.starts))
        return best

    @property
    def _kind(self) -> tuple:
        """Of problems whose cuts much the same prices bound."""
        return self.problem.schedule, self.problem.degree, self.problem.num_microbatches

    @property
    def _known(self) -> tuple[tuple[Weight, ...], ...]:
        return self.minima.known.weights.get(self._kind, ())

    def _guess(self) -> None:
        """Bounds the cut by the prices of other ones, without closing any gap of a stage."""
        ends = [self._ends(stage) for stage in range(len(self.starts))]
        for weights in self._known:
            least = [
                self.minima.least(stage, *ends[stage], weight, exact=False).seconds
                for stage, weight in enumerate(weights)
            ]
            self.bound_s = max(self.bound_s, math.fsum(least))
            if self.bound_s >= self._below:
                return

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

    def _settle(self, priced: Priced, stages: list[StageChoices]) -> None:
        """Finds the best combination of choices."""
        combining = Combining.of(self.problem, self.bounds, [(one.start, one.stop) for one in stages], priced)
        worth = np.array([weight.forward + weight.backward + weight.once for weight in priced.weights])
        waiting = [int(stage) for stage in np.argsort(-worth, kind="stable")]
        fronts: dict[int, StageFront] = {}
        heavy = int((worth >= _HEAVY * worth.sum()).sum())
        wanted = waiting[:heavy]
        while True:
            for stage in wanted:
                fronts[stage] = self._front(priced, stage)
                combining = combining.with_floor(stage, combining.of_front(stage, fronts[stage]))
                self._check_time()
            found = combining.place(fronts, self.upper_s)
            self.labels += len(found)
            if not len(found):
                return
            waiting = [stage for stage in waiting if stage not in fronts]
            wanted = self._complete(combining, fronts, found, [stages[stage] for stage in waiting])
            if not wanted:
                return

    def _complete(
        self, combining: Combining, fronts: dict[int, StageFront], found: Placements, waiting: list[StageChoices]
    ) -> list[int]:
        """Offers the best combination with a choice of every other stage, if they have any that is fast enough.

        Returns:
            A stage that has none.
        """
        most = found.columns[0]
        chosen = {stage: fronts[stage].options[int(p)] for stage, p in zip(found.stages, found.chosen[0], strict=True)}
        for stage in waiting:
            fast = self._fast(combining, stage, most)
            if fast is None:
                return [stage.number]
            chosen[stage.number] = fast
        options = tuple(option for stage in range(len(self.starts)) for option in chosen[stage])
        self._offer(evaluate(self.problem, self.starts, options))
        return []

    def _fast(self, combining: Combining, stage: StageChoices, most: np.ndarray) -> tuple[int, ...] | None:
        """A choice of a stage that takes no more than some seconds in every kind of tick and once a step.

        Whatever a choice exceeds gains weight, until the best choice under the weights exceeds nothing, or too much.
        """
        for total, options in zip(stage.sums, stage.options, strict=True):
            if combining.within(stage.number, total, most):
                return options
        rows, limits = combining.sides(stage.number, most)
        heavy = np.full(len(limits), 1.0 / len(limits))
        for _ in range(_TRIES):
            weight = Weight(*(float(part) for part in (heavy / limits) @ rows))
            least = self.minima.least(stage.number, stage.start, stage.stop, weight)
            if least.seconds > 1 + _ROUNDING or least.options is None:
                return None
            stage.add(self.problem, least.options, self.minima.budget_bytes)
            total = sum_stage(self.problem, stage.number, stage.start, stage.stop, least.options)
            if combining.within(stage.number, total, most):
                return least.options
            over = rows @ [total.forward_s, total.backward_s, total.once_s] / limits - 1.0
            heavy *= np.exp(_STEP * np.minimum(over, 1.0))
            heavy /= heavy.sum()
        return None

    def _front(self, priced: Priced, stage: int) -> StageFront:
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
