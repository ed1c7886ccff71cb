"""The pipelines of a search: ways to lay stages over a mesh, and the problems that they pose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.pipeline import Pipelining, predict_pipeline
from galvatron_jax.search.ledgers import Program
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, evaluate
from galvatron_jax.search.space import Rule, SearchSpace
from galvatron_jax.search.stages import PipelineBuilder
from galvatron_jax.spec.plan import MeshAxis, Schedule
from galvatron_jax.spec.strategy import LayerStrategy

_LARGE = 4000
"""Options of all layers together from which on solving a problem exactly takes seconds."""


@dataclass(frozen=True, eq=False)
class PipelineProblem:
    """One pipeline, with what it was made from."""

    builder: PipelineBuilder
    pipelining: Pipelining
    batching: Batching
    pipeline: Pipeline
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

    def program(self, memory_bytes: int) -> Program:
        """What its program may hold, with a budget for everything."""
        unread = np.array(self.builder.tables.unread_bytes(), float)
        return Program(memory_bytes - self.pipeline.fixed_bytes, unread)

    @property
    def is_large(self) -> bool:
        """Whether solving it exactly takes seconds."""
        return is_large(self.pipeline)

    def own_bytes(self, solution: PipelineSolution) -> list[int]:
        """What each group's own stages need, without room for others' micro-batches in flight."""
        exact = evaluate(replace(self.pipeline, slots_alike=False), solution.starts, solution.options)
        return [size + self.pipeline.fixed_bytes for size in exact.bytes]


@dataclass(frozen=True, eq=False)
class Variants:
    """Problems that differ in the layouts of tied parameters alone."""

    each: tuple[PipelineProblem, ...]
    """The most promising first."""
    relaxed: Pipeline
    """No plan of any of them beats its best one."""

    @property
    def is_large(self) -> bool:
        """Whether solving them exactly takes seconds."""
        return is_large(self.relaxed)


def is_large(pipeline: Pipeline) -> bool:
    """Whether solving a problem exactly takes seconds."""
    return sum(map(len, pipeline.layers)) > _LARGE


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
