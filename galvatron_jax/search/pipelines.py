"""All the pipelines of one search: every way to lay stages over the cluster, schedule them and feed them; the best."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.pipeline import Pipelining
from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.partition import TOLERANCE, solve_pipeline
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution
from galvatron_jax.search.problems import Effort, Progress
from galvatron_jax.search.space import SearchSpace, batch_axes_for
from galvatron_jax.search.stages import PipelineBuilder
from galvatron_jax.search.tables import Allowed, TableBuilder
from galvatron_jax.spec.plan import MeshAxis, Schedule
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


def pipeline_problems(
    builder: PipelineBuilder,
    layout: Layout,
    count: int,
    *,
    global_batch: int,
    memory_bytes: int,
    space: SearchSpace,
    allowed: Allowed | None = None,
) -> Iterator[PipelineProblem]:
    """The problems of one layout and number of micro-batches.

    Args:
        builder: of the layout's stage mesh.
        layout: where stages lie.
        count: micro-batches.
        global_batch: examples of a step.
        memory_bytes: budget per device.
        space: schedules and chunks to try.
        allowed: which strategies to use.
    """
    layers = len(builder.tables.costs.model.layers)
    for axes in batch_axes_for(layout.stage_axes, global_batch // count):
        batching = Batching(global_batch, count, axes)
        for pipelining in schedules_of(layout, space):
            if pipelining.num_stages > layers:
                continue
            for pipeline in builder.build(pipelining, batching, allowed):
                room = memory_bytes - pipeline.fixed_bytes
                bound = Bounds.of(pipeline, room).seconds() if room > 0 else float("inf")
                yield PipelineProblem(builder, pipelining, batching, pipeline, bound)


def schedules_of(layout: Layout, space: SearchSpace) -> Iterator[Pipelining]:
    """The schedules to try, interleaved ones once for each number of chunks."""
    for schedule in space.schedules:
        chunks = space.num_chunks if schedule is Schedule.INTERLEAVED else (1,)
        yield from (Pipelining(schedule, layout.pipeline_axes, count) for count in chunks)


def build_pipelines(
    models: list[tuple[Layout, CostModel]],
    *,
    global_batch: int,
    memory_bytes: int,
    space: SearchSpace,
    effort: Effort,
    progress: Progress | None,
) -> list[PipelineProblem]:
    """Every pipeline of a search, the one with the lowest bound first; those that never fit are left out."""
    counts = space.microbatch_counts(global_batch)
    found: list[PipelineProblem] = []
    for index, (layout, costs) in enumerate(models):
        tables = TableBuilder(costs, space, effort.pruned)
        builder = PipelineBuilder(tables)
        for step, count in enumerate(counts):
            if progress is not None:
                message = f"planning {layout.degree} stages with {count} micro-batches"
                progress(index * len(counts) + step, len(models) * len(counts), message)
            problems = pipeline_problems(
                builder, layout, count, global_batch=global_batch, memory_bytes=memory_bytes, space=space
            )
            every = list(problems)
            effort.problems += len(every)
            found += [problem for problem in every if problem.bound_s < float("inf")]
        effort.planned += costs.table.planned
        effort.priced += tables.priced
        effort.estimated += tables.estimated
    return sorted(found, key=lambda problem: problem.bound_s)


def fastest_pipeline(
    problems: list[PipelineProblem],
    *,
    memory_bytes: int,
    upper_s: float,
    effort: Effort,
    deadline: float | None = None,
) -> list[PipelineBest]:
    """Ever faster solutions that fit and beat `upper_s`, over problems sorted by bound; the last is the best.

    What was not proven is noted as the least bound that is still open.
    """
    found: list[PipelineBest] = []
    for problem in problems:
        if problem.bound_s >= upper_s * (1 - TOLERANCE):
            break
        if deadline is not None and time.monotonic() > deadline:
            effort.leave_open(problem.bound_s)
            break
        outcome = solve_pipeline(problem.pipeline, budget_bytes=memory_bytes, upper_s=upper_s, deadline=deadline)
        effort.solved += 1
        effort.labels += outcome.labels
        effort.leave_open(outcome.bound_s)
        if outcome.solution is not None:
            upper_s = outcome.solution.seconds
            found.append(PipelineBest(problem, outcome.solution))
    return found


def least_pipeline(
    models: list[tuple[Layout, CostModel]], *, global_batch: int, memory_bytes: int, space: SearchSpace
) -> PipelineBest:
    """A pipeline that needs little memory: the first that fits when the budget grows step by step."""
    budget = float(memory_bytes)
    while True:
        budget *= _GROWTH
        effort = Effort()
        problems = build_pipelines(
            models,
            global_batch=global_batch,
            memory_bytes=int(budget),
            space=space,
            effort=effort,
            progress=None,
        )
        found = fastest_pipeline(problems, memory_bytes=int(budget), upper_s=float("inf"), effort=effort)
        if found:
            return found[-1]
