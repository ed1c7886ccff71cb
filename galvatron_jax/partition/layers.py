"""Planning one layer under one strategy: layouts at its boundary, forward, residuals, backward, synchronisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from galvatron_jax.partition.agreement import Agreement
from galvatron_jax.partition.counts import NONE, Amount, Counts, Tally, largest
from galvatron_jax.partition.instructions import Instruction, Residual, Version
from galvatron_jax.partition.layer_plan import BoundarySpec, LayerPlan, ParameterPlan
from galvatron_jax.partition.layout import NOWHERE, PENDING, Layout, Step
from galvatron_jax.partition.liveness import Named, Where
from galvatron_jax.partition.parameters import Storage, StoredParameter
from galvatron_jax.partition.planner import Pass
from galvatron_jax.partition.ports import Ports
from galvatron_jax.partition.remat import Split, split
from galvatron_jax.partition.scatters import scattered_late
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.partition.setting import Held, Keep, Setting
from galvatron_jax.partition.static import StaticKind, prepare_kind
from galvatron_jax.partition.strategy_axes import AxisPlan, plan_axes
from galvatron_jax.spec.model import InputPort, LayerKind, PortRole
from galvatron_jax.spec.strategy import LayerStrategy, Remat


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
    scattered_at_once: frozenset[int]
    """Parameter ports whose gradients are scattered before the next layer works; see `partition.scatters`."""
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
    keep = Keep.INSTRUCTIONS
    context = _context(kind, strategy, mesh, microbatch=microbatch, traced_at=model_microbatch, keep=keep)
    return context.plan(strategy.zero, strategy.remat)


def plan_series(
    kind: LayerKind,
    strategy: LayerStrategy,
    *,
    mesh: Mapping[str, int],
    microbatches: tuple[int, ...],
    model_microbatch: int,
) -> tuple[LayerSeries, ...]:
    """What a layer costs under a strategy at several micro-batches, without instructions.

    Where something would be decided otherwise at the least of them than at the largest, the range is halved.

    Args:
        kind: the layer's operations.
        strategy: which mesh axes serve what.
        mesh: axes of the stage with their prime sizes, slowest link first.
        microbatches: examples of a global micro-batch, ascending.
        model_microbatch: examples at which the kind was traced (`ModelSpec.microbatch`).

    Returns:
        Series that cover all of them, each once, in ascending order.
    """
    context = _context(kind, strategy, mesh, microbatch=microbatches[-1], traced_at=model_microbatch, keep=Keep.COUNTS)
    series = context.series(strategy.zero, strategy.remat, microbatches)
    if context.agreement.holds(microbatches):
        return (series,)
    half = len(microbatches) // 2
    return tuple(
        series
        for part in (microbatches[:half], microbatches[half:])
        for series in plan_series(kind, strategy, mesh=mesh, microbatches=part, model_microbatch=model_microbatch)
    )


def _context(
    kind: LayerKind, strategy: LayerStrategy, mesh: Mapping[str, int], *, microbatch: int, traced_at: int, keep: Keep
) -> _Context:
    static = prepare_kind(kind)
    axes = strategy.dp, strategy.tp, strategy.sp, strategy.sp_kind
    return static.memo.contexts.get(
        (axes, tuple(mesh.items()), microbatch, traced_at, keep),
        lambda: _Context(static, strategy, mesh, microbatch=microbatch, traced_at=traced_at, keep=keep),
    )


@dataclass(frozen=True, eq=False)
class _Passes:
    """The two passes over a layer, which ZeRO stages share that differ in how the optimizer's state is stored alone."""

    forward: Pass
    backward: Pass
    counts: tuple[Counts, Counts]
    kept: tuple[tuple[int, int, int], ...]
    """Values that cross, with the number of their version in forward and in backward."""
    residual_bytes: tuple[int, int]
    """What stays, and what grows with the micro-batch."""
    kept_inputs: tuple[tuple[int, int, int], ...]
    """Of it, per input port, what stays and what grows."""
    output_versions: tuple[Version, ...]
    gradient_versions: tuple[Version, ...]
    backward_reads: frozenset[int]
    scattered_at_once: frozenset[int]

    @cached_property
    def gradient_layouts(self) -> tuple[Layout, ...]:
        """In which gradients leave."""
        return tuple(self.backward.held[v].layouts[n] for v, n in self.gradient_versions)

    def residuals(self) -> tuple[Residual, ...]:
        """What crosses."""
        found = []
        for value, number, position in self.kept:
            held = self.forward.held[value]
            layout = held.layouts[number]
            shape = self.forward.setting.local_shape(value, layout, held.lazy)
            size = int(self.forward.local_bytes(value, number))
            found.append(Residual(value, number, position, layout, held.lazy, shape, size))
        return tuple(found)


@dataclass(frozen=True, eq=False)
class _Through:
    """Both passes through a layer, gradients left as they are made."""

    forward: Pass
    backward: Pass
    counts: Counts
    """Of forward."""
    versions: Mapping[int, list[int]]
    """Per kept value, forward's numbers of the versions at hand in backward."""
    operations: int
    """Of backward."""
    passes: dict[tuple[bool, bool], _Passes] = field(default_factory=dict)
    """To the end, gradients scattered or not, work repeated or not."""


class _Context:
    """A layer over some logical axes at one micro-batch: what strategies share that differ in ZeRO and remat alone."""

    def __init__(
        self,
        static: StaticKind,
        strategy: LayerStrategy,
        mesh: Mapping[str, int],
        *,
        microbatch: int,
        traced_at: int,
        keep: Keep,
    ) -> None:
        self.static, self.kind, self.program, self.microbatch = static, static.kind, static.program, microbatch
        self.sizes = static.program.sizes(self.kind.batch_factor, microbatch, traced_at)
        self.axes = plan_axes(static, strategy, mesh, self.sizes)
        self.storage = Storage(static, self.axes, self.sizes)
        growing = static.program.growing(self.kind.batch_factor, traced_at)
        self.setting = Setting(
            static.program, self.sizes, self.axes.axes, self.axes.allowed, growing=growing, keep=keep,
            outlines=static.memo.outlines,
        )  # fmt: skip
        self.ports = Ports(static, self.axes, self.sizes, strategy.sp_kind, self.storage)
        self.output_specs = self.ports.output_specs()
        self.agreement = Agreement(
            static, strategy, mesh, self.setting, self.ports, planned_at=microbatch, traced_at=traced_at
        )
        self.gradients = tuple((i, p, p.gradient) for i, p in enumerate(self.kind.inputs) if p.gradient is not None)
        self._forwards: dict[tuple, tuple[Pass, Counts]] = {}
        self._throughs: dict[tuple, _Through] = {}
        self._plans: dict[tuple[int, Remat], LocalPlan] = {}
        self._parameters: dict[tuple, tuple[ParameterPlan, ...]] = {}

    # ------------------------------------------------------------------------------------------ plans

    def plan(self, zero: int, remat: Remat) -> LocalPlan:
        """The layer's plan at a ZeRO stage with a remat policy."""
        key = zero, remat
        if key not in self._plans:
            self._plans[key] = self._plan(zero, remat)
        return self._plans[key]

    def _plan(self, zero: int, remat: Remat) -> LocalPlan:
        passes = self.passes(zero, remat)
        stored = self.stored(zero, passes.gradient_layouts)
        forward, backward = (
            counts.at(self.microbatch, self.microbatch, run.instructions)
            for counts, run in zip(passes.counts, (passes.forward, passes.backward), strict=True)
        )
        plan = LayerPlan(
            forward=forward,
            backward=backward,
            residual_bytes=sum(passes.residual_bytes),
            parameters=tuple(parameter.plan for parameter in stored.values()),
            inputs=self.ports.input_specs(sharded=zero == 3),
            outputs=self.output_specs,
            notes=self.kind.notes,
            kept_inputs=tuple((port, stays + grows) for port, stays, grows in passes.kept_inputs),
        )
        return LocalPlan(
            static=self.static, plan=plan, axes=self.axes, sizes=self.sizes,
            inputs=self.ports.inputs(sharded=zero == 3), outputs=self.ports.outputs,
            forward=forward.instructions, backward=backward.instructions,
            output_versions=passes.output_versions, residuals=passes.residuals(),
            gradient_versions=passes.gradient_versions, gradient_layouts=passes.gradient_layouts,
            sync={i: parameter.sync for i, parameter in stored.items()},
            publish={i: parameter.publish for i, parameter in stored.items()},
            backward_reads=passes.backward_reads, scattered_at_once=passes.scattered_at_once,
            held={"forward": passes.forward.held, "backward": passes.backward.held},
        )  # fmt: skip

    def series(self, zero: int, remat: Remat, microbatches: tuple[int, ...]) -> LayerSeries:
        """The plan at a ZeRO stage with a remat policy, as it grows with the micro-batch."""
        passes = self.passes(zero, remat)
        return LayerSeries(
            microbatches=microbatches,
            planned_at=self.microbatch,
            forward=passes.counts[0],
            backward=passes.counts[1],
            residual_bytes=passes.residual_bytes,
            kept_inputs=passes.kept_inputs,
            parameters=self.parameters(zero, passes.gradient_layouts),
            inputs=self.ports.input_specs(sharded=zero == 3),
            outputs=self.output_specs,
            notes=self.kind.notes,
        )

    def stored(self, zero: int, gradient_layouts: tuple[Layout, ...]) -> dict[int, StoredParameter]:
        """Each parameter's way through a step."""
        accumulated = {i: layout for (i, _, _), layout in zip(self.gradients, gradient_layouts, strict=True)}
        return {i: self.storage.parameter(i, zero=zero, accumulated=accumulated.get(i)) for i in self.static.parameters}

    def parameters(self, zero: int, gradient_layouts: tuple[Layout, ...]) -> tuple[ParameterPlan, ...]:
        """The same as planned; one object for all remat policies that leave gradients alike."""
        key = zero, gradient_layouts
        if key not in self._parameters:
            stored = self.stored(zero, gradient_layouts)
            self._parameters[key] = tuple(parameter.plan for parameter in stored.values())
        return self._parameters[key]

    # ------------------------------------------------------------------------------------------ forward and backward

    def passes(self, zero: int, remat: Remat) -> _Passes:
        """Both passes. ZeRO 0 and 1 keep gradients as they are made, 2 scatters them, 3 gathers parameters as well."""
        through = self.through(remat, sharded=zero == 3)
        key = scatter, repeats = zero >= 2, remat is not Remat.NONE
        if key not in through.passes:
            through.passes[key] = self._hand_over(through, sharded=zero == 3, scatter=scatter, repeats=repeats)
        return through.passes[key]

    def through(self, remat: Remat, *, sharded: bool) -> _Through:
        """Both passes but for what happens to gradients at the end, parameters stored sharded or not."""
        parts, keep_all = split(self.static, remat), remat is Remat.NONE
        key = parts.key, sharded, keep_all and bool(parts.saved)
        if key not in self._throughs:
            forward, counts = self._forward(parts, sharded=sharded)
            done = forward.length
            backward, versions = self._start_backward(forward, parts.saved, sharded, keep_all=keep_all)
            backward.run(parts.backward)
            if forward.length > done:
                counts = forward.counts(len(parts.forward))
            self._throughs[key] = _Through(forward, backward, counts, versions, len(parts.backward))
        return self._throughs[key]

    def _forward(self, parts: Split, *, sharded: bool) -> tuple[Pass, Counts]:
        """A forward pass that no other goes on with, and what it counts for."""
        key = parts.forward_key, sharded
        if key not in self._forwards:
            forward = self._new_pass(sharded=sharded)
            forward.run(parts.forward)
            for port, layout in zip(self.kind.outputs, self.ports.outputs, strict=True):
                forward.convert(port.value, layout)
            self._forwards[key] = forward, forward.counts(len(parts.forward))
        forward, counts = self._forwards[key]
        return forward.fork(), counts

    def _new_pass(self, *, sharded: bool) -> Pass:
        """A pass that holds the layer's inputs."""
        planner = Pass(self.setting)
        for port, layout in zip(self.kind.inputs, self.ports.inputs(sharded=sharded), strict=True):
            planner.hold(port.value, layout)
        return planner

    def _start_backward(
        self, forward: Pass, saved: Sequence[int], sharded: bool, *, keep_all: bool
    ) -> tuple[Pass, dict[int, list[int]]]:
        """A pass that starts from inputs, kept values and cotangents; and per kept value, the versions at hand.

        Without remat, kept values are at hand in every version that forward made, so that backward repeats no
        communication; with remat, in the smallest.
        """
        backward = self._new_pass(sharded=sharded)
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
                tuple([held.layouts[i] for i in usable]), lazy=held.lazy, zero=held.zero
            )
        for port, layout in zip(self.kind.outputs, self.ports.outputs, strict=True):
            if port.cotangent is not None:
                backward.hold(port.cotangent, layout)
        return backward, versions

    def _hand_over(self, through: _Through, *, sharded: bool, scatter: bool, repeats: bool) -> _Passes:
        """Gradients brought into the layouts in which they leave, and all counted."""
        forward, backward = through.forward, through.backward.fork()
        inputs = self.ports.inputs(sharded=sharded)
        gradients = tuple(
            backward.convert(gradient, self._gradient_layout(backward, inputs[i], port, gradient, scatter=scatter))
            for i, port, gradient in self.gradients
        )
        handed = frozenset(gradients)
        onward = frozenset(
            version
            for version, (_, port, _) in zip(gradients, self.gradients, strict=True)
            if port.role is not PortRole.PARAMETER
        )
        # XLA converts a weight's gradient in the product that makes it, however long it then waits to be scattered.
        weights = frozenset((value, 0) for _, port, value in self.gradients if port.role is PortRole.PARAMETER)
        counts = backward.counts(through.operations, onward, self._given(through, repeats=repeats), weights)
        at_once = frozenset[int]()
        if scatter:
            sizes = self._gradient_bytes(backward)
            late = scattered_late(sizes)
            at_once = frozenset(sizes) - late
            counts = replace(counts, unscattered_bytes=sum([sizes[port] for port in late]))
        if any(port.role is PortRole.LOSS for port in self.kind.outputs):
            counts = replace(counts, through_peaks=self._through_peaks(forward, backward, onward))
        kept = tuple(
            [
                (value, number, position)
                for value, numbers in through.versions.items()
                for position, number in enumerate(numbers)
                if (value, position) in counts.read or (value, position) in handed
            ]
        )
        reads = frozenset(
            i
            for i, port in enumerate(self.kind.inputs)
            if any(
                (port.value, version) in counts.read or (port.value, version) in handed
                for version in range(len(backward.held[port.value].layouts))
            )
        )
        residual_bytes = [0, 0]
        for value, number, _ in kept:
            residual_bytes[forward.grows(value)] += int(forward.local_bytes(value, number))
        inputs_kept = []
        for index in sorted(reads):
            port = self.kind.inputs[index]
            if port.role is PortRole.ACTIVATION:
                size, grows = int(backward.local_bytes(port.value)), backward.grows(port.value)
                residual_bytes[grows] += size
                inputs_kept.append((index, 0 if grows else size, size if grows else 0))
        return _Passes(
            forward=forward,
            backward=backward,
            counts=(through.counts, counts),
            kept=kept,
            residual_bytes=(residual_bytes[0], residual_bytes[1]),
            kept_inputs=tuple(inputs_kept),
            output_versions=self._output_versions(forward),
            gradient_versions=gradients,
            backward_reads=reads,
            scattered_at_once=at_once,
        )

    def _given(self, through: _Through, *, repeats: bool) -> list[Tally]:
        """What backward finds in memory beside all that forward kept: cotangents, and its part of loops' arrays.

        A loop takes each layer's inputs and residuals out of those of all layers. Where backward repeats work, they
        pass an optimisation barrier (`runtime.execution`), all at once; elsewhere they are taken where they are read.
        """
        forward, backward = through.forward, through.backward
        place = Where.WHOLE if repeats else Where.FUSED
        roles = (PortRole.ACTIVATION, PortRole.PARAMETER) if repeats else (PortRole.ACTIVATION,)
        seeds = [port.cotangent for port in self.kind.outputs if port.cotangent is not None]
        inputs = [port.value for port in self.kind.inputs if port.role in roles]
        found = [
            *[((value, 0), backward.local_bytes(value), backward.grows(value), Where.WHOLE) for value in seeds],
            *[((value, 0), backward.local_bytes(value), backward.grows(value), place) for value in inputs],
            *[
                ((value, position), forward.local_bytes(value, number), forward.grows(value), place)
                for value, numbers in through.versions.items()
                for position, number in enumerate(numbers)
            ],
        ]
        return [Tally((), ((version, size, grows),), False, NONE, place=where) for version, size, grows, where in found]

    def _gradient_bytes(self, backward: Pass) -> dict[int, int]:
        """Local bytes of the parameters' gradients as backward makes them, in that order, by port."""
        made = sorted((gradient, i) for i, port, gradient in self.gradients if port.role is PortRole.PARAMETER)
        return {i: int(backward.local_bytes(gradient)) for gradient, i in made}

    @staticmethod
    def _through_peaks(forward: Pass, backward: Pass, onward: frozenset[Version]) -> tuple[Amount, ...]:
        """Peaks of forward and backward in a row: what both make in the same layout is there once."""

        def by_layout() -> Named:
            staying = frozenset((v, backward.held[v].layouts[n]) for v, n in onward)
            return Named([*_by_layout(forward), *_by_layout(backward)], staying)

        forms = (*forward.forms, -1, *backward.forms)
        known = forward.setting.outlines.lifetimes(forms, onward, _same(forward, backward))
        return largest(known.peaks(forward.tallies + backward.tallies, by_layout))

    def _output_versions(self, forward: Pass) -> tuple[Version, ...]:
        """Versions in which forward hands out the layer's outputs: they are there."""
        pairs = zip(self.kind.outputs, self.ports.outputs, strict=True)
        return tuple(forward.convert(port.value, layout) for port, layout in pairs)

    def _gradient_layout(
        self, backward: Pass, came: Layout, port: InputPort, gradient: int, *, scatter: bool
    ) -> Layout:
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


def _same(forward: Pass, backward: Pass) -> tuple[tuple[int, int, int], ...]:
    """Values with the numbers of versions of theirs that have one layout in forward and in backward."""
    return tuple(
        [
            (value, there.layouts.index(layout), number)
            for value, held in backward.held.items()
            if (there := forward.held.get(value)) is not None
            for number, layout in enumerate(held.layouts)
            if layout in there.layouts
        ]
    )


def _by_layout(run: Pass) -> list[Tally]:
    """Tallies of a pass with its versions by layout, not by number."""

    def known(version: Version) -> tuple:
        return version[0], run.held[version[0]].layouts[version[1]]

    return [
        tally._replace(
            read=tuple([known(version) for version in tally.read]),
            made=tuple([(known(version), size, grows) for version, size, grows in tally.made]),
        )
        for tally in run.tallies
    ]
