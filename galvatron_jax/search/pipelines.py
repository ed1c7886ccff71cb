"""All the pipelines of one search: every way to lay stages over the cluster, schedule and feed them; and the best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.pipeline import Pipelining, predict_pipeline
from galvatron_jax.search.bounds import seconds_of_work
from galvatron_jax.search.minima import Known
from galvatron_jax.search.partition import TOLERANCE, PipelineSolver
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, evaluate
from galvatron_jax.search.problems import Effort, Progress
from galvatron_jax.search.space import Rule, SearchSpace, batch_axes_for
from galvatron_jax.search.stages import PipelineBuilder
from galvatron_jax.search.tables import TableBuilder
from galvatron_jax.search.work import Computation, Work
from galvatron_jax.spec.plan import MeshAxis, Schedule
from galvatron_jax.spec.strategy import LayerStrategy

_NEAR = 1.03
"""Drafts slower than the best plan by no more than this are worth improving."""
_IMPROVED = 3
"""Drafts improved at most, the fastest."""
_THOROUGH = 4000
"""Options of all layers together up to which the best draft is improved as far as it goes, for more takes seconds and
gains some thousandths of a percent; and up to which problems are solved exactly though another one is left open. With
96 layers on 1024 devices that was two thirds of a search, and found nothing better."""
_SPARINGS = 4
"""Times that a problem is solved, with ever less of the budget, until its program fits."""
_GROWTH = 1.25
"""From one budget to the next, where none fits the one given."""


@dataclass(frozen=True, eq=False)
class PipelineProblem:
    """One pipeline, with what it was made from."""

    builder: PipelineBuilder
    pipelining: Pipelining
    batching: Batching
    pipeline: Pipeline
    bound_s: float
    """No plan of it that fits takes less."""
    spare_bytes: int = 0
    """Of the budget, not for a group's own stages: one program serves all groups, and holds the most of each part that
    any of them needs."""

    @property
    def costs(self) -> CostModel:
        """Prices of its options."""
        return self.builder.tables.costs

    def strategies(self, solution: PipelineSolution) -> tuple[LayerStrategy, ...]:
        """One strategy per layer."""
        stops = (*solution.starts[1:], len(self.pipeline.layers))
        return tuple(
            self.pipeline.options(layer, start).strategies[solution.options[layer]]
            for start, stop in zip(solution.starts, stops, strict=True)
            for layer in range(start, stop)
        )

    def peak_bytes(self, solution: PipelineSolution) -> int:
        """What the program of a solution needs on every device; see `MemoryBreakdown.peak_bytes`."""
        prediction = predict_pipeline(
            self.costs,
            self.pipelining,
            solution.starts,
            self.strategies(solution),
            self.batching,
            memory_bytes=None,
        )
        return prediction.peak_bytes

    def own_bytes(self, solution: PipelineSolution) -> list[int]:
        """What each group's own stages need, without room for others' micro-batches in flight."""
        exact = evaluate(replace(self.pipeline, slots_alike=False), solution.starts, solution.options)
        return [size + self.pipeline.fixed_bytes for size in exact.bytes]


@dataclass(frozen=True)
class PipelineBest:
    """A solution of a pipeline."""

    problem: PipelineProblem
    solution: PipelineSolution


@dataclass(frozen=True)
class Layout:
    """How a mesh is shared between stages and what lies inside them."""

    pipeline_axes: tuple[MeshAxis, ...]
    stage_axes: tuple[MeshAxis, ...]

    @property
    def degree(self) -> int:
        """Groups of devices."""
        return Pipelining(Schedule.ONE_F_ONE_B, self.pipeline_axes).degree


def layouts_of(meshes: tuple[tuple[MeshAxis, ...], ...], space: SearchSpace) -> tuple[Layout, ...]:
    """Every way to lay stages along the first axes of a mesh, slowest links first; those that look alike once."""
    found: dict[tuple, Layout] = {}
    for mesh in meshes:
        for cut in range(1, len(mesh) + 1):
            layout = Layout(mesh[:cut], mesh[cut:])
            if space.pipeline_degrees is not None and layout.degree not in space.pipeline_degrees:
                continue
            links = sorted((axis.size, axis.level) for axis in layout.pipeline_axes)
            found.setdefault((tuple(links), tuple((axis.size, axis.level) for axis in layout.stage_axes)), layout)
    return tuple(found.values())


def schedules_of(layout: Layout, space: SearchSpace) -> Iterator[Pipelining]:
    """The schedules to try, interleaved ones once for each number of chunks."""
    beaten = {Schedule.GPIPE} if Schedule.ONE_F_ONE_B_STASH in space.schedules and space.applies(Rule.GPIPE) else set()
    for schedule in space.schedules:
        if schedule in beaten:
            continue
        chunks = space.num_chunks if schedule is Schedule.INTERLEAVED else (1,)
        yield from (Pipelining(schedule, layout.pipeline_axes, count) for count in chunks)


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


@dataclass(frozen=True)
class _Drafted:
    """A problem that may hold the best plan."""

    problem: PipelineProblem
    bound_s: float
    """Whatever is spared of the budget."""
    solution: PipelineSolution | None
    """A good one."""

    @property
    def seconds(self) -> float:
        """Of the solution."""
        return math.inf if self.solution is None else self.solution.seconds


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


@dataclass
class PipelineSearch:
    """Solves the pipelines of a search, in three rounds.

    First every problem that its bound does not settle is drafted, the most promising layout and number of
    micro-batches first; then the best drafts are improved; then what is still open is solved exactly, if it can be.
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
        builders = [PipelineBuilder(TableBuilder(costs, self.space, self.effort.pruned)) for _, costs in models]
        cells = self._cells(models)
        for step, cell in enumerate(cells):
            layout = models[cell.index][0]
            pipelinings = self._pipelinings(layout, cell, len(models[cell.index][1].model.layers))
            if self._late():
                self.effort.leave_open(min(map(cell.least_s, pipelinings), default=math.inf))
                continue
            if self.progress is not None and pipelinings:
                self.progress(step, len(cells), f"planning {layout.degree} stages with {cell.count} micro-batches")
            self._drafted += self._draft(self._problems(builders[cell.index], layout, cell.count, pipelinings))
        self._count(builders)

    def close(self, upper_s: float) -> list[PipelineBest]:
        """The other rounds, when something is known that takes `upper_s`. Returns what `run` does."""
        self._upper_s = min(upper_s, self._upper_s)
        self._improve(self._drafted)
        self._close(self._drafted)
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

    def _promising(self, bound_s: float) -> bool:
        return bound_s < self._upper_s * (1 - TOLERANCE)

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
        self, builder: PipelineBuilder, layout: Layout, count: int, pipelinings: list[Pipelining]
    ) -> list[tuple[PipelineProblem, PipelineSolver]]:
        """Some schedules with all batch layouts, the lowest bound first."""
        found, every = [], batch_axes_for(layout.stage_axes, self.global_batch // count)
        if self.space.applies(Rule.BATCH_AXES) and pipelinings:
            self.effort.pruned[Rule.BATCH_AXES] += len(pipelinings) * (len(every) - 1)
            every = every[:1]
        for pipelining in pipelinings:
            for axes in every:
                batching = Batching(self.global_batch, count, axes)
                for pipeline in builder.build(pipelining, batching):
                    self.effort.problems += 1
                    solver = self._solver(pipeline) if self._promising(self._work(pipeline)) else None
                    if solver is not None:
                        problem = PipelineProblem(builder, pipelining, batching, pipeline, solver.bound_s)
                        found.append((problem, solver))
        return sorted(found, key=lambda pair: pair[0].bound_s)

    def _work(self, pipeline: Pipeline) -> float:
        budget = self.memory_bytes - pipeline.fixed_bytes
        return seconds_of_work(pipeline, budget) if budget >= 0 else math.inf

    def _solver(self, pipeline: Pipeline, spare_bytes: int = 0) -> PipelineSolver | None:
        budget = self.memory_bytes - spare_bytes
        return PipelineSolver.of(pipeline, budget_bytes=budget, deadline=self.deadline, known=self._known)

    def _draft(self, problems: list[tuple[PipelineProblem, PipelineSolver]]) -> Iterator[_Drafted]:
        seen: set[tuple] = set()
        for problem, solver in problems:
            if not self._promising(problem.bound_s):
                continue
            self.effort.solved += 1
            bound = solver.bound(self._upper_s)
            if not self._promising(bound):
                continue
            # Problems that differ in the layouts of tied parameters have much the same plans: one draft is enough.
            key = (problem.pipelining, problem.batching)
            drafted = _Drafted(problem, bound, None)
            if key not in seen and not self._late():
                drafted = self._fitting(problem, solver, bound)
                seen |= {key} if drafted.solution is not None else set()
            yield drafted

    def _fitting(self, problem: PipelineProblem, solver: PipelineSolver | None, bound_s: float) -> _Drafted:
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
                return _Drafted(problem, bound_s, solution)
            if not spared.next(over):
                break
            solver = None
        return _Drafted(problem, bound_s, None)

    def _improve(self, drafted: list[_Drafted]) -> None:
        """Improves the fastest drafts, of those that differ in the layouts of tied parameters one."""
        best: dict[tuple, _Drafted] = {}
        for one in sorted(drafted, key=lambda one: one.seconds):
            best.setdefault((one.problem.pipelining, one.problem.batching), one)
        better = []
        for one in list(best.values())[:_IMPROVED]:
            solver = self._solver(one.problem.pipeline, one.problem.spare_bytes)
            near = one.seconds <= self._upper_s * _NEAR and self._promising(one.bound_s)
            if solver is None or one.solution is None or not near or self._late():
                continue
            found = [solver.improve(one.solution, exact=False), solver.sketch(self._upper_s)]
            for solution in found:
                self._offer(one.problem, solution)
                if solution is not None:
                    better.append(replace(one, solution=solution))
        for one in sorted(better, key=lambda one: one.seconds)[:1]:
            pipeline = one.problem.pipeline
            if _is_large(pipeline):
                continue
            solver = self._solver(pipeline, one.problem.spare_bytes)
            if solver is not None and one.solution is not None and not self._late():
                self._offer(one.problem, solver.improve(one.solution))

    def _close(self, drafted: list[_Drafted]) -> None:
        """Solves exactly what is still open, the lowest bound first.

        Once one was left open, solving others proves nothing more; large ones, which take seconds, are left as well.
        """
        for one in sorted(drafted, key=lambda one: one.bound_s):
            if not self._promising(one.bound_s):
                break
            solver = self._solver(one.problem.pipeline)
            if solver is None:
                continue
            bound = solver.bound(self._upper_s)
            if self._promising(bound):
                vain = _is_large(one.problem.pipeline) and self.effort.open_s <= bound
                self.effort.leave_open(bound if vain or self._late() else self._solve(one.problem, bound))

    def _solve(self, problem: PipelineProblem, bound_s: float) -> float:
        """Solves a problem exactly, sparing ever more of the budget until its program fits.

        Returns:
            Seconds that no plan of it undercuts but the one found; infinite where that is the best.
        """
        left_open = bound_s if problem.spare_bytes else math.inf
        spared = _Spared(problem.spare_bytes)
        for _ in range(_SPARINGS):
            problem = replace(problem, spare_bytes=spared.now)
            solver = self._solver(problem.pipeline, spared.now)
            over = 0
            if solver is not None:
                if not self._promising(solver.bound(self._upper_s)):
                    break
                solution, bound = solver.exact(self._upper_s)
                self.effort.labels += solver.labels
                over = self._offer(problem, solution)
                left_open = min(left_open, bound)
                if solution is None or not over:
                    break
                left_open = min(left_open, solution.seconds)
            if not spared.next(over):
                break
        return left_open

    def _count(self, builders: Sequence[PipelineBuilder]) -> None:
        for builder in builders:
            self.effort.planned += builder.tables.costs.table.planned
            self.effort.priced += builder.tables.priced
            self.effort.estimated += builder.tables.estimated


def _is_large(pipeline: Pipeline) -> bool:
    return sum(map(len, pipeline.layers)) > _THOROUGH


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
