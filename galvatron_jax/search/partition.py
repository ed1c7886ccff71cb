"""Cutting the layers into stages, exactly, for the makespan of the schedule's table.

Virtual stages are placed in order. What a placed beginning has cost so far is a vector: per kind of tick how long its
slowest group works, seconds once a step, and where chunks share a group its bytes. Of beginnings that end at one layer
only the Pareto-optimal live on, and of those only the ones whose cheapest completion could still beat the best known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from galvatron_jax.search.balance import balanced
from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.cut import CutSolver
from galvatron_jax.search.cuts import CutFinder
from galvatron_jax.search.draft import draft
from galvatron_jax.search.exchange import exchange
from galvatron_jax.search.fronts import FrontBuilder, Limits, StageFront, pareto
from galvatron_jax.search.ledgers import Groups, Ledger, OneProgram, Program, StagesAlone
from galvatron_jax.search.minima import Known, StageMinima
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, evaluate
from galvatron_jax.search.polish import polish
from galvatron_jax.search.sketch import SketchBuilder

TOLERANCE = 1e-12
"""Relative difference of seconds that counts as none: rounding of sums in another order."""
_GUESSES = (1.003, 1.01, 1.03, 1.1, 1.3, 2.0)
"""Tried in turn, as multiples of the lower bound: seconds of the best plan."""
_NEAR = (1.003, 1.01, 1.03, 1.05, 1.08, 1.11, 1.15, 1.2, 1.3, 1.5, 2.0)
"""The same, for cuts."""
_FAR = (1.03, 1.08, 1.15, 1.3, 2.0)
"""The same, where stages are solved for all of them at once."""
_WORTH_A_GUESS = 0.98
"""Part of the seconds to beat above which a guess leaves about as much to look at as they do."""
_NEIGHBOURS = 4
"""Moved cuts whose options are exchanged, the fastest."""
_EXACT_LABELS = 200_000
"""Of stages and beginnings together: an exact attempt that needs more gives up."""
_SKETCHED = 200
"""Beginnings that go on from each layer of a sketch."""
_MAX_BEGINNINGS = 20_000
"""Kept per stage; beyond it the result is no longer proven."""


class _TooManyError(Exception):
    """The exact attempt grows too many labels."""


@dataclass(frozen=True)
class PipelineOutcome:
    """What solving a pipeline gave."""

    solution: PipelineSolution | None
    """The best that fits and beats the bound given."""
    bound_s: float
    """No solution is faster, but for the one found; infinite where that is proven to be the best, or there is none."""
    labels: int
    """Labels of stages and beginnings."""

    @property
    def proven(self) -> bool:
        """Whether nothing better exists."""
        return self.bound_s == math.inf


@dataclass(frozen=True, eq=False)
class _Beginnings:
    """Placements of the first virtual stages that end at one layer."""

    columns: np.ndarray
    """float64[beginnings, columns]"""
    parent: np.ndarray
    """Beginning one stage shorter, at `start`."""
    start: np.ndarray
    """First layer of the last stage placed."""
    point: np.ndarray
    """Its choice, in its front."""
    bound_s: np.ndarray
    """No completion is faster."""

    def take(self, index: np.ndarray) -> _Beginnings:
        """Some of them."""
        return _Beginnings(
            self.columns[index], self.parent[index], self.start[index], self.point[index], self.bound_s[index]
        )


@dataclass
class _Solver:
    problem: Pipeline
    upper_s: float
    deadline: float | None
    bounds: Bounds
    builder: FrontBuilder | SketchBuilder
    ledger: Ledger
    best: PipelineSolution | None = None
    proven: bool = True
    placed: int = 0
    cells: dict[tuple[int, int], _Beginnings] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------ columns

    @property
    def single(self) -> bool:
        """Whether every group runs one stage: then a kind of tick needs its slowest group only."""
        return self.problem.num_chunks == 1

    def empty(self) -> _Beginnings:
        none = np.full(1, -1)
        return _Beginnings(np.zeros((1, self._timed + self.ledger.width)), none, none, none, np.zeros(1))

    @property
    def _timed(self) -> int:
        """Columns of seconds; those of the ledger come behind them."""
        return (len(self.problem.kinds.count) + 1) * (1 if self.single else self.problem.degree)

    def extend(self, columns: np.ndarray, stage: int, front: StageFront) -> np.ndarray:
        """Columns of every beginning with every choice of the next stage. float64[beginnings, points, columns]."""
        kinds, groups = self.problem.kinds, self.problem.degree
        tick = kinds.forward[:, stage, None] * front.forward_s + kinds.backward[:, stage, None] * front.backward_s
        found = np.repeat(columns[:, None], len(front), axis=1)
        count = len(kinds.count)
        self.ledger.add(found[..., self._timed :], stage, front)
        if self.single:
            found[..., :count] = np.maximum(found[..., :count], tick.T[None])
            found[..., count] = np.maximum(found[..., count], front.once_s)
            return found
        group = stage % groups
        found[..., group : count * groups : groups] += tick.T[None]
        found[..., count * groups + group] += front.once_s
        return found

    def seconds(self, columns: np.ndarray, stage: int, layer: int) -> np.ndarray:
        """Seconds that no completion undercuts, of beginnings with `stage` stages placed up to `layer`."""
        kinds, groups = self.problem.kinds, self.problem.degree
        count = len(kinds.count)
        floor, once_floor = self.bounds.rest(stage, layer)
        if self.single:
            ticks, once = columns[:, :count], columns[:, count]
        else:
            ticks = columns[:, : count * groups].reshape(-1, count, groups).max(2)
            once = columns[:, count * groups : count * groups + groups].max(1)
        seconds = (np.maximum(ticks, floor) * kinds.count).sum(1) + np.maximum(once, once_floor)
        if not self.single:
            seconds = np.maximum(seconds, self._busy(columns, stage, layer))
        return seconds

    def _busy(self, columns: np.ndarray, stage: int, layer: int) -> np.ndarray:
        """The average group's work: what is placed and what is left."""
        kinds, groups = self.problem.kinds, self.problem.degree
        count = len(kinds.count)
        placed = (columns[:, : count * groups].reshape(-1, count, groups).sum(2) * kinds.count).sum(1)
        return (placed + self.bounds.work(stage, layer)) / groups

    # ------------------------------------------------------------------------------------------ stages

    def run(self) -> None:
        """Places all virtual stages."""
        problem, count = self.problem, len(self.problem.layers)
        self.cells = {(0, 0): self.empty()}
        for stage in range(problem.num_stages):
            if self.deadline is not None and time.monotonic() > self.deadline:
                self.proven = False
                return
            arrivals: dict[int, list[_Beginnings]] = {}
            remaining = problem.num_stages - stage - 1
            starts = [layer for (placed, layer) in self.cells if placed == stage]
            for start in sorted(starts):
                stops = range(start + 1, count - remaining + 1) if remaining else (count,)
                for stop in stops:
                    if isinstance(self.builder, SketchBuilder) and not self.builder.likely(stop - start):
                        continue
                    if not self.promising(self.bounds.stage_seconds(stage, start, stop)):
                        if not self.promising(self.bounds.alone_seconds(stage, start, stop)):
                            break  # And so is every longer stage.
                        continue
                    found = self._place(stage, start, stop)
                    if found is not None:
                        arrivals.setdefault(stop, []).append(found)
            self._settle(stage + 1, arrivals)
        self._finish()

    def _place(self, stage: int, start: int, stop: int) -> _Beginnings | None:
        """Every beginning that ends at `start`, extended by a stage up to `stop`."""
        before = self.cells[stage, start]
        alive = np.flatnonzero(self.promising(before.bound_s))
        if not len(alive):
            return None
        front = self.builder.front(stage, start, stop)
        self.proven &= front.complete
        if not front.complete and isinstance(self.builder, FrontBuilder):
            raise _TooManyError
        if not len(front):
            return None
        columns = self.extend(before.columns[alive], stage, front)
        shape = columns.shape[:2]
        columns = columns.reshape(shape[0] * shape[1], -1)
        bound = self.seconds(columns, stage + 1, stop)
        index = np.flatnonzero(self.ledger.fits(columns[:, self._timed :]) & self.promising(bound))
        parent = np.repeat(alive, shape[1])[index]
        point = np.tile(np.arange(shape[1]), shape[0])[index]
        return _Beginnings(columns[index], parent, np.full(len(index), start), point, bound[index])

    def promising(self, bound_s: Any) -> Any:
        """Which bounds leave room for something better than the best known."""
        return bound_s < self.upper_s * (1 - TOLERANCE)

    def _settle(self, placed: int, arrivals: dict[int, list[_Beginnings]]) -> None:
        for layer, pieces in arrivals.items():
            parts = [np.concatenate(part) for part in zip(*(_fields(p) for p in pieces), strict=True)]
            found = _Beginnings(*parts)
            if isinstance(self.builder, SketchBuilder):
                found = found.take(np.argsort(found.bound_s, kind="stable")[:_SKETCHED])
            found = found.take(pareto(found.columns))
            if len(found.bound_s) > _MAX_BEGINNINGS:
                found = found.take(np.argsort(found.bound_s, kind="stable")[:_MAX_BEGINNINGS])
                self.proven = False
            self.placed += len(found.bound_s)
            if isinstance(self.builder, FrontBuilder) and self.placed + self.builder.grown > _EXACT_LABELS:
                raise _TooManyError
            if len(found.bound_s):
                self.cells[placed, layer] = found

    def _finish(self) -> None:
        problem = self.problem
        last = self.cells.get((problem.num_stages, len(problem.layers)))
        if last is None or not len(last.bound_s):
            return
        best = int(np.argmin(last.bound_s))
        found = self._trace(best)
        if found.seconds < self.upper_s:
            self.upper_s, self.best = found.seconds, found

    def _trace(self, index: int) -> PipelineSolution:
        """The solution that a complete placement stands for."""
        stop, starts, options = len(self.problem.layers), [], []
        for stage in range(self.problem.num_stages, 0, -1):
            cell = self.cells[stage, stop]
            start, point = int(cell.start[index]), int(cell.point[index])
            options.append(self.builder.front(stage - 1, start, stop).options[point])
            starts.append(start)
            index, stop = int(cell.parent[index]), start
        chosen = tuple(option for part in reversed(options) for option in part)
        return evaluate(self.problem, tuple(reversed(starts)), chosen)


def _fields(found: _Beginnings) -> tuple[np.ndarray, ...]:
    return found.columns, found.parent, found.start, found.point, found.bound_s


def solve_pipeline(
    problem: Pipeline, *, budget_bytes: int, upper_s: float = math.inf, deadline: float | None = None
) -> PipelineOutcome:
    """The fastest cuts and options that fit a budget and are faster than `upper_s`.

    Args:
        problem: the problem.
        budget_bytes: per device, for everything.
        upper_s: only faster solutions count.
        deadline: of `time.monotonic()`.
    """
    solver = PipelineSolver.of(problem, budget_bytes=budget_bytes, deadline=deadline)
    if solver is None or solver.bound(upper_s) >= upper_s * (1 - TOLERANCE):
        return PipelineOutcome(None, math.inf, labels=0)
    sketched = solver.sketch(upper_s)
    if sketched is not None:
        sketched = solver.improve(sketched, exact=False)
    found, bound = solver.exact(min(upper_s, sketched.seconds) if sketched is not None else upper_s)
    return PipelineOutcome(found or sketched, bound, solver.labels)


@dataclass
class PipelineSolver:
    """The ways to attack one problem, the cheapest first."""

    problem: Pipeline
    budget_bytes: float
    """Without `Pipeline.fixed_bytes`."""
    bounds: Bounds
    deadline: float | None = None
    """Of `time.monotonic()`."""
    labels: int = 0
    bound_s: float = 0.0
    """No solution is faster, among those faster than what `bound` was asked about."""
    cuts: tuple[tuple[int, ...], ...] = ()
    """Those that gave the bound."""
    known: Known = field(default_factory=Known, repr=False)
    """Of stages, shared with other problems."""

    @classmethod
    def of(
        cls, problem: Pipeline, *, budget_bytes: int, deadline: float | None = None, known: Known | None = None
    ) -> PipelineSolver | None:
        """A solver; None where nothing fits for sure."""
        budget = budget_bytes - problem.fixed_bytes
        if budget < 0 or problem.num_stages > len(problem.layers):
            return None
        bounds = Bounds.of(problem, budget)
        least = bounds.seconds()
        if not math.isfinite(least):
            return None
        return cls(problem, budget, bounds, deadline, bound_s=least, known=known or Known())

    def bound(self, upper_s: float) -> float:
        """Seconds that no solution faster than `upper_s` undercuts."""
        if self.bound_s < upper_s:
            found = balanced(self.problem, self.bounds, upper_s=upper_s)
            self.bound_s, self.cuts = max(self.bound_s, found.seconds), found.starts
        return self.bound_s

    def draft(self) -> PipelineSolution | None:
        """A solution, quickly."""
        builder = SketchBuilder(self.problem, self.bounds, self.budget_bytes)
        found = draft(self.problem, builder, self.cuts)
        self.labels += builder.grown
        return found

    def sketch(self, upper_s: float) -> PipelineSolution | None:
        """A good solution that is faster than `upper_s`, if one is found; not in general the optimum."""
        builder = SketchBuilder(self.problem, self.bounds, self.budget_bytes)
        for aim in self._aims(upper_s):
            best = self._attempt(aim, builder).best
            if best is not None:
                return best
        return None

    def improve(self, found: PipelineSolution, *, exact: bool = True) -> PipelineSolution:
        """The solution with better options, and with its cuts moved by a layer while that helps.

        Args:
            found: the solution.
            exact: whether options are polished thoroughly.
        """
        if self.problem.num_chunks > 1:
            return found
        builder = SketchBuilder(self.problem, self.bounds, self.budget_bytes)
        limits = {"budget_bytes": self.budget_bytes, "deadline": self.deadline}
        found = exchange(self.problem, polish(self.problem, found, exact=exact, **limits), **limits)
        while True:
            moved = sorted(builder.neighbours(found), key=lambda other: other.seconds)[:_NEIGHBOURS]
            moved = [exchange(self.problem, other, **limits) for other in moved]
            best = min(moved, key=lambda other: other.seconds, default=found)
            if best.seconds >= found.seconds * (1 - TOLERANCE):
                return found
            found = exchange(self.problem, polish(self.problem, best, exact=exact, **limits), **limits)

    def exact(self, upper_s: float) -> tuple[PipelineSolution | None, float]:
        """The optimum if it is faster than `upper_s`; or, where that takes too many labels, what no solution undercuts.

        Returns:
            The best found, if it is faster; and the bound, infinite where nothing is left open.
        """
        if self.problem.num_chunks == 1:
            return self._by_cuts(upper_s)
        return self._all_at_once(upper_s, None)

    def _by_cuts(self, upper_s: float) -> tuple[PipelineSolution | None, float]:
        """As `exact`, one way to cut after another."""
        bound = self.bound_s
        for most in self._aims(upper_s, _FAR):
            minima = StageMinima(self.problem, self.budget_bytes, self.deadline, self.known)
            finder = CutFinder(self.problem, self.bounds, minima, most)
            for aim in self._aims(most, _NEAR):
                found, left_open = self._solve_cuts(finder, minima, aim)
                if found is not None or left_open < math.inf:
                    return found, max(bound, left_open)
                bound = aim
        return None, math.inf

    def _solve_cuts(
        self, finder: CutFinder, minima: StageMinima, aim_s: float
    ) -> tuple[PipelineSolution | None, float]:
        cuts = finder.find(aim_s)
        if cuts is None:
            return None, self.bound_s
        best, left_open = None, math.inf
        for starts, bound in zip(cuts.starts.tolist(), cuts.bound_s.tolist(), strict=True):
            if bound >= aim_s * (1 - TOLERANCE):
                break
            if self._late():
                left_open = min(left_open, bound)
                break
            solver = CutSolver(self.problem, self.bounds, minima, tuple(starts), aim_s, self.deadline)
            solver.run()
            self.labels += solver.labels
            if solver.best is not None:
                best, aim_s = solver.best, solver.best.seconds
            left_open = min(left_open, max(bound, solver.bound_s))
        return best, left_open if left_open < aim_s else math.inf

    def exact_as(self, program: Program, upper_s: float) -> tuple[PipelineSolution | None, float]:
        """As `exact`, of the plans whose one program for all groups fits."""
        return self._all_at_once(upper_s, program)

    def _all_at_once(self, upper_s: float, program: Program | None) -> tuple[PipelineSolution | None, float]:
        """As `exact`, by labels of all stages."""
        bound = self.bound_s
        for aim in self._aims(upper_s):
            found, least = self._by_labels(aim, program)
            if found is not None or least < math.inf:
                return found, max(bound, least) if least < math.inf else least
            bound = aim
        return None, math.inf

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _by_labels(self, aim_s: float, program: Program | None) -> tuple[PipelineSolution | None, float]:
        limits = Limits(self.budget_bytes, self.bounds.longest_stage(aim_s))
        builder = FrontBuilder(self.problem, self.bounds, limits, one_program=program is not None)
        try:
            solver = self._attempt(aim_s, builder, program)
        except _TooManyError:
            return None, self.bound_s
        return solver.best, math.inf if solver.proven else self.bound_s

    def _aims(self, upper_s: float, factors: tuple[float, ...] = _GUESSES) -> Iterator[float]:
        """Seconds to beat: a tight guess leaves little to look at, and what beats it is the best."""
        bound = self.bound_s
        yield from (bound * factor for factor in factors if bound * factor < upper_s * _WORTH_A_GUESS)
        yield upper_s

    def _attempt(self, aim_s: float, builder: FrontBuilder | SketchBuilder, program: Program | None = None) -> _Solver:
        ledger = self._ledger(program)
        solver = _Solver(self.problem, aim_s, self.deadline, self.bounds, builder, ledger)
        grown = builder.grown
        try:
            solver.run()
        finally:
            self.labels += solver.placed + builder.grown - grown
        return solver

    def _ledger(self, program: Program | None) -> Ledger:
        if program is not None:
            return OneProgram.of(program, self.problem)
        return StagesAlone() if self.problem.num_chunks == 1 else Groups(self.problem.degree, self.budget_bytes)
