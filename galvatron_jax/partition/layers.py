"""Planning one layer under one strategy: layouts at its boundary, forward, residuals, backward, synchronisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from galvatron_jax.partition.counts import collective, phase
from galvatron_jax.partition.instructions import Convert, Instruction, Residual, Version
from galvatron_jax.partition.layer_plan import BoundarySpec, LayerPlan, ParameterPlan
from galvatron_jax.partition.layout import (
    NOWHERE,
    PENDING,
    Axis,
    Frame,
    Layout,
    Role,
    Step,
    StepKind,
    convert,
    names_at,
    order_at,
)
from galvatron_jax.partition.planner import Pass
from galvatron_jax.partition.static import StaticKind, StaticProgram, itemsize, prepare_kind
from galvatron_jax.partition.strategy_axes import (
    SMALL_PARAMETER_ELEMENTS,
    AxisPlan,
    parameter_layout,
    plan_axes,
)
from galvatron_jax.spec.model import InputPort, LayerKind, PortRole
from galvatron_jax.spec.program import FactorRole
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel


@dataclass(frozen=True)
class LocalPlan:
    """A `LayerPlan` with what its execution needs besides."""

    static: StaticKind
    plan: LayerPlan
    axes: AxisPlan
    sizes: tuple[int, ...]
    inputs: tuple[Layout, ...]
    """Layout per input port as the programs read it (storage, for parameters)."""
    outputs: tuple[Layout, ...]
    forward: tuple[Instruction, ...]
    backward: tuple[Instruction, ...]
    output_versions: tuple[Version, ...]
    residuals: tuple[Residual, ...]
    gradient_versions: tuple[Version, ...]
    """Per input port with a gradient, in port order."""
    gradient_layouts: tuple[Layout, ...]
    """Their layouts; pending sums of parameters' gradients await `sync`."""
    sync: Mapping[int, tuple[Step, ...]]
    """Per parameter port: steps from the accumulated gradient to the optimizer's layout."""
    publish: Mapping[int, tuple[Step, ...]]
    """Per parameter port: steps from the optimizer's layout back to storage, after the update."""
    backward_reads: frozenset[int]
    """Input ports that the backward program reads."""
    versions: Mapping[str, Mapping[int, tuple[Layout, ...]]]
    """Per phase and value, its layouts by version."""

    def input_spec(self, port: int) -> BoundarySpec:
        """How an input port's value arrives; not for parameters."""
        spec = self.plan.inputs[port]
        assert spec is not None, f"port {port} is a parameter"
        return spec

    def output_spec(self, port: int) -> BoundarySpec:
        """How an output port's value leaves."""
        spec = self.plan.outputs[port]
        assert spec is not None
        return spec

    def gradient_of(self, port: int) -> tuple[int, Layout]:
        """Value and layout of an input port's gradient."""
        ports = [(p, x.gradient) for p, x in enumerate(self.static.kind.inputs) if x.gradient is not None]
        index = [p for p, _ in ports].index(port)
        return ports[index][1], self.gradient_layouts[index]

    def layout_of(self, phase: str, version: Version) -> Layout:
        """Layout of a version of a value in `forward` or `backward`."""
        return self.versions[phase][version[0]][version[1]]

    def reads_input(self, port: int) -> bool:
        """Whether the backward program reads an input port."""
        return port in self.backward_reads


def plan_layer(
    kind: LayerKind, strategy: LayerStrategy, *, mesh: Mapping[str, int], microbatch: int, model_microbatch: int
) -> LayerPlan:
    """What a layer costs under a strategy, and what will run; see `plan_local` for the parts that run.

    Args:
        kind: the layer's operations.
        strategy: which mesh axes serve what.
        mesh: axes of the stage with their prime sizes, slowest link first.
        microbatch: examples of one global micro-batch.
        model_microbatch: examples at which the kind was traced (`ModelSpec.microbatch`).
    """
    return plan_local(kind, strategy, mesh=mesh, microbatch=microbatch, model_microbatch=model_microbatch).plan


def plan_local(
    kind: LayerKind, strategy: LayerStrategy, *, mesh: Mapping[str, int], microbatch: int, model_microbatch: int
) -> LocalPlan:
    """Plans a layer; cached by kind, strategy, mesh and micro-batch."""
    key = (id(kind), strategy, tuple(mesh.items()), microbatch, model_microbatch)
    found = _CACHE.get(key)
    if found is None or found.static.kind is not kind:
        found = _LayerPlanner(prepare_kind(kind), strategy, mesh, microbatch, model_microbatch).plan()
        if len(_CACHE) > 20000:
            _CACHE.clear()
        _CACHE[key] = found
    return found


_CACHE: dict[tuple, LocalPlan] = {}


_AXES: dict[tuple, tuple[StaticKind, AxisPlan]] = {}


def _axes(static: StaticKind, strategy: LayerStrategy, mesh: Mapping[str, int], sizes: tuple[int, ...]) -> AxisPlan:
    """Logical axes, shared by strategies that differ in what they recompute alone."""
    alike = strategy.model_copy(update={"remat": Remat.NONE})
    key = (id(static), alike, tuple(mesh.items()), sizes)
    found = _AXES.get(key)
    if found is None or found[0] is not static:
        found = _AXES[key] = static, plan_axes(static, alike, mesh, sizes)
    return found[1]


class _LayerPlanner:
    """Plans one layer under one strategy."""

    def __init__(
        self, static: StaticKind, strategy: LayerStrategy, mesh: Mapping[str, int], microbatch: int, traced_at: int
    ) -> None:
        self.static, self.strategy, self.mesh = static, strategy, mesh
        self.kind, self.program = static.kind, static.program
        self.sizes = static.program.sizes(self.kind.batch_factor, microbatch, traced_at)
        self.axes = _axes(static, strategy, mesh, self.sizes)

    def plan(self) -> LocalPlan:
        inputs = tuple(self.input_layout(port) for port in self.kind.inputs)
        outputs = tuple(self.boundary_layout(port.value) for port in self.kind.outputs)
        forward_set, backward_set, saved = self.split()
        forward = self.new_pass()
        self.hold_inputs(forward, inputs)
        forward.run(op for op in self.program.operations if op.index in forward_set)
        output_versions = tuple(
            self.deliver(forward, port.value, layout) for port, layout in zip(self.kind.outputs, outputs, strict=True)
        )
        backward, residuals = self.backward_pass(forward, inputs, outputs, saved)
        backward.run(op for op in self.program.operations if op.index in backward_set)
        ports = [(i, p, p.gradient) for i, p in enumerate(self.kind.inputs) if p.gradient is not None]
        versions = tuple(
            self.deliver(backward, gradient, self.gradient_layout(backward, i, p, gradient, inputs))
            for i, p, gradient in ports
        )
        layouts = tuple(backward.held[v].layouts[n] for v, n in versions)
        kept = self.used_residuals(forward, backward, residuals, versions)
        accumulated = {
            i: layout for (i, p, _), layout in zip(ports, layouts, strict=True) if p.role is PortRole.PARAMETER
        }
        return self.assemble(
            inputs, outputs, forward, backward, output_versions, kept, versions, layouts, accumulated, forward_set,
            backward_set,
        )  # fmt: skip

    def new_pass(self) -> Pass:
        return Pass(self.program, self.sizes, self.axes.axes, self.axes.allowed)

    def hold_inputs(self, planner: Pass, layouts: Sequence[Layout]) -> None:
        for port, layout in zip(self.kind.inputs, layouts, strict=True):
            planner.hold(port.value, layout)

    @staticmethod
    def deliver(planner: Pass, value: int, target: Layout) -> Version:
        """Brings an output into the layout that it leaves in, all its dims whole or sharded but not lazy."""
        return planner.convert(value, target)

    # ------------------------------------------------------------------------------------------ boundary

    def input_layout(self, port: InputPort) -> Layout:
        if port.role is PortRole.PARAMETER:
            return self.stored_layout(port.value, sharded=self.strategy.zero == 3)
        if port.role in (PortRole.STATE, PortRole.CONSTANT):
            return (NOWHERE,) * len(self.axes.axes)
        return self.boundary_layout(port.value)

    def boundary_layout(self, value: int) -> Layout:
        """Batch over the data axes; the sequence of large floating activations over the sequence axes."""
        program, layout = self.program, [NOWHERE] * len(self.axes.axes)
        positions = program.positions[value]
        for index in self.axes.of(Role.DATA):
            self.place(layout, index, value, [p for p, f in enumerate(positions) if f in self.axes.allowed[index]])
        if self.is_large_activation(value):
            sequence = [p for p, f in enumerate(positions) if program.roles[f] is FactorRole.SEQUENCE]
            megatron = self.strategy.sp_kind is SequenceParallel.MEGATRON
            # Minor mesh axes first: sequence dims are split in reverse mesh order.
            for index in reversed(self.axes.of(Role.TENSOR if megatron else Role.SEQUENCE)):
                if megatron or self.strategy.sp_kind is SequenceParallel.ULYSSES:
                    self.place(layout, index, value, sequence)
        return tuple(layout)

    def is_large_activation(self, value: int) -> bool:
        roles = {self.program.roles[f] for f in self.program.positions[value]}
        dtype = self.program.program.values[value].dtype
        return {FactorRole.BATCH, FactorRole.SEQUENCE, FactorRole.EMBEDDING} <= roles and "float" in dtype

    def place(self, layout: list[int], index: int, value: int, candidates: Sequence[int]) -> None:
        """Puts an axis on the first position that leaves the dim a plain PartitionSpec: major factors whole first."""
        positions, dims = self.program.positions[value], self.program.dim_of[value]
        for position in candidates:
            taken = math.prod(a.size for a, at in zip(self.axes.axes, layout, strict=True) if at == position)
            if self.sizes[positions[position]] % (taken * self.axes.axes[index].size):
                continue
            majors = [p for p in range(position) if dims[p] == dims[position]]
            if all(self.is_used_up(layout, p, value) for p in majors):
                layout[index] = position
                return

    def is_used_up(self, layout: Sequence[int], position: int, value: int) -> bool:
        used = math.prod(a.size for a, at in zip(self.axes.axes, layout, strict=True) if at == position)
        return used == self.sizes[self.program.positions[value][position]]

    def stored_layout(self, value: int, *, sharded: bool) -> Layout:
        """A parameter as it is stored: tensor axes on its hidden factor, and ZeRO's on the largest other one."""
        layout = list(parameter_layout(self.static, value, self.axes))
        positions = self.program.positions[value]
        if not sharded or math.prod(self.sizes[f] for f in positions) < SMALL_PARAMETER_ELEMENTS:
            return tuple(layout)
        for index in self.axes.of(Role.STORAGE):
            size = self.axes.axes[index].size
            room = []
            for position, factor in enumerate(positions):
                here = [a for a, at in zip(self.axes.axes, layout, strict=True) if at == position]
                left = self.sizes[factor] // math.prod(a.size for a in here)
                if left % size == 0:
                    room.append((any(a.role is Role.STORAGE for a in here), left, -position))
            if room:
                layout[index] = -max(room)[2]
        return tuple(layout)

    # ------------------------------------------------------------------------------------------ forward and backward

    def split(self) -> tuple[set[int], set[int], list[int]]:
        """Operations of the forward and of the backward program, and the values that cross."""
        gradients = [p.gradient for p in self.kind.inputs if p.gradient is not None]
        saved_candidates = self.candidates()
        backward, leaves = self.needed(gradients, stop=saved_candidates)
        saved = [v for v in sorted(leaves) if v in saved_candidates]
        forward, _ = self.needed([p.value for p in self.kind.outputs] + saved, stop=set())
        return forward, backward, saved

    def candidates(self) -> set[int]:
        """Values that may be kept for the backward program under the remat policy."""
        operations, gradient = self.program.operations, self.static.gradient_operations
        if not gradient or self.strategy.remat is Remat.FULL:
            return set()
        inputs = {p.value for p in self.kind.inputs} | set(self.program.program.constants)
        recomputed = {r for op in operations if op.recomputed for r in op.results}
        dependent = {r for i in gradient for r in operations[i].results}
        if self.strategy.remat is Remat.DOTS:
            kept = {
                r
                for op in operations
                if op.index not in gradient and op.primitive in ("dot_general", "conv_general_dilated")
                for r in op.results
            }
        else:
            kept = {v for i in gradient for v in operations[i].operands} - dependent
        if self.strategy.remat is Remat.ATTENTION:
            kept = {v for v in kept if not self.is_quadratic(v)}
        seeds = {p.cotangent for p in self.kind.outputs}
        return kept - inputs - self.static.fixed - recomputed - seeds

    def is_quadratic(self, value: int) -> bool:
        """Whether two of the value's dims are sequences: attention scores and weights."""
        dims = self.program.dim_of[value]
        roles = self.program.roles
        found = {dims[p] for p, f in enumerate(self.program.positions[value]) if roles[f] is FactorRole.SEQUENCE}
        return len(found) >= 2

    def needed(self, outputs: Iterable[int | None], stop: set[int]) -> tuple[set[int], set[int]]:
        """Operations that some outputs need, and the values at which the walk stopped."""
        todo = [v for v in outputs if v is not None]
        operations: set[int] = set()
        leaves: set[int] = set()
        while todo:
            value = todo.pop()
            if value in stop or value not in self.static.producer:
                leaves.add(value)
                continue
            index = self.static.producer[value]
            if index not in operations:
                operations.add(index)
                todo += self.program.operations[index].operands
        return operations, leaves

    def backward_pass(
        self, forward: Pass, inputs: Sequence[Layout], outputs: Sequence[Layout], saved: Sequence[int]
    ) -> tuple[Pass, dict[int, list[int]]]:
        """A pass that starts from inputs, kept values and cotangents.

        Without remat, kept values are at hand in every version that forward made, so that backward repeats no
        communication; with remat, in the smallest.
        """
        backward = self.new_pass()
        self.hold_inputs(backward, inputs)
        versions: dict[int, list[int]] = {}
        for value in saved:
            held = forward.held[value]
            usable = [i for i, layout in enumerate(held.layouts) if PENDING not in layout]
            if not usable:
                target = tuple(NOWHERE if p == PENDING else p for p in held.layouts[0])
                usable = [forward.convert(value, target)[1]]
            if self.strategy.remat is not Remat.NONE:
                usable = [min(usable, key=lambda i: forward.local_bytes(value, i))]
            versions[value] = usable
            backward.hold(value, held.layouts[usable[0]], lazy=held.lazy, zero=held.zero)
            backward.held[value].layouts[:] = [held.layouts[i] for i in usable]
        for port, layout in zip(self.kind.outputs, outputs, strict=True):
            if port.cotangent is not None:
                backward.hold(port.cotangent, layout)
        return backward, versions

    def gradient_layout(
        self, backward: Pass, index: int, port: InputPort, gradient: int, inputs: Sequence[Layout]
    ) -> Layout:
        """Activations' gradients leave as the activation came; parameters' keep sums pending until the step's end."""
        if port.role is not PortRole.PARAMETER:
            return inputs[index]
        stored = self.stored_layout(port.value, sharded=False)
        now = backward.held[gradient].layouts[0]
        pending = tuple(PENDING if n == PENDING else s for n, s in zip(now, stored, strict=True))
        if self.strategy.zero >= 2:
            return self.scattered(backward, port, gradient, pending)
        return pending

    def scattered(self, backward: Pass, port: InputPort, gradient: int, layout: Layout) -> Layout:
        """A gradient's layout once its data-parallel sums are spread over ZeRO's axes.

        ZeRO's axes are the data axes seen again: what is pending over those is pending over them. The gradient is
        first relabelled so, as a version of its own, at no cost.
        """
        optimizer = self.stored_layout(port.value, sharded=True)
        backward.relabel(gradient, self.mirrored(backward.held[gradient].layouts[0]))
        result = list(self.mirrored(layout))
        for index in self.axes.of(Role.STORAGE):
            result[index] = optimizer[index]
        for index in self.axes.of(Role.TENSOR):
            result[index] = layout[index]
        return tuple(result)

    def mirrored(self, layout: Layout) -> Layout:
        """Pending sums over data axes as pending sums over the storage axes that mirror them."""
        result = list(layout)
        for index in self.axes.of(Role.STORAGE):
            mirror = self.axes.axes[index].mirror
            if mirror is not None and layout[mirror] == PENDING:
                result[index], result[mirror] = PENDING, NOWHERE
        return tuple(result)

    def used_residuals(
        self, forward: Pass, backward: Pass, versions: Mapping[int, list[int]], delivered: Sequence[Version]
    ) -> tuple[Residual, ...]:
        """The versions of kept values that the backward program reads."""
        read: set[Version] = set(delivered)
        for instruction in backward.instructions:
            if isinstance(instruction, Convert):
                read.add((instruction.value, instruction.source))
            else:
                read.update(instruction.operands)
        kept = []
        for value, numbers in versions.items():
            held = forward.held[value]
            for position, number in enumerate(numbers):
                if (value, position) in read:
                    layout = held.layouts[number]
                    shape = forward.local_shape(value, layout, held.lazy)
                    kept.append(
                        Residual(
                            value, number, position, layout, held.lazy, shape, int(forward.local_bytes(value, number))
                        )
                    )
        return tuple(kept)

    # ------------------------------------------------------------------------------------------ result

    def assemble(
        self, inputs, outputs, forward, backward, output_versions, kept, versions, layouts, accumulated, forward_set,
        backward_set,
    ) -> LocalPlan:  # fmt: skip
        sync, publish, parameters = {}, {}, []
        for index in self.static.parameters:
            port = self.kind.inputs[index]
            entry, steps_sync, steps_publish = self.parameter(index, port, inputs[index], accumulated.get(index))
            parameters.append(entry)
            sync[index], publish[index] = steps_sync, steps_publish
        delivered = {v for v, _ in versions}
        read = frozenset(
            i for i, p in enumerate(self.kind.inputs) if p.value in delivered or self.reads(backward, p.value)
        )
        needed_inputs = [p for i, p in enumerate(self.kind.inputs) if p.role is PortRole.ACTIVATION and i in read]
        residual_bytes = sum(r.bytes for r in kept) + sum(int(backward.local_bytes(p.value)) for p in needed_inputs)
        plan = LayerPlan(
            forward=phase(forward, forward_set, self.program),
            backward=phase(backward, backward_set, self.program),
            residual_bytes=residual_bytes,
            parameters=tuple(parameters),
            inputs=tuple(
                None if p.role is PortRole.PARAMETER else self.spec(p.value, layout)
                for p, layout in zip(self.kind.inputs, inputs, strict=True)
            ),
            outputs=tuple(self.spec(p.value, layout) for p, layout in zip(self.kind.outputs, outputs, strict=True)),
            notes=self.kind.notes,
        )
        return LocalPlan(
            static=self.static, plan=plan, axes=self.axes, sizes=self.sizes, inputs=inputs, outputs=outputs,
            forward=tuple(forward.instructions), backward=tuple(backward.instructions),
            output_versions=output_versions, residuals=kept, gradient_versions=versions, gradient_layouts=layouts,
            sync=sync, publish=publish, backward_reads=read,
            versions={
                name: {v: tuple(h.layouts) for v, h in done.held.items()}
                for name, done in (("forward", forward), ("backward", backward))
            },
        )  # fmt: skip

    @staticmethod
    def reads(planner: Pass, value: int) -> bool:
        return any(
            i.value == value if isinstance(i, Convert) else any(v == value for v, _ in i.operands)
            for i in planner.instructions
        )

    def spec(self, value: int, layout: Layout) -> BoundarySpec:
        return boundary_spec(self.program, self.axes.axes, value, layout, self.sizes)

    def whole_frame(self, value: int) -> Frame:
        return Frame(tuple(self.sizes[f] for f in self.program.positions[value]), self.program.ascending[value])

    def parameter(
        self, index: int, port: InputPort, stored: Layout, accumulated: Layout | None
    ) -> tuple[ParameterPlan, tuple[Step, ...], tuple[Step, ...]]:
        """How a parameter is stored, accumulated, synchronised and published."""
        value, axes = port.value, self.axes.axes
        optimizer = self.stored_layout(value, sharded=self.strategy.zero >= 1)
        frame = self.whole_frame(value)
        held = accumulated if accumulated is not None else self.stored_layout(value, sharded=False)
        steps = self.sync_steps(frame, held, optimizer)
        publish = tuple(convert(axes, frame, optimizer, stored))
        size = itemsize(self.program.program.values[value].dtype)
        dtype = self.program.program.values[value].dtype
        entry = ParameterPlan(
            port=index,
            name=port.name,
            storage=self.factor_spec(value, stored),
            optimizer=self.factor_spec(value, optimizer),
            storage_bytes=self.layout_bytes(frame, stored, size),
            optimizer_bytes=self.layout_bytes(frame, optimizer, size),
            accumulator_bytes=self.layout_bytes(frame, held, size),
            sync=tuple(collective(s, size, dtype) for s in steps if s.kind is not StepKind.SLICE),
            publish=tuple(collective(s, size, dtype) for s in publish if s.kind is not StepKind.SLICE),
        )
        return entry, steps, publish

    def sync_steps(self, frame: Frame, held: Layout, optimizer: Layout) -> tuple[Step, ...]:
        """From the accumulated gradient to the optimizer's layout; ZeRO's axes take over the data axes' sums."""
        source = self.mirrored(held) if self.strategy.zero == 1 else held
        return tuple(convert(self.axes.axes, frame, source, optimizer))

    def layout_bytes(self, frame: Frame, layout: Layout, size: int) -> int:
        total = math.prod(frame.sizes) * size
        for axis, place in zip(self.axes.axes, layout, strict=True):
            if place >= 0:
                total //= axis.size
        return total

    def factor_spec(self, value: int, layout: Layout) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Per dim and factor, the mesh axes on it."""
        frame = self.whole_frame(value)
        dims: list[list[tuple[str, ...]]] = [[] for _ in range(self.program.rank[value])]
        for position, dim in enumerate(self.program.dim_of[value]):
            dims[dim].append(axes_at(self.axes.axes, frame, layout, position))
        return tuple(tuple(d) for d in dims)


def axes_at(axes: Sequence[Axis], frame: Frame, layout: Layout, position: int) -> tuple[str, ...]:
    """Mesh axes at a position, major to minor."""
    found = [i for i, at in enumerate(layout) if at == position]
    found.sort(key=lambda i: order_at(axes, frame, position, i))
    return tuple(n for i in found for n in names_at(axes, frame, position, i))


def boundary_spec(
    program: StaticProgram, axes: Sequence[Axis], value: int, layout: Layout, sizes: Sequence[int]
) -> BoundarySpec:
    """Mesh axes per dim."""
    frame = Frame(tuple(sizes[f] for f in program.positions[value]), program.ascending[value])
    dims: list[tuple[str, ...]] = [()] * program.rank[value]
    for position, dim in enumerate(program.dim_of[value]):
        dims[dim] += axes_at(axes, frame, layout, position)
    return tuple(dims)
