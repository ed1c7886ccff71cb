"""Planning one layer under one strategy: layouts at its boundary, forward, residuals, backward, synchronisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from galvatron_jax.partition.counts import all_collectives, traffic
from galvatron_jax.partition.instructions import Instruction, Residual, Version
from galvatron_jax.partition.layer_plan import BoundarySpec, LayerPlan, PhasePlan
from galvatron_jax.partition.layout import NOWHERE, PENDING, Layout, Role, Step
from galvatron_jax.partition.parameters import Storage
from galvatron_jax.partition.planner import Pass
from galvatron_jax.partition.remat import Split, split
from galvatron_jax.partition.setting import Held, Setting
from galvatron_jax.partition.static import StaticKind, prepare_kind
from galvatron_jax.partition.strategy_axes import AxisPlan, plan_axes
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
    held: Mapping[str, Mapping[int, Held]]
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
        return self.held[phase][version[0]].layouts[version[1]]

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
    """Plans a layer; remembered as long as the kind lives, unless many others are planned in between."""
    static = prepare_kind(kind)
    axes = strategy.dp, strategy.tp, strategy.sp, strategy.sp_kind

    def context() -> _Context:
        sizes = static.program.sizes(kind.batch_factor, microbatch, model_microbatch)
        return _Context(static, strategy, mesh, sizes)

    shared = static.memo.contexts.get((axes, tuple(mesh.items()), microbatch, model_microbatch), context)
    return shared.plan(strategy.zero, strategy.remat)


@dataclass(frozen=True)
class _Passes:
    """The two passes over a layer, which ZeRO stages share that differ in how the optimizer's state is stored alone."""

    forward: PhasePlan
    backward: PhasePlan
    residual_bytes: int
    output_versions: tuple[Version, ...]
    residuals: tuple[Residual, ...]
    gradient_versions: tuple[Version, ...]
    gradient_layouts: tuple[Layout, ...]
    backward_reads: frozenset[int]
    held: Mapping[str, Mapping[int, Held]]


class _Context:
    """A layer over some logical axes at one micro-batch: what strategies share that differ in ZeRO and remat alone."""

    def __init__(
        self, static: StaticKind, strategy: LayerStrategy, mesh: Mapping[str, int], sizes: tuple[int, ...]
    ) -> None:
        self.static, self.kind, self.program, self.sizes = static, static.kind, static.program, sizes
        self.sp_kind = strategy.sp_kind
        self.axes = plan_axes(static, strategy, mesh, sizes)
        self.storage = Storage(static, self.axes, sizes)
        self.setting = Setting(static.program, sizes, self.axes.axes, self.axes.allowed)
        self.outputs = tuple(self.boundary_layout(port.value) for port in self.kind.outputs)
        self.output_specs = tuple(
            self.storage.boundary_spec(p.value, layout)
            for p, layout in zip(self.kind.outputs, self.outputs, strict=True)
        )
        self.gradients = tuple((i, p, p.gradient) for i, p in enumerate(self.kind.inputs) if p.gradient is not None)
        self._inputs: dict[bool, tuple[Layout, ...]] = {}
        self._passes: dict[tuple[Remat, int], _Passes] = {}
        self._plans: dict[tuple[int, Remat], LocalPlan] = {}

    def plan(self, zero: int, remat: Remat) -> LocalPlan:
        """The layer's plan at a ZeRO stage with a remat policy."""
        key = zero, remat
        if key not in self._plans:
            self._plans[key] = self._plan(zero, remat)
        return self._plans[key]

    def _plan(self, zero: int, remat: Remat) -> LocalPlan:
        passes = self.passes(zero, remat)
        inputs = self.inputs(sharded=zero == 3)
        accumulated = {i: layout for (i, _, _), layout in zip(self.gradients, passes.gradient_layouts, strict=True)}
        stored = {
            i: self.storage.parameter(i, zero=zero, accumulated=accumulated.get(i)) for i in self.static.parameters
        }
        plan = LayerPlan(
            forward=passes.forward,
            backward=passes.backward,
            residual_bytes=passes.residual_bytes,
            parameters=tuple(parameter.plan for parameter in stored.values()),
            inputs=self.input_specs(inputs),
            outputs=self.output_specs,
            notes=self.kind.notes,
        )
        return LocalPlan(
            static=self.static, plan=plan, axes=self.axes, sizes=self.sizes, inputs=inputs, outputs=self.outputs,
            forward=plan.forward.instructions, backward=plan.backward.instructions,
            output_versions=passes.output_versions, residuals=passes.residuals,
            gradient_versions=passes.gradient_versions, gradient_layouts=passes.gradient_layouts,
            sync={i: parameter.sync for i, parameter in stored.items()},
            publish={i: parameter.publish for i, parameter in stored.items()},
            backward_reads=passes.backward_reads, held=passes.held,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ boundary

    def inputs(self, *, sharded: bool) -> tuple[Layout, ...]:
        """Layout per input port, parameters as stored: sharded over ZeRO's axes or not."""
        if sharded not in self._inputs:
            self._inputs[sharded] = tuple(self.input_layout(port, sharded) for port in self.kind.inputs)
        return self._inputs[sharded]

    def input_layout(self, port: InputPort, sharded: bool) -> Layout:
        if port.role is PortRole.PARAMETER:
            return self.storage.layout(port.value, sharded=sharded)
        if port.role in (PortRole.STATE, PortRole.CONSTANT):
            return self.setting.nowhere
        return self.boundary_layout(port.value)

    def input_specs(self, inputs: Sequence[Layout]) -> tuple[BoundarySpec | None, ...]:
        return tuple(
            None if p.role is PortRole.PARAMETER else self.storage.boundary_spec(p.value, layout)
            for p, layout in zip(self.kind.inputs, inputs, strict=True)
        )

    def boundary_layout(self, value: int) -> Layout:
        """Batch over the data axes; the sequence of large floating activations over the sequence axes."""
        program, layout = self.program, list(self.setting.nowhere)
        positions = program.positions[value]
        for index in self.axes.of(Role.DATA):
            self.place(layout, index, value, [p for p, f in enumerate(positions) if f in self.axes.allowed[index]])
        if self.is_large_activation(value):
            sequence = [p for p, f in enumerate(positions) if program.roles[f] is FactorRole.SEQUENCE]
            megatron = self.sp_kind is SequenceParallel.MEGATRON
            # Minor mesh axes first: sequence dims are split in reverse mesh order.
            for index in reversed(self.axes.of(Role.TENSOR if megatron else Role.SEQUENCE)):
                if megatron or self.sp_kind is SequenceParallel.ULYSSES:
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
            taken = self.shards_at(layout, position)
            if self.sizes[positions[position]] % (taken * self.axes.axes[index].size):
                continue
            majors = [p for p in range(position) if dims[p] == dims[position]]
            if all(self.shards_at(layout, p) == self.sizes[positions[p]] for p in majors):
                layout[index] = position
                return

    def shards_at(self, layout: Sequence[int], position: int) -> int:
        """Into how many shards a layout cuts a position."""
        return math.prod(a.size for a, at in zip(self.axes.axes, layout, strict=True) if at == position)

    # ------------------------------------------------------------------------------------------ forward and backward

    def passes(self, zero: int, remat: Remat) -> _Passes:
        """Both passes. ZeRO 0 and 1 keep gradients as they are made, 2 scatters them, 3 gathers parameters as well."""
        key = remat, max(zero, 1)
        if key not in self._passes:
            self._passes[key] = self._both_passes(zero, split(self.static, remat), keep_all=remat is Remat.NONE)
        return self._passes[key]

    def _both_passes(self, zero: int, parts: Split, *, keep_all: bool) -> _Passes:
        inputs = self.inputs(sharded=zero == 3)
        forward = self.new_pass(inputs)
        forward.run(parts.forward)
        output_versions = tuple(
            forward.convert(port.value, layout) for port, layout in zip(self.kind.outputs, self.outputs, strict=True)
        )
        backward, kept = self.backward_pass(forward, inputs, parts.saved, keep_all=keep_all)
        backward.run(parts.backward)
        versions = tuple(
            backward.convert(gradient, self.gradient_layout(backward, inputs[i], port, gradient, scatter=zero >= 2))
            for i, port, gradient in self.gradients
        )
        read = set(versions).union(*(tally.read for tally in backward.tallies))
        residuals = self.used_residuals(forward, kept, read)
        values_read = {value for value, _ in read}
        reads = frozenset(i for i, port in enumerate(self.kind.inputs) if port.value in values_read)
        activations = [self.kind.inputs[i] for i in reads if self.kind.inputs[i].role is PortRole.ACTIVATION]
        return _Passes(
            forward=_phase(forward, len(parts.forward)),
            backward=_phase(backward, len(parts.backward)),
            residual_bytes=sum(r.bytes for r in residuals)
            + sum(int(backward.local_bytes(port.value)) for port in activations),
            output_versions=output_versions,
            residuals=residuals,
            gradient_versions=versions,
            gradient_layouts=tuple(backward.held[v].layouts[n] for v, n in versions),
            backward_reads=reads,
            held={"forward": forward.held, "backward": backward.held},
        )

    def new_pass(self, inputs: Sequence[Layout]) -> Pass:
        """A pass that holds the layer's inputs."""
        planner = Pass.within(self.setting)
        for port, layout in zip(self.kind.inputs, inputs, strict=True):
            planner.hold(port.value, layout)
        return planner

    def backward_pass(
        self, forward: Pass, inputs: Sequence[Layout], saved: Sequence[int], *, keep_all: bool
    ) -> tuple[Pass, dict[int, list[int]]]:
        """A pass that starts from inputs, kept values and cotangents; and per kept value, the versions at hand.

        Without remat, kept values are at hand in every version that forward made, so that backward repeats no
        communication; with remat, in the smallest.
        """
        backward = self.new_pass(inputs)
        versions: dict[int, list[int]] = {}
        for value in saved:
            layouts = forward.held[value].layouts
            usable = [i for i, layout in enumerate(layouts) if PENDING not in layout]
            if not usable:
                target = tuple(NOWHERE if p == PENDING else p for p in layouts[0])
                usable = [forward.convert(value, target)[1]]
            if not keep_all:
                usable = [min(usable, key=lambda i: forward.local_bytes(value, i))]
            versions[value] = usable
            held = forward.held[value]
            backward.held[value] = self.setting.state(
                tuple(held.layouts[i] for i in usable), lazy=held.lazy, zero=held.zero
            )
        for port, layout in zip(self.kind.outputs, self.outputs, strict=True):
            if port.cotangent is not None:
                backward.hold(port.cotangent, layout)
        return backward, versions

    def gradient_layout(self, backward: Pass, came: Layout, port: InputPort, gradient: int, *, scatter: bool) -> Layout:
        """Activations' gradients leave as the activation came; parameters' keep sums pending until the step's end.

        To scatter: ZeRO's axes are the data axes seen again, so that what is pending over those is pending over them.
        The gradient is first relabelled so, as a version of its own, at no cost.
        """
        if port.role is not PortRole.PARAMETER:
            return came
        stored = self.storage.layout(port.value, sharded=False)
        now = backward.held[gradient].layouts[0]
        pending = tuple(PENDING if n == PENDING else s for n, s in zip(now, stored, strict=True))
        if not scatter:
            return pending
        backward.relabel(gradient, self.storage.mirrored(now))
        return self.storage.scattered(port.value, pending)

    @staticmethod
    def used_residuals(forward: Pass, versions: Mapping[int, list[int]], read: set[Version]) -> tuple[Residual, ...]:
        """The versions of kept values that the backward program reads."""
        kept = []
        for value, numbers in versions.items():
            held = forward.held[value]
            for position, number in enumerate(numbers):
                if (value, position) in read:
                    layout = held.layouts[number]
                    shape = forward.setting.local_shape(value, layout, held.lazy)
                    size = int(forward.local_bytes(value, number))
                    kept.append(Residual(value, number, position, layout, held.lazy, shape, size))
        return tuple(kept)


def _phase(planner: Pass, operations: int) -> PhasePlan:
    """Counts of a planned pass."""
    tallies = planner.tallies
    moved, peak = traffic(tallies)
    return PhasePlan(
        instructions=planner.instructions,
        collectives=all_collectives(tallies),
        flops=planner.flops,
        bytes=moved,
        peak_bytes=int(peak),
        operations=operations,
    )
