"""All the pipelines of one search: every way to lay stages over the cluster, schedule and feed them; and the best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from galvatron_jax.cost.compute import Roofline
from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.pipeline import Pipelining
from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.partition import TOLERANCE, solve_pipeline
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution
from galvatron_jax.search.problems import Effort, Progress
from galvatron_jax.search.space import Rule, SearchSpace, batch_axes_for
from galvatron_jax.search.stages import PipelineBuilder
from galvatron_jax.search.tables import TableBuilder
from galvatron_jax.spec.plan import MeshAxis, Schedule
from galvatron_jax.spec.profile import Provenance
from galvatron_jax.spec.strategy import LayerStrategy

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
    for schedule in space.schedules:
        chunks = space.num_chunks if schedule is Schedule.INTERLEAVED else (1,)
        yield from (Pipelining(schedule, layout.pipeline_axes, count) for count in chunks)


@dataclass(frozen=True)
class Work:
    """The least computation of a step, by FLOPs at the rate of the roofline."""

    forward_s: float
    """Of a whole step, shared out evenly over all devices."""
    backward_s: float

    def seconds(self, pipelining: Pipelining, count: int) -> float:
        """Seconds of a step that no plan with this schedule undercuts.

        The bubble counts where an uneven load cannot make it smaller: each of the first stages that is given less
        than its share makes the slowest stage slower, and that is paid for in every micro-batch.
        """
        again = self.forward_s if pipelining.recomputes else 0.0
        busy = self.forward_s + self.backward_s + again
        degree = pipelining.degree
        enough = degree * sum(1 / k for k in range(1, degree)) - degree + 1
        if pipelining.num_chunks == 1 and count >= enough:
            return busy * (1 + (degree - 1) / count)
        # One micro-batch passes all stages one after another.
        return busy * max(1.0, degree / count)


def least_work(costs: CostModel, global_batch: int) -> Work | None:
    """The least computation of a step; None where times are measured, and small shapes may be the fastest."""
    if costs.provenance != Provenance.DERIVED:
        return None
    roofline, forward, backward = Roofline(costs.cluster.device), 0.0, 0.0
    for layer in costs.model.layers:
        kind, examples = costs.model.kinds[layer.kind], costs.model.microbatch
        plan = costs.table.planner.plan_layer(
            kind, LayerStrategy(), mesh={}, microbatch=examples, model_microbatch=examples
        )
        rate = roofline.peak(kind) * roofline.efficiency * examples / global_batch
        forward += plan.forward.flops / rate
        backward += plan.backward.flops / rate
    count = costs.cluster.num_devices
    return Work(forward / count, backward / count)


@dataclass
class PipelineSearch:
    """Solves the pipelines of a search, the most promising layout and number of micro-batches first."""

    global_batch: int
    memory_bytes: int
    space: SearchSpace
    effort: Effort
    deadline: float | None = None
    progress: Progress | None = None

    def run(self, models: Sequence[tuple[Layout, CostModel]], upper_s: float) -> list[PipelineBest]:
        """Ever faster solutions that fit and beat `upper_s`; the last is the best.

        What is not proven is noted as the least bound that is still open.
        """
        counts = self.space.microbatch_counts(self.global_batch)
        work = least_work(models[0][1], self.global_batch) if models else None
        if not self.space.applies(Rule.WORK):
            work = None
        builders = [PipelineBuilder(TableBuilder(costs, self.space, self.effort.pruned)) for _, costs in models]
        cells = [
            (self._bound(layout, count, work), index, count)
            for index, (layout, _) in enumerate(models)
            for count in counts
        ]
        found: list[PipelineBest] = []
        for step, (bound, index, count) in enumerate(sorted(cells)):
            layout = models[index][0]
            if bound >= upper_s * (1 - TOLERANCE):
                self.effort.pruned[Rule.WORK] += len(cells) - step
                break
            if self.deadline is not None and time.monotonic() > self.deadline:
                self.effort.leave_open(bound)
                break
            if self.progress is not None:
                self.progress(step, len(cells), f"planning {layout.degree} stages with {count} micro-batches")
            better = self._cell(builders[index], layout, count, work, upper_s)
            if better:
                found += better
                upper_s = better[-1].solution.seconds
        self._count(builders)
        return found

    def _bound(self, layout: Layout, count: int, work: Work | None) -> float:
        return min((work.seconds(p, count) if work else 0.0 for p in schedules_of(layout, self.space)), default=0.0)

    def _cell(
        self, builder: PipelineBuilder, layout: Layout, count: int, work: Work | None, upper_s: float
    ) -> list[PipelineBest]:
        """All schedules and batch layouts of one layout and number of micro-batches."""
        layers = len(builder.tables.costs.model.layers)
        problems = []
        for pipelining in schedules_of(layout, self.space):
            if pipelining.num_stages > layers:
                continue
            if work is not None and work.seconds(pipelining, count) >= upper_s * (1 - TOLERANCE):
                self.effort.pruned[Rule.WORK] += 1
                continue
            for axes in batch_axes_for(layout.stage_axes, self.global_batch // count):
                problems += self._problems(builder, pipelining, Batching(self.global_batch, count, axes))
        self.effort.problems += len(problems)
        return self._solve(sorted(problems, key=lambda problem: problem.bound_s), upper_s)

    def _problems(
        self, builder: PipelineBuilder, pipelining: Pipelining, batching: Batching
    ) -> Iterator[PipelineProblem]:
        for pipeline in builder.build(pipelining, batching):
            room = self.memory_bytes - pipeline.fixed_bytes
            bound = Bounds.of(pipeline, room).seconds() if room > 0 else math.inf
            if math.isfinite(bound):
                yield PipelineProblem(builder, pipelining, batching, pipeline, bound)

    def _solve(self, problems: list[PipelineProblem], upper_s: float) -> list[PipelineBest]:
        found: list[PipelineBest] = []
        for problem in problems:
            if problem.bound_s >= upper_s * (1 - TOLERANCE):
                break
            outcome = solve_pipeline(
                problem.pipeline, budget_bytes=self.memory_bytes, upper_s=upper_s, deadline=self.deadline
            )
            self.effort.solved += 1
            self.effort.labels += outcome.labels
            self.effort.leave_open(outcome.bound_s)
            if outcome.solution is not None:
                upper_s = outcome.solution.seconds
                found.append(PipelineBest(problem, outcome.solution))
        return found

    def _count(self, builders: Sequence[PipelineBuilder]) -> None:
        for builder in builders:
            self.effort.planned += builder.tables.costs.table.planned
            self.effort.priced += builder.tables.priced
            self.effort.estimated += builder.tables.estimated


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
