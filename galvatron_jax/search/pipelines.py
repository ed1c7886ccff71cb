"""All the pipelines of one search: every way to lay stages over the cluster, schedule and feed them; and the best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.pipeline import Pipelining
from galvatron_jax.search import stand_ins
from galvatron_jax.search.bounds import seconds_of_work
from galvatron_jax.search.minima import Known
from galvatron_jax.search.partition import TOLERANCE, PipelineSolver
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, together
from galvatron_jax.search.pipeline_problems import Layout, PipelineBest, PipelineProblem, Variants, schedules_of
from galvatron_jax.search.problems import Effort, Progress
from galvatron_jax.search.space import Rule, SearchSpace, batch_axes_for
from galvatron_jax.search.stages import PipelineBuilder
from galvatron_jax.search.stand_ins import BoundingTables
from galvatron_jax.search.tables import TableBuilder
from galvatron_jax.search.work import Computation, Work

_NEAR = 1.03
"""Drafts slower than the best plan by no more than this are worth improving."""
_IMPROVED = 3
"""Drafts improved at most, the fastest."""
_SPARINGS = 4
"""Times that a problem is solved, with ever less of the budget, until its program fits."""
_CLOSING = 0.3
"""Part of the time left that exact solutions may take before drafts are improved."""
_SLACK = 1e-3
"""Of a bound by stand-ins: some option may be a little faster than the plain ones that it is made of."""
_GROWTH = 1.25
"""From one budget to the next, where none fits the one given."""


@dataclass(frozen=True)
class _Cell:
    """One layout and number of micro-batches."""

    about_s: float
    """What a good plan of it takes, about."""
    index: int
    """Of the layout."""
    count: int
    work: Work | None

    def least_s(self, pipelining: Pipelining) -> float:
        """Seconds that no plan of it with this schedule undercuts."""
        return 0.0 if self.work is None else self.work.least_s(pipelining)


@dataclass(frozen=True, eq=False)
class _Drafted:
    """Problems that may hold the best plan."""

    variants: Variants
    bound_s: float
    """Whatever is spared of the budget."""
    best: PipelineBest | None = None
    """A good solution of one of them."""

    @property
    def seconds(self) -> float:
        """Of the good solution."""
        return math.inf if self.best is None else self.best.solution.seconds


@dataclass
class _Spared:
    """How much of the budget is spared for a program of unlike groups: between too little and too much."""

    now: int = 0
    too_little: int = 0
    too_much: float = math.inf

    def next(self, over_bytes: int) -> bool:
        """Goes on where a program was over the budget, or with 0 where there was none; whether there is more to try."""
        if over_bytes:
            self.too_little = self.now
        else:
            self.too_much = self.now
        wanted = self.now + over_bytes
        if not over_bytes or wanted >= self.too_much:
            wanted = int((self.too_little + self.too_much) / 2)
        self.now, before = wanted, self.now
        return wanted != before and self.too_much > 0


@dataclass(eq=False)
class _Tables:
    """The layers of one layout: in full, and with stand-ins."""

    costs: CostModel
    space: SearchSpace
    effort: Effort
    bounds: bool
    """Whether to bound by stand-ins before anything is priced in full."""

    @cached_property
    def whole(self) -> PipelineBuilder:
        """Builds pipelines of layers in full."""
        return PipelineBuilder(TableBuilder(self.costs, self.space, self.effort.pruned))

    @property
    def worth_bounding(self) -> bool:
        """Whether there is still something to spare: one set of plans serves all micro-batches."""
        return self.bounds and not self.whole.tables.priced()[0]

    @cached_property
    def bounding(self) -> PipelineBuilder:
        """Builds pipelines that bound those."""
        return PipelineBuilder(self._stand_ins)

    @cached_property
    def _stand_ins(self) -> BoundingTables:
        return BoundingTables(self.costs, self.space)

    def count(self) -> None:
        """Adds what was done."""
        tables = self.whole.tables
        self.effort.planned += self.costs.table.planned
        self.effort.count(tables)
        if self.bounds:
            self.effort.count(self._stand_ins, beside=tables)
            missing = self._stand_ins.unpriced().items()
            left = sum([count for key, count in missing if not tables.knows(*key)])
            self.effort.pruned.update({Rule.AXES_ON_DEMAND: left} if left else {})


@dataclass
class PipelineSearch:
    """Solves the pipelines of a search, in three rounds.

    First every problem that its bound does not settle is drafted, the most promising layout and number of
    micro-batches first; then what is still open is solved exactly, if it can be; where it cannot, the best drafts are
    improved, and what was short of time, or has less to beat by then, is tried again.
    """

    global_batch: int
    memory_bytes: int
    space: SearchSpace
    effort: Effort
    deadline: float | None = None
    progress: Progress | None = None
    _upper_s: float = math.inf
    _found: list[PipelineBest] = field(default_factory=list)
    _known: Known = field(default_factory=Known, repr=False)
    _drafted: list[_Drafted] = field(default_factory=list, repr=False)

    def run(self, models: Sequence[tuple[Layout, CostModel]], upper_s: float) -> list[PipelineBest]:
        """Ever faster solutions that fit and beat `upper_s`; the last is the best.

        What is not proven is noted as the least bound that is still open.
        """
        self.draft(models, upper_s)
        return self.close(upper_s)

    @property
    def upper_s(self) -> float:
        """Seconds of the best plan known."""
        return self._upper_s

    def draft(self, models: Sequence[tuple[Layout, CostModel]], upper_s: float) -> None:
        """The first round: good solutions, and bounds of the others."""
        self._upper_s = min(upper_s, self._upper_s)
        on_demand = stand_ins.on_demand(self.space, [costs for _, costs in models])
        tables = [_Tables(costs, self.space, self.effort, on_demand) for _, costs in models]
        cells = self._cells(models)
        for step, cell in enumerate(cells):
            layout = models[cell.index][0]
            pipelinings = self._pipelinings(layout, cell, len(models[cell.index][1].model.layers))
            if self._late():
                self.effort.leave_open(min(map(cell.least_s, pipelinings), default=math.inf))
                continue
            if self.progress is not None and pipelinings:
                self.progress(step, len(cells), f"planning {layout.degree} stages with {cell.count} micro-batches")
            here, effort = tables[cell.index], self.effort
            if here.worth_bounding and math.isfinite(self._upper_s):
                bounds = self._problems(here.bounding, layout, cell.count, pipelinings, effort, slack=_SLACK)
                pipelinings, effort = self._undercutting(pipelinings, bounds), Effort()
            self._drafted += self._draft(self._problems(here.whole, layout, cell.count, pipelinings, effort))
        for each in tables:
            each.count()

    def close(self, upper_s: float) -> list[PipelineBest]:
        """The other rounds, when something is known that takes `upper_s`. Returns what `run` does."""
        self._upper_s = min(upper_s, self._upper_s)
        deadline, now = self.deadline, time.monotonic()
        if deadline is not None:
            self.deadline = now + (deadline - now) * _CLOSING
        left = self._close(self._drafted)
        late, self.deadline = self._late(), deadline
        before = self._upper_s
        if any(map(self._promising, left.values())):
            self._improve(self._drafted)
            if late or self._upper_s < before:
                left = self._close(left)
        for bound in left.values():
            self.effort.leave_open(bound)
        return self._found

    def _cells(self, models: Sequence[tuple[Layout, CostModel]]) -> list[_Cell]:
        """The most promising first."""
        counts, found = self.space.microbatch_counts(self.global_batch), []
        computation = Computation.of(models[0][1], self.space, self.global_batch) if models else None
        if not self.space.applies(Rule.WORK):
            computation = None
        for index, (layout, _) in enumerate(models):
            for count in counts:
                work = computation.work(layout.stage_axes, count) if computation else None
                found.append(_Cell(work.even_s(layout.degree) if work else 0.0, index, count, work))
        return sorted(found, key=lambda cell: (cell.about_s, cell.index, cell.count))

    def _pipelinings(self, layout: Layout, cell: _Cell, layers: int) -> list[Pipelining]:
        """The schedules of a cell that may hold the best plan."""
        every = [one for one in schedules_of(layout, self.space) if one.num_stages <= layers]
        upper = self._upper_s * (1 - TOLERANCE)
        found = [one for one in every if cell.work is None or cell.work.undercuts(one, upper)]
        self.effort.pruned[Rule.WORK] += len(every) - len(found)
        return found

    def _undercutting(
        self, pipelinings: list[Pipelining], bounds: Sequence[tuple[Variants, PipelineSolver]]
    ) -> list[Pipelining]:
        """The schedules that may hold the best plan by problems that bound it."""
        upper = self._upper_s * (1 + _SLACK)
        found = {v.each[0].pipelining for v, solver in bounds if self._promising(solver.bound(upper), slack=_SLACK)}
        return [one for one in pipelinings if one in found]

    def _promising(self, bound_s: float, *, slack: float = 0.0) -> bool:
        return bound_s < self._upper_s * (1 - TOLERANCE) * (1 + slack)

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _offer(self, problem: PipelineProblem, solution: PipelineSolution | None) -> int:
        """Takes a solution if it is the fastest so far and fits. Returns the bytes that it is over the budget by."""
        if solution is None or solution.seconds >= self._upper_s:
            return 0
        over = 0
        if self.space.applies(Rule.ONE_PROGRAM):
            over = problem.peak_bytes(solution) - self.memory_bytes
        if over <= 0:
            self._upper_s = solution.seconds
            self._found.append(PipelineBest(problem, solution))
        return max(over, 0)

    # ------------------------------------------------------------------------------------------ rounds

    def _problems(
        self,
        builder: PipelineBuilder,
        layout: Layout,
        count: int,
        pipelinings: list[Pipelining],
        effort: Effort,
        *,
        slack: float = 0.0,
    ) -> list[tuple[Variants, PipelineSolver]]:
        """Some schedules with all batch layouts, the lowest bound first."""
        found, every = [], batch_axes_for(layout.stage_axes, self.global_batch // count)
        if self.space.applies(Rule.BATCH_AXES) and pipelinings:
            effort.pruned[Rule.BATCH_AXES] += len(pipelinings) * (len(every) - 1)
            every = every[:1]
        for pipelining in pipelinings:
            for axes in every:
                batching = Batching(self.global_batch, count, axes)
                pipelines = tuple(builder.build(pipelining, batching))
                effort.problems += len(pipelines)
                if not pipelines:
                    continue
                relaxed = together(pipelines)
                solver = self._solver(relaxed) if self._promising(self._work(relaxed), slack=slack) else None
                if solver is not None:
                    each = sorted(pipelines, key=self._work) if len(pipelines) > 1 else pipelines
                    problems = tuple(PipelineProblem(builder, pipelining, batching, pipeline) for pipeline in each)
                    found.append((Variants(problems, relaxed), solver))
        return sorted(found, key=lambda pair: pair[1].bound_s)

    def _work(self, pipeline: Pipeline) -> float:
        budget = self.memory_bytes - pipeline.fixed_bytes
        return seconds_of_work(pipeline, budget) if budget >= 0 else math.inf

    def _solver(self, pipeline: Pipeline, spare_bytes: int = 0) -> PipelineSolver | None:
        budget = self.memory_bytes - spare_bytes
        return PipelineSolver.of(pipeline, budget_bytes=budget, deadline=self.deadline, known=self._known)

    def _draft(self, problems: list[tuple[Variants, PipelineSolver]]) -> Iterator[_Drafted]:
        for variants, solver in problems:
            if not self._promising(solver.bound_s):
                continue
            self.effort.solved += 1
            bound = solver.bound(self._upper_s)
            if not self._promising(bound):
                continue
            best = None
            for problem in variants.each:
                # They have much the same plans: one draft is enough.
                if best is None and not self._late():
                    best = self._fitting(problem, solver if problem.pipeline is variants.relaxed else None)
            yield _Drafted(variants, bound, best)

    def _fitting(self, problem: PipelineProblem, solver: PipelineSolver | None) -> PipelineBest | None:
        """A draft whose program fits, sparing as much of the budget as that takes."""
        spared = _Spared()
        for _ in range(_SPARINGS):
            problem = replace(problem, spare_bytes=spared.now)
            solver = solver or self._solver(problem.pipeline, spared.now)
            if solver is not None and not self._promising(solver.bound(self._upper_s)):
                break
            solution = None if solver is None else solver.draft() or solver.sketch(self._upper_s)
            self.effort.labels += solver.labels if solver is not None else 0
            over = self._offer(problem, solution)
            if solution is not None and not over:
                return PipelineBest(problem, solution)
            if not spared.next(over):
                break
            solver = None
        return None

    def _improve(self, drafted: list[_Drafted]) -> None:
        """Improves the fastest drafts."""
        better = []
        for one in sorted(drafted, key=lambda one: one.seconds)[:_IMPROVED]:
            near = one.seconds <= self._upper_s * _NEAR and self._promising(one.bound_s)
            if one.best is None or not near or self._late():
                continue
            problem = one.best.problem
            solver = self._solver(problem.pipeline, problem.spare_bytes)
            if solver is None:
                continue
            for solution in (solver.improve(one.best.solution, exact=False), solver.sketch(self._upper_s)):
                self._offer(problem, solution)
                if solution is not None:
                    better.append(replace(one, best=PipelineBest(problem, solution)))
        for one in sorted(better, key=lambda one: one.seconds)[:1]:
            if one.best is None or one.variants.is_large:
                continue
            solver = self._solver(one.best.problem.pipeline, one.best.problem.spare_bytes)
            if solver is not None and not self._late():
                self._offer(one.best.problem, solver.improve(one.best.solution))

    def _close(self, drafted: Iterable[_Drafted]) -> dict[_Drafted, float]:
        """Solves exactly what is still open: first what takes little time, of that and of the rest the lowest bound.

        Returns:
            What is left open, with seconds that no plan of it undercuts.
        """
        left = {}
        for one in sorted(drafted, key=lambda one: (one.variants.is_large, one.bound_s)):
            solver = self._solver(one.variants.relaxed) if self._promising(one.bound_s) else None
            if solver is None:
                continue
            bound = solver.bound(self._upper_s)
            if self._promising(bound):
                bound = bound if self._late() else self._solve_all(one.variants, solver)
                if math.isfinite(bound):
                    left[one] = bound
        return left

    def _solve_all(self, variants: Variants, solver: PipelineSolver) -> float:
        """Solves problems exactly, where together they leave room for something better.

        Args:
            variants: the problems.
            solver: of what they are together, with its bound.

        Returns:
            As `_solve`.
        """
        if len(variants.each) == 1:
            return self._solve(variants.each[0], solver)
        solution, left_open = solver.exact(self._upper_s)
        self.effort.labels += solver.labels
        least = min(left_open, math.inf if solution is None else solution.seconds)
        if math.isinf(least):
            return math.inf
        return min(max(least, self._solve(problem)) for problem in variants.each)

    def _solve(self, problem: PipelineProblem, solver: PipelineSolver | None = None) -> float:
        """Solves a problem exactly.

        Args:
            problem: the problem, nothing spared.
            solver: of it; None makes one.

        Returns:
            Seconds that no plan of it undercuts but the one found; infinite where that is the best.
        """
        solver = solver or self._solver(problem.pipeline)
        if solver is None or not self._promising(solver.bound(self._upper_s)):
            return math.inf
        solution, left_open = solver.exact(self._upper_s)
        self.effort.labels += solver.labels
        over = self._offer(problem, solution)
        if solution is None or not over:
            return left_open
        least = min(left_open, solution.seconds)
        if not problem.is_large:
            labels = solver.labels
            solution, left_open = solver.exact_as(problem.program(self.memory_bytes), self._upper_s)
            self.effort.labels += solver.labels - labels
            self._offer(problem, solution)
            if math.isinf(left_open):
                return math.inf
        self._solve_sparing(problem, over)
        return least

    def _solve_sparing(self, problem: PipelineProblem, over_bytes: int) -> None:
        """Solves a problem with ever more of the budget spared, until its program fits."""
        spared = _Spared()
        for _ in range(_SPARINGS):
            if not spared.next(over_bytes):
                return
            problem, over_bytes = replace(problem, spare_bytes=spared.now), 0
            solver = self._solver(problem.pipeline, spared.now)
            if solver is not None:
                if not self._promising(solver.bound(self._upper_s)):
                    return
                solution, _ = solver.exact(self._upper_s)
                self.effort.labels += solver.labels
                over_bytes = self._offer(problem, solution)
                if solution is None or not over_bytes:
                    return


def least_pipeline(
    models: Sequence[tuple[Layout, CostModel]], *, global_batch: int, memory_bytes: int, space: SearchSpace
) -> PipelineBest:
    """A pipeline that needs little memory: the best that fits once the budget has grown step by step."""
    budget = float(memory_bytes)
    while True:
        budget *= _GROWTH
        found = PipelineSearch(global_batch, int(budget), space, Effort()).run(models, math.inf)
        if found:
            return found[-1]
