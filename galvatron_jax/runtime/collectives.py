"""Collectives of a step three times over: as planned, as lowered, as compiled. What verification compares.

All three count one train step of one device, what stands in loops as often as the loops turn.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from galvatron_jax import _compat
from galvatron_jax.cost.schedules import WAYS
from galvatron_jax.cost.sizes import LINE
from galvatron_jax.partition.boundary import boundary_collectives
from galvatron_jax.partition.counts import collective
from galvatron_jax.partition.instructions import Convert, Instruction, Loop, Version, results_of
from galvatron_jax.partition.layer_plan import BoundarySpec, Collective, PhasePlan
from galvatron_jax.partition.layout import Step as LayoutStep
from galvatron_jax.partition.layout import StepKind
from galvatron_jax.partition.static import itemsize
from galvatron_jax.runtime.emit import needed_forward, still_to_do
from galvatron_jax.runtime.engine import handed_back_packing, received_packing
from galvatron_jax.runtime.execution import Executor, spec_of
from galvatron_jax.runtime.hlo import hlo_computations
from galvatron_jax.runtime.packing import Packing, Range, row_parts
from galvatron_jax.runtime.pipeline import PipelineStep
from galvatron_jax.runtime.program import StepProgram
from galvatron_jax.runtime.runs import Layouts, Run, Way
from galvatron_jax.runtime.stage import Stage, flows
from galvatron_jax.runtime.stage_optimizer import StageOptimizer
from galvatron_jax.runtime.step import Step
from galvatron_jax.runtime.storage import Group, Storage
from galvatron_jax.runtime.synchronise import joined_ties
from galvatron_jax.spec.model import PortRole
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.spec.program import Program, sum_dtype
from galvatron_jax.trace.model import Traced


@dataclass(frozen=True, order=True)
class CollectiveSignature:
    """What two collectives have in common that cost and mean the same."""

    kind: str
    """A `CollectiveKind`, or the name of an operation that no plan holds."""
    axes: tuple[str, ...]
    """Mesh axes of the group, in mesh order."""
    bytes: int
    """Of the operand on one device."""
    dtype: str
    """Of an element, as NumPy names it."""


Collectives = Counter[CollectiveSignature]


def bytes_by_group(collectives: Collectives) -> dict[tuple[str, tuple[str, ...]], int]:
    """Total operand bytes per kind and group: what combining collectives leaves as it is."""
    totals: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for signature, count in collectives.items():
        totals[signature.kind, signature.axes] += signature.bytes * count
    return dict(totals)


# ------------------------------------------------------------------------------------------------ as planned


def predicted_collectives(step: StepProgram, *, once: bool = False) -> Collectives:
    """The collectives that the plan holds; those by which an optimizer combines all parameters aside.

    Args:
        step: a step; nothing of it is traced.
        once: count what stands in a loop once, as the text of a program shows it.
    """
    if isinstance(step, PipelineStep):
        return _PipelinePrediction(step.traced, step.layouts, once).of(step)
    assert isinstance(step, Step)
    return _StepPrediction(step.traced, step.layouts, once).of(step)


@dataclass
class _Prediction:
    """Counts what executors do."""

    traced: Traced
    layouts: Layouts
    once: bool
    found: Collectives = field(default_factory=Counter)
    turns: int = 1
    """How often what is counted now runs in a step."""

    @property
    def specs(self) -> Mapping[str, BoundarySpec]:
        """How values wait."""
        return self.layouts.specs

    # -------------------------------------------------------------------------------------------- counting

    def add(self, collectives: Iterable[Collective], times: int = 1, *, stacked: int = 1) -> None:
        order = list(self.layouts.mesh)
        for one in collectives:
            size = one.bytes // one.group_size if one.kind is CollectiveKind.ALL_GATHER else one.bytes
            axes = tuple(sorted(one.axes, key=order.index))
            self.found[CollectiveSignature(one.kind.value, axes, size * stacked, one.dtype)] += times * self.turns

    def move(
        self, shape: Sequence[int], dtype: Any, source: BoundarySpec, target: BoundarySpec, times: int = 1
    ) -> None:
        if source != target:
            self.add(boundary_collectives(tuple(shape), str(dtype), source, target, mesh=self.layouts.mesh), times)

    def move_value(self, reference: str, source: BoundarySpec, target: BoundarySpec, times: int = 1) -> None:
        if source != target:
            self.move(self.layouts.shapes[reference], self.traced.avals[reference].dtype, source, target, times)

    def length(self, run: Run) -> int:
        return 1 if self.once else run.length

    def of_phase(
        self, run: Run, phase: PhasePlan, instructions: Sequence[Instruction] | None = None
    ) -> Sequence[Collective]:
        """Collectives of a phase, or of some of its instructions."""
        if instructions is None and not self.once:
            return phase.collectives
        chosen = phase.instructions if instructions is None else instructions
        return list(_in_text(chosen, run.local.static.program.program, self.once))

    # -------------------------------------------------------------------------------------------- one micro-batch

    def all_forward(self, executor: Executor, *, residuals_only: bool = False) -> None:
        """All layers of an executor."""
        for number, run in enumerate(executor.runs):
            self.forward(executor.storage, number, run, executor.read_here(number) if residuals_only else None)

    def all_backward(
        self, executor: Executor, cotangents: set[str], *, at_once: bool = True, residuals_only: bool = False
    ) -> None:
        """The same backward, from the references that have a cotangent.

        Args:
            executor: whose layers.
            cotangents: references.
            at_once: whether forward came right before, so that the last layer does nothing of it again.
            residuals_only: whether that forward made only what backward needs.
        """
        last = len(executor.runs) - 1
        for number, run in reversed(list(enumerate(executor.runs))):
            made = frozenset[Version]()
            if at_once and number == last and run.length == 1:
                made = _made_before(run, executor.read_here(number) if residuals_only else None)
            self.backward(run, cotangents, made)

    def all_synchronise(self, executor: Executor) -> None:
        """Once a step."""
        joined = self.joined(executor)
        for number, run in enumerate(executor.runs):
            self.synchronise(executor.storage, number, run, joined)

    def joined(self, executor: Executor) -> Container[tuple[int, int]]:
        """(Run, port) of the gradients that are added to others before these are summed."""
        ports = [(number, port) for number, run in enumerate(executor.runs) for port in range(len(run.inputs))]
        return joined_ties(executor, ports)

    def forward(self, storage: Storage, number: int, run: Run, ports: frozenset[int] | None = None) -> None:
        plan = run.local.plan
        for port, way in enumerate(run.inputs):
            if (number, port) in storage.owned:
                continue
            if (number, port) in storage.tied:
                group = storage.group(storage.tied[number, port])
                self.move(group.shape, group.dtype, group.boundary(), spec_of(run, port, optimizer=False))
                continue
            for reference in way.references if way.way is Way.STACKED else way.references[:1]:
                self.move_value(reference, self.specs[reference], run.local.input_spec(port))
        needed = None if ports is None else needed_forward(run.local, ports)
        self.add(self.of_phase(run, plan.forward, needed), self.length(run))
        for port, references in enumerate(run.outputs):
            if ports is not None and port not in ports:
                continue
            self.move_value(references[0], run.local.output_spec(port), self.specs[references[0]], self.length(run))
            if run.length > 1 and port in _handed_on(run):
                self.move_value(references[-1], self.specs[references[0]], self.specs[references[-1]])

    def measures(self) -> None:
        for sink, reference in self.traced.spec.results:
            if sink.split(":")[0] in ("loss", "aux") and reference in self.specs:
                spec = self.specs[reference]
                self.move_value(reference, spec, ((),) * len(spec))

    def backward(self, run: Run, cotangents: set[str], made: frozenset[Version]) -> None:
        """Seeds, the backward program but for what is made, and what it hands back.

        `cotangents` are the references that have one.
        """
        kind, plan = run.local.static.kind, run.local.plan
        ports = [p for p, port in enumerate(kind.inputs) if port.gradient is not None]
        if not ports:
            return
        carried = {run.inputs[p].output for p in ports if run.inputs[p].way is Way.CARRY and run.length > 1}
        for port, output in enumerate(kind.outputs):
            if output.cotangent is None:
                continue
            for index, reference in enumerate(run.outputs[port]):
                last = port in carried and index == run.length - 1
                if reference in cotangents:
                    target = self.specs[run.outputs[port][0]] if last else run.local.output_spec(port)
                    self.move_value(reference, self.specs[reference], target)
            if port in carried:
                first = run.outputs[port][0]
                self.move_value(first, self.specs[first], run.local.output_spec(port), self.length(run))
        left = still_to_do(plan.backward.instructions, made) if made else None
        self.add(self.of_phase(run, plan.backward, left), self.length(run))
        for port in ports:
            if kind.inputs[port].role is not PortRole.PARAMETER:
                self.hand_back(run, port, cotangents)

    def hand_back(self, run: Run, port: int, cotangents: set[str]) -> None:
        way = run.inputs[port]
        for reference in way.references if way.way is Way.STACKED else way.references[:1]:
            if reference.startswith("value:"):
                self.move_value(reference, run.local.input_spec(port), self.specs[reference])
                cotangents.add(reference)

    # -------------------------------------------------------------------------------------------- once a step

    def synchronise(self, storage: Storage, number: int, run: Run, joined: Container[tuple[int, int]]) -> None:
        for port, way in enumerate(run.inputs):
            if run.local.static.kind.inputs[port].role is not PortRole.PARAMETER:
                continue
            stacked = run.length if way.way is Way.STACKED else 1
            summed = run.local.static.kind.inputs[port].gradient is not None and (number, port) not in joined
            if summed:
                for rows in self.gradient_rows(number, port, stacked):
                    self.steps(run, port, run.local.sync[port], rows)
            if (number, port) in storage.owned:
                for rows in self.published_rows(storage.group(storage.owned[number, port]), stacked):
                    self.steps(run, port, run.local.publish[port], rows)
            elif summed:
                group = storage.group(storage.tied[number, port])
                source = spec_of(run, port, optimizer=True)
                self.move(group.shape, group.dtype, source, group.boundary(optimizer=True))

    def gradient_rows(self, number: int, port: int, layers: int) -> list[int]:
        """Of how many layers a gradient is synchronised at once."""
        return [layers]

    def published_rows(self, group: Group, layers: int) -> list[int]:
        """Of how many layers an updated parameter is gathered at once."""
        return [layers]

    def steps(self, run: Run, port: int, steps: Iterable[LayoutStep], stacked: int) -> None:
        dtype = run.local.static.program.program.values[run.local.static.kind.inputs[port].value].dtype
        moved = [collective(s, itemsize(dtype), dtype) for s in steps if s.kind is not StepKind.SLICE]
        self.add(moved, stacked=stacked)


class _StepPrediction(_Prediction):
    """A step of one stage."""

    def of(self, step: Step) -> Collectives:
        """All of its collectives."""
        self.turns = 1 if self.once else step.plan.num_microbatches
        self.all_forward(step.executor)
        self.measures()
        self.all_backward(step.executor, {dict(self.traced.spec.results)["loss"]})
        self.turns = 1
        self.all_synchronise(step.executor)
        return +self.found


class _PipelinePrediction(_Prediction):
    """A step of several stages: what stands in the branches of all of them, as often as the schedule has such ticks."""

    optimizer: StageOptimizer
    synchronised: Stage
    """Whose gradients and parameters are counted now."""

    def of(self, step: PipelineStep) -> Collectives:
        """All of its collectives."""
        self.optimizer = step.optimizer_program
        table, axes = step.table, step.plan.pipeline_axes
        forwards, backwards = (1 if self.once else table.ticks(way) for way in WAYS)
        for stage in step.stages:
            self.turns = forwards
            if not (table.recomputes and stage.last):
                self.all_forward(stage.executor)
            self.turns = backwards
            if table.recomputes:
                self.all_forward(stage.executor, residuals_only=not stage.last)
            self.turns = backwards if table.recomputes else forwards
            if stage.last:
                self.measures()
            self.turns = backwards
            flowing = flows(self.traced.spec)
            cotangents = (
                {dict(self.traced.spec.results)["loss"]} if stage.last else {r for r in stage.sends if r in flowing}
            )
            again = table.recomputes
            self.all_backward(stage.executor, cotangents, at_once=again, residuals_only=again and not stage.last)
        packings = received_packing(step.stages), handed_back_packing(step.stages)
        for self.turns, packing in zip((forwards, backwards), packings, strict=True):
            for dtype, lines in packing.sizes.items():
                self.count("collective-permute", axes, lines * LINE * itemsize(dtype), dtype)
        self.turns = 1
        for self.synchronised in step.stages:
            self.all_synchronise(self.synchronised.executor)
        self.once_a_step(step)
        return +self.found

    def joined(self, executor: Executor) -> Container[tuple[int, int]]:
        """Those of one batch of synchronisation."""
        batches = self.synchronised.synchronised_batches
        return {at for batch in batches for at in joined_ties(executor, batch.names)}

    def gradient_rows(self, number: int, port: int, layers: int) -> list[int]:
        """Of how many layers a gradient is synchronised at once."""
        batches = self.synchronised.synchronised_batches
        parts = [batch.rows for batch in batches if (number, port) in batch.names]
        return _counts(parts, layers)

    def published_rows(self, group: Group, layers: int) -> list[int]:
        """Of how many layers an updated parameter is gathered at once."""
        if self.optimizer.update is None or not self.optimizer.by_rows(group):
            return [layers]
        return _counts(row_parts(jax.ShapeDtypeStruct(group.local_shape(self.layouts.mesh), group.dtype)), layers)

    def once_a_step(self, step: PipelineStep) -> None:
        """What all stages come to agree on: metrics, state, gradients of shared parameters."""
        axes = step.plan.pipeline_axes
        self.count("all-reduce", axes, itemsize("float32"), "float32")  # The weight.
        for sink, reference in self.traced.spec.results:
            if sink.split(":")[0] in ("loss", "aux"):
                aval = self.traced.avals[reference]
                dtype = str(aval.dtype) if jnp.issubdtype(aval.dtype, jnp.floating) else "float32"
                self.count("all-reduce", axes, math.prod(aval.shape) * itemsize(dtype), dtype)
        for stage in step.stages:
            for path in stage.changes:
                place = Packing.of([{path: self.traced.functional.state[path]}]).places[0][path]
                dtype = "int32" if place.flat == "bool" else place.flat
                self.count("all-reduce", axes, math.prod(place.words) * itemsize(dtype), dtype)
        mesh = self.layouts.mesh
        for owner, *others in step.storage.shared.values():
            group = step.storage.group(owner.stage, owner.key)
            for other in others:
                copy = step.storage.group(other.stage, other.key)
                if copy.dims != group.dims:
                    layouts = copy.boundary(optimizer=True), group.boundary(optimizer=True)
                    self.move(group.shape, group.dtype, *layouts)
                    self.move(group.shape, group.dtype, *layouts[::-1])
            shape = group.local_shape(mesh, optimizer=True)[1 if group.stacked else 0 :]
            dtype = sum_dtype(str(group.dtype), step.plan.gradient_sum_dtype)
            self.count("all-reduce", axes, math.prod(shape) * itemsize(dtype), dtype)

    def count(self, kind: str, axes: tuple[str, ...], size: int, dtype: str) -> None:
        """One more collective."""
        self.found[CollectiveSignature(kind, axes, size, dtype)] += self.turns


def _made_before(run: Run, ports: frozenset[int] | None) -> frozenset[Version]:
    """Versions of backward that a forward right before it has made, for all output ports or for some."""
    local = run.local
    instructions = local.forward if ports is None else needed_forward(local, ports)
    made = {version for each in instructions for version in results_of(each)}
    return frozenset(here for here, there in local.shared_versions.items() if there in made)


def _counts(parts: Sequence[Range | None], layers: int) -> list[int]:
    """How many rows each part has."""
    return [layers if rows is None else rows[1] - rows[0] for rows in parts]


def _handed_on(run: Run) -> set[int]:
    """Output ports whose values each next layer of the run reads."""
    return {way.output for way in run.inputs if way.way is Way.CARRY}


def _in_text(instructions: Iterable[Instruction], program: Program, once: bool) -> Iterator[Collective]:
    """Collectives of planned instructions, those of loops over time once or as often as they turn."""
    for instruction in instructions:
        if isinstance(instruction, Loop):
            inner = list(_in_text(instruction.body, program.operations[instruction.operation].bodies[0], once))
            yield from inner * (1 if once else instruction.trips)
        elif isinstance(instruction, Convert):
            dtype = program.values[instruction.value].dtype
            moves = [s for s in instruction.steps if s.kind is not StepKind.SLICE]
            yield from (collective(s, itemsize(dtype), dtype) for s in moves)
        elif instruction.combine is not None:
            dtype = program.values[instruction.results[0][0]].dtype
            dtype = "int32" if dtype == "bool" else dtype
            names, how = instruction.combine
            size = math.prod(instruction.shapes[0]) * itemsize(dtype)
            yield Collective(CollectiveKind.ALL_REDUCE, names, len(names), size, how, dtype)


# ------------------------------------------------------------------------------------------------ as traced

_PRIMITIVES = {
    "psum": CollectiveKind.ALL_REDUCE,
    "psum_invariant": CollectiveKind.ALL_REDUCE,
    "pmax": CollectiveKind.ALL_REDUCE,
    "pmin": CollectiveKind.ALL_REDUCE,
    "all_gather": CollectiveKind.ALL_GATHER,
    "all_gather_invariant": CollectiveKind.ALL_GATHER,
    "reduce_scatter": CollectiveKind.REDUCE_SCATTER,
    "all_to_all": CollectiveKind.ALL_TO_ALL,
    "ppermute": CollectiveKind.PERMUTE,
}
_OTHERS = frozenset({"pbroadcast", "pbroadcast_dynamic", "pgather", "ragged_all_to_all", "psend", "precv"})


def traced_collectives(step: StepProgram) -> Collectives:
    """The collectives of the step's jaxpr."""
    order = list(step.mesh.axis_names)
    found: Collectives = Counter()
    traced = step.jitted.trace(step.state_shapes, step.batch_shapes)
    for equation, times in _equations(traced.jaxpr.jaxpr, 1):
        name = equation.primitive.name
        if name not in _PRIMITIVES and name not in _OTHERS:
            continue
        axes = equation.params.get("axes") or equation.params.get("axis_name") or ()
        axes = (axes,) if isinstance(axes, str) else axes
        kind = _PRIMITIVES[name].value if name in _PRIMITIVES else name
        for operand in equation.invars:
            aval: Any = operand.aval
            dtype = aval.dtype
            size = math.prod(aval.shape) * dtype.itemsize
            found[CollectiveSignature(kind, tuple(sorted(axes, key=order.index)), size, str(dtype))] += times
    return found


def _equations(jaxpr: jex.Jaxpr, times: int) -> Iterator[tuple[jex.JaxprEqn, int]]:
    """All equations, those of inner jaxprs too, with how often each runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        turns = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, jex.ClosedJaxpr):
                    yield from _equations(inner.jaxpr, turns)
                elif isinstance(inner, jex.Jaxpr):
                    yield from _equations(inner, turns)


# ------------------------------------------------------------------------------------------------ as lowered

_LOWERED = re.compile(
    r'"?stablehlo\.(all_reduce|all_gather|reduce_scatter|all_to_all|collective_permute|collective_broadcast)"?\('
)
_OPERANDS = re.compile(r"\}?\) : \(([^)]*)\) ->|\}> : \(([^)]*)\) ->")
_TENSOR = re.compile(r"tensor<((?:\d+x)*)([a-z]\w*)>")
_ELEMENTS = {"i1": "bool", "f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16"}


def lowered_collectives(step: StepProgram) -> Collectives:
    """The collectives in the text of the lowered step, before any of XLA's passes; those in loops once."""
    text = step.lowered.as_text()
    groups = _group_table(step)
    found: Collectives = Counter()
    for match in _LOWERED.finditer(text):
        operands = _OPERANDS.search(text, match.end())
        if operands is None:
            raise AssertionError(f"cannot read {text[match.start() : match.start() + 400]}")
        attributes = text[match.end() : operands.start()]
        if match[1] == "collective_permute":
            axes = _moved_along(_compat.lowered_pairs(attributes), step.mesh.shape)
        else:
            members = _compat.lowered_groups(attributes, mesh=step.mesh.shape)
            if members is None:
                raise AssertionError(f"cannot read {text[match.start() : match.start() + 400]}")
            axes = groups.get(_partition(members), ("?",))
        for dims, element in _TENSOR.findall(operands[1] or operands[2]):
            dtype = _ELEMENTS.get(element) or element.replace("ui", "uint").replace("i", "int", element[0] == "i")
            size = math.prod(map(int, dims.split("x")[:-1])) * itemsize(dtype)
            found[CollectiveSignature(match[1].replace("_", "-"), axes, size, dtype)] += 1
    return found


def _moved_along(pairs: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which a permute moves arrays, from its pairs of devices."""
    sizes = tuple(mesh.values())
    moved: set[str] = set()
    for source, target in pairs:
        here, there = np.unravel_index(source, sizes), np.unravel_index(target, sizes)
        moved |= {name for name, one, other in zip(mesh, here, there, strict=True) if one != other}
    return tuple(name for name in mesh if name in moved)


def _partition(groups: Any) -> frozenset[frozenset[int]]:
    return frozenset(frozenset(int(n) for n in group) for group in groups)


def _group_table(step: StepProgram) -> Mapping[frozenset[frozenset[int]], tuple[str, ...]]:
    """From the groups of devices along mesh axes to the axes, for every set of axes."""
    names = step.mesh.axis_names
    choices = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    return {_partition(_compat.groups_along(axes, mesh=step.mesh.shape)): axes for axes in choices}


# ------------------------------------------------------------------------------------------------ as compiled

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)"
    r"(-start)?\("
)
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_HLO_TYPES = {"pred": "bool", "f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16"}


def compiled_collectives(
    step: StepProgram, *, without_passes: Sequence[str] = (), compiled: jax.stages.Compiled | None = None
) -> Collectives:
    """The collectives of the compiled step, those in loops as often as XLA knows them to turn.

    Args:
        step: a step; compiled for this if it has not been.
        without_passes: names of XLA passes to leave out, to see what they do.
        compiled: the step's program, where it was compiled in another way.
    """
    if compiled is None:
        options = {"xla_disable_hlo_passes": ",".join(without_passes)}
        compiled = step.lowered.compile(compiler_options=options) if without_passes else step.compiled
    text = compiled.as_text()
    assert text is not None, "the compiler shows no text"
    return read_hlo(text, _group_table(step), step.mesh.shape)


def read_hlo(
    text: str, groups: Mapping[frozenset[frozenset[int]], tuple[str, ...]], mesh: Mapping[str, int]
) -> Collectives:
    """The collectives of a compiled module.

    Args:
        text: the module as XLA prints it.
        groups: from groups of devices to mesh axes.
        mesh: sizes of the mesh axes.
    """
    computations, entry = hlo_computations(text)
    found: Collectives = Counter()
    todo = [(entry, 1)]
    while todo:
        name, times = todo.pop()
        for line in computations[name]:
            match = _COLLECTIVE.search(line)
            if match:
                for signature in _signatures(line, match[1], match[2], bool(match[3]), groups, mesh):
                    found[signature] += times
                continue
            trips = _TRIPS.search(line)
            turns = times * int(trips[1]) if trips and " while(" in line else times
            called = _CALLED.findall(line)
            called += [c.strip().lstrip("%") for b in _BRANCHES.findall(line) for c in b.split(",")]
            todo += [(c, turns) for c in called if c in computations]
    return found


def _signatures(
    line: str,
    result: str,
    kind: str,
    started: bool,
    groups: Mapping[frozenset[frozenset[int]], tuple[str, ...]],
    mesh: Mapping[str, int],
) -> list[CollectiveSignature]:
    """One per array of a combined collective; an all-to-all of pieces is one of their sum."""
    members = None
    if kind == "collective-permute":
        axes = _moved_along(_compat.compiled_pairs(line), mesh)
    else:
        members = _compat.compiled_groups(line)
        axes = groups.get(_partition(members), ("?",)) if members is not None else ("?",)
    size = len(members[0]) if members is not None else 1
    arrays = []
    for element, dims in _SHAPE.findall(result):
        dtype = _HLO_TYPES.get(element) or re.sub(r"^u(\d+)$", r"uint\1", re.sub(r"^s(\d+)$", r"int\1", element))
        arrays.append((math.prod(int(n) for n in dims.split(",") if n) * itemsize(dtype), dtype))
    if started and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # A pair of operands and results.
    if kind == "all-gather":
        arrays = [(n // size, dtype) for n, dtype in arrays]
    elif kind == "reduce-scatter":
        arrays = [(n * size, dtype) for n, dtype in arrays]
    elif kind == "all-to-all" and len(arrays) > 1:
        arrays = [(sum(n for n, _ in arrays), arrays[0][1])]
    return [CollectiveSignature(kind, axes, n, dtype) for n, dtype in arrays]
