"""Runs: consecutive layers of one kind and one strategy, and how values pass through them.

A run of several layers is one loop in the program, so compile time does not grow with depth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from galvatron_jax.partition.boundary import home_spec
from galvatron_jax.partition.layer_plan import BoundarySpec
from galvatron_jax.partition.layers import LocalPlan, plan_local
from galvatron_jax.spec.model import ModelSpec, PortRole
from galvatron_jax.spec.plan import Plan
from galvatron_jax.trace.model import Traced


class Way(Enum):
    """How an input port of a run gets its values."""

    SHARED = "shared"
    """One value for all layers."""
    CARRY = "carry"
    """Each layer's from the layer before."""
    STACKED = "stacked"
    """One value per layer, all from outside the run."""


@dataclass(frozen=True)
class InputWay:
    """An input port of a run."""

    way: Way
    references: tuple[str, ...]
    """Per layer; for a carry, the first layer's alone comes from outside."""
    output: int = -1
    """For a carry, the output port of the layer before."""


@dataclass(frozen=True)
class Run:
    """Consecutive layers that one program serves."""

    start: int
    stop: int
    kind: int
    local: LocalPlan
    inputs: tuple[InputWay, ...]
    outputs: tuple[tuple[str, ...], ...]
    """Per output port and layer, its reference."""
    read_outside: tuple[bool, ...]
    """Per output port, whether something beyond the next layer of the run reads it."""

    @property
    def length(self) -> int:
        """Number of layers."""
        return self.stop - self.start


@dataclass(frozen=True)
class Layouts:
    """How every value that crosses layers is laid out while it waits for its readers."""

    mesh: Mapping[str, int]
    specs: Mapping[str, BoundarySpec]
    """Per reference."""
    shapes: Mapping[str, tuple[int, ...]]
    """Whole shape per reference."""


def mesh_sizes(plan: Plan) -> dict[str, int]:
    """Axes over which each stage is spread, with their sizes, slowest link first."""
    return {axis.name: axis.size for axis in plan.stage_mesh}


def stage_ranges(plan: Plan) -> list[tuple[int, int]]:
    """Per stage, its first layer and the one after its last."""
    return [(stage.groups[0].start, stage.groups[-1].stop) for stage in plan.stages]


def make_runs(traced: Traced, plan: Plan) -> tuple[list[list[Run]], Layouts]:
    """Groups the layers of each stage into runs and lays out what passes between them."""
    spec, mesh = traced.spec, mesh_sizes(plan)
    strategies = plan.strategies
    locals_ = [
        plan_local(
            spec.kinds[layer.kind],
            strategy,
            mesh=mesh,
            microbatch=spec.microbatch,
            model_microbatch=spec.microbatch,
            gradient_sum_dtype=plan.gradient_sum_dtype,
        )
        for layer, strategy in zip(spec.layers, strategies, strict=True)
    ]
    layouts = _layouts(traced, plan, locals_)
    readers = _readers(spec)
    stages = []
    for first, end in stage_ranges(plan):
        runs: list[Run] = []
        start = first
        while start < end:
            stop = start + 1
            while (
                stop < end
                and spec.layers[stop].kind == spec.layers[start].kind
                and strategies[stop] == strategies[start]
            ):
                stop += 1
            runs += _runs_of(spec, locals_, start, stop, readers, layouts)
            start = stop
        stages.append(runs)
    return stages, layouts


def loop_of(spec: ModelSpec, local: LocalPlan, *, kind: int, length: int) -> Run | None:
    """The first layers of a kind that follow one another, as one run; None where there are none, or no loop can follow.

    Args:
        spec: the model.
        local: the kind's local program.
        kind: its number.
        length: how many layers.
    """
    kinds = [layer.kind for layer in spec.layers]
    starts = (i for i in range(len(kinds) - length + 1) if kinds[i : i + length] == [kind] * length)
    start = next(starts, None)
    run = None if start is None else _run(spec, local, start, start + length, _readers(spec))
    if run is None:
        return None
    ways = [(port, way) for port, way in enumerate(run.inputs) if way.way is Way.CARRY]
    return run if ways and all(local.input_spec(p) == local.output_spec(way.output) for p, way in ways) else None


def _runs_of(
    spec: ModelSpec,
    locals_: Sequence[LocalPlan],
    start: int,
    stop: int,
    readers: Mapping[str, set[int]],
    layouts: Layouts,
) -> list[Run]:
    """One run of these like layers, or one for each where a loop cannot follow them."""
    run = _run(spec, locals_[start], start, stop, readers)
    if run is not None and _loops(run, layouts):
        return [run]
    singles = [_run(spec, locals_[i], i, i + 1, readers) for i in range(start, stop)]
    return [single for single in singles if single is not None]


def _readers(spec: ModelSpec) -> dict[str, set[int]]:
    readers: dict[str, set[int]] = defaultdict(set)
    for index, layer in enumerate(spec.layers):
        for reference in layer.inputs:
            readers[reference].add(index)
    for _, reference in spec.results:
        readers[reference].add(len(spec.layers))
    return readers


def _run(spec: ModelSpec, local: LocalPlan, start: int, stop: int, readers: Mapping[str, set[int]]) -> Run | None:
    """The run of these layers, or None when values pass in a way that a loop cannot follow."""
    layers = spec.layers[start:stop]
    made = {reference for layer in layers for reference in layer.outputs}
    inputs = []
    for port in range(len(layers[0].inputs)):
        way = _input_way([layer.inputs[port] for layer in layers], [layer.outputs for layer in layers], made)
        if way is None:
            return None
        inputs.append(way)
    outputs = tuple(tuple(layer.outputs[port] for layer in layers) for port in range(len(layers[0].outputs)))
    carried = {way.output for way in inputs if way.way is Way.CARRY}
    outside = tuple(
        any(
            bool(readers[reference] - ({start + offset + 1} if port in carried and offset < len(layers) - 1 else set()))
            for offset, reference in enumerate(references)
        )
        for port, references in enumerate(outputs)
    )
    return Run(start, stop, spec.layers[start].kind, local, tuple(inputs), outputs, outside)


def _input_way(references: Sequence[str], outputs: Sequence[tuple[str, ...]], made: set[str]) -> InputWay | None:
    if len(references) > 1:
        for port, reference in enumerate(outputs[0]):
            if reference == references[1]:
                if all(references[i] == outputs[i - 1][port] for i in range(1, len(references))):
                    return InputWay(Way.CARRY, tuple(references), port)
                return None
    if any(r in made for r in references):
        return None
    if len(set(references)) == 1:
        return InputWay(Way.SHARED, tuple(references))
    return InputWay(Way.STACKED, tuple(references))


def _loops(run: Run, layouts: Layouts) -> bool:
    """Whether values carried within the run wait in the very layout in which the next layer wants them."""
    for port, way in enumerate(run.inputs):
        if way.way is Way.CARRY:
            wanted = run.local.input_spec(port)
            if any(layouts.specs[reference] != wanted for reference in run.outputs[way.output][:-1]):
                return False
    return True


def _layouts(traced: Traced, plan: Plan, locals_: Sequence[LocalPlan]) -> Layouts:
    """What only the next layer of the stage reads waits as its producer left it; all else in the plan-wide layout."""
    spec, mesh, readers = traced.spec, mesh_sizes(plan), _readers(traced.spec)
    cuts = {start for start, _ in stage_ranges(plan)}
    specs: dict[str, BoundarySpec] = {}
    shapes: dict[str, tuple[int, ...]] = {r: aval.shape for r, aval in traced.avals.items()}
    for reference, shape in shapes.items():
        if reference.startswith("batch:"):
            specs[reference] = home_spec(shape, 0, plan.batch_axes, mesh)
        elif reference.startswith("state:"):
            specs[reference] = ((),) * len(shape)
    for reference, array in traced.constants.items():
        shapes[reference] = tuple(getattr(array, "shape", ()))
        specs[reference] = ((),) * len(shapes[reference])
    for index, (layer, local) in enumerate(zip(spec.layers, locals_, strict=True)):
        for port, reference in enumerate(layer.outputs):
            if readers[reference] == {index + 1} and index + 1 < len(spec.layers) and index + 1 not in cuts:
                specs[reference] = local.output_spec(port)
            else:
                role = local.static.kind.outputs[port].role
                batch_dim = _batch_dim(local, local.static.kind.outputs[port].value)
                if role is not PortRole.ACTIVATION:
                    batch_dim = batch_dim if role is PortRole.AUX else None
                specs[reference] = home_spec(shapes[reference], batch_dim, plan.batch_axes, mesh)
    return Layouts(mesh, specs, shapes)


def _batch_dim(local: LocalPlan, value: int) -> int | None:
    """The dim that begins with the batch."""
    program = local.static.program
    for position, ascending in enumerate(program.ascending[value]):
        dim = program.dim_of[value][position]
        if ascending and (position == 0 or program.dim_of[value][position - 1] != dim):
            return dim
    return None
