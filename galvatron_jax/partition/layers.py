"""Planning one layer under one strategy: layouts at its boundary, forward, residuals, backward, synchronisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from galvatron_jax.partition.counts import NONE, Counts, Tally
from galvatron_jax.partition.in_a_row import InARow
from galvatron_jax.partition.instructions import Instruction, Residual, Version
from galvatron_jax.partition.layer_plan import BoundarySpec, LayerPlan
from galvatron_jax.partition.layout import NOWHERE, PENDING, Layout, Role, Step, convert
from galvatron_jax.partition.liveness import Where
from galvatron_jax.partition.placement import Counted, Occasion, Placement
from galvatron_jax.partition.planner import Pass
from galvatron_jax.partition.remat import Split, plainest, split
from galvatron_jax.partition.scaled import MAX_MODELS, Pick, Recipes, Scaled, alike, structure
from galvatron_jax.partition.scatters import scattered_late
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.partition.setting import Held, Keep
from galvatron_jax.partition.static import StaticKind, prepare_kind
from galvatron_jax.partition.strategy_axes import AxisPlan
from galvatron_jax.spec.model import InputPort, LayerKind, PortRole
from galvatron_jax.spec.strategy import LayerStrategy, Remat


class Summand(NamedTuple):
    """How a gradient, as it is made, becomes each device's summand of a whole one."""

    steps: tuple[Step, ...]
    """Gathers, in whose place each device puts zeros for what the others have."""
    repeated: tuple[str, ...]
    """Mesh axes over which all devices have the same: all but the first put zeros."""


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
    cotangents: tuple[Layout, ...]
    """Layout per output port in which its cotangent arrives, if it has any."""
    summands: Mapping[int, Summand]
    """Per input port whose gradient is handed back as summands."""
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

    @cached_property
    def shared_versions(self) -> Mapping[Version, Version]:
        """Versions in backward that are the same in forward, with their numbers there."""
        return {
            (value, number): (value, there.layouts.index(layout))
            for value, held in self.held["backward"].items()
            if (there := self.held["forward"].get(value)) is not None and there.lazy == held.lazy
            for number, layout in enumerate(held.layouts)
            if layout in there.layouts
        }


def plan_layer(
    kind: LayerKind,
    strategy: LayerStrategy,
    *,
    mesh: Mapping[str, int],
    microbatch: int,
    model_microbatch: int,
    gradient_sum_dtype: str | None = None,
) -> LayerPlan:
    """What a layer costs under a strategy, and what will run; see `plan_local` for the parts that run.

    Args:
        kind: the layer's operations.
        strategy: which mesh axes serve what.
        mesh: axes of the stage with their prime sizes, slowest link first.
        microbatch: examples of one global micro-batch.
        model_microbatch: examples at which the kind was traced (`ModelSpec.microbatch`).
        gradient_sum_dtype: in which gradients are summed over devices (`Plan.gradient_sum_dtype`).
    """
    return plan_local(
        kind,
        strategy,
        mesh=mesh,
        microbatch=microbatch,
        model_microbatch=model_microbatch,
        gradient_sum_dtype=gradient_sum_dtype,
    ).plan


def plan_local(
    kind: LayerKind,
    strategy: LayerStrategy,
    *,
    mesh: Mapping[str, int],
    microbatch: int,
    model_microbatch: int,
    gradient_sum_dtype: str | None = None,
) -> LocalPlan:
    """Plans a layer; remembered as long as the kind lives, unless many others are planned in between."""
    occasion = Occasion(microbatch, model_microbatch, Keep.INSTRUCTIONS, gradient_sum_dtype)
    context = _context(kind, strategy, mesh, occasion)
    return context.plan(strategy.zero, strategy.remat)


def plan_series(
    kind: LayerKind,
    strategy: LayerStrategy,
    *,
    mesh: Mapping[str, int],
    microbatches: tuple[int, ...],
    model_microbatch: int,
    gradient_sum_dtype: str | None = None,
) -> tuple[LayerSeries, ...]:
    """What a layer costs under a strategy at several micro-batches, without instructions.

    Where something would be decided otherwise at the least of them than at the largest, another plan serves those up to
    the largest at which it would.

    Args:
        kind: the layer's operations.
        strategy: which mesh axes serve what.
        mesh: axes of the stage with their prime sizes, slowest link first.
        microbatches: examples of a global micro-batch, ascending.
        model_microbatch: examples at which the kind was traced (`ModelSpec.microbatch`).
        gradient_sum_dtype: in which gradients are summed over devices (`Plan.gradient_sum_dtype`).

    Returns:
        Series that cover all of them, each once, in ascending order.
    """
    occasion = Occasion(microbatches[-1], model_microbatch, Keep.COUNTS, gradient_sum_dtype)
    context = _context(kind, strategy, mesh, occasion)
    counted = context.counted(strategy.zero, strategy.remat)
    first = context.agreement.holds_from(microbatches, counted.dear)
    series = context.series(strategy.zero, counted, microbatches[first:])
    if not first:
        return (series,)
    less = plan_series(
        kind,
        strategy,
        mesh=mesh,
        microbatches=microbatches[:first],
        model_microbatch=model_microbatch,
        gradient_sum_dtype=gradient_sum_dtype,
    )
    return *less, series


def _context(kind: LayerKind, strategy: LayerStrategy, mesh: Mapping[str, int], occasion: Occasion) -> Context:
    static = prepare_kind(kind)
    axes = strategy.dp, strategy.tp, strategy.sp, strategy.sp_kind

    def make() -> Context:
        context = Context(static, strategy, mesh, occasion)
        key = structure(context) if occasion.keep is Keep.COUNTS else None
        if key is not None:
            context.among(static.memo.models.get(key, list))
        return context

    return static.memo.contexts.get((axes, tuple(mesh.items()), occasion), make)


class About(NamedTuple):
    """What backward's counts depend on besides the pass itself; see `Pass.counts`."""

    handed_on: frozenset[Version]
    given: Sequence[Tally]
    at_once: frozenset[Version]
    in_a_row: InARow | None
    """With forward, where the layer ends in the loss."""
    scattered: tuple[tuple[int, int], ...]
    """Ports of parameters whose gradients leave scattered, with these, in the order in which they are made."""
    picks: tuple[Pick, ...]
    """Versions picked for their size, to go on with in backward."""


@dataclass(frozen=True, eq=False)
class Passes:
    """The two passes over a layer, which ZeRO stages share that differ in how the optimizer's state is stored alone."""

    forward: Pass
    backward: Pass
    counted: Counted
    kept: tuple[tuple[int, int, int], ...]
    """Values that cross, with the number of their version in forward and in backward."""
    output_versions: tuple[Version, ...]
    gradient_versions: tuple[Version, ...]
    backward_reads: frozenset[int]
    scattered_at_once: frozenset[int]
    about: About

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
class Through:
    """Both passes through a layer, gradients left as they are made."""

    forward: Pass
    backward: Pass
    counts: Counts
    """Of forward."""
    versions: Mapping[int, list[int]]
    """Per kept value, forward's numbers of the versions at hand in backward."""
    picks: tuple[Pick, ...]
    """Which of those were picked for their size."""
    operations: int
    """Of backward."""
    passes: dict[tuple[bool, bool], Passes] = field(default_factory=dict)
    """To the end, gradients scattered or not, work repeated or not."""


class Context(Placement):
    """A placement with its passes."""

    def __init__(
        self, static: StaticKind, strategy: LayerStrategy, mesh: Mapping[str, int], occasion: Occasion
    ) -> None:
        super().__init__(static, strategy, mesh, occasion)
        self.led: dict[tuple[int, Remat], Passes] = {}
        """Passes that others may follow, by ZeRO stage and remat policy."""
        self._models: list[Context] | None = None
        """Contexts of its structure that lead others; None where none can follow."""
        self._scaled: dict[int, Scaled] = {}
        """By the identity of a model."""
        self._alike: dict[tuple[int, bool], bool] = {}
        """By the identity of a model and whether parameters are stored apart."""
        self._counted: dict[tuple[int, Remat], Counted] = {}
        self._forwards: dict[tuple, tuple[Pass, Counts]] = {}
        self._throughs: dict[tuple, Through] = {}
        self._plans: dict[tuple[int, Remat], LocalPlan] = {}

    @cached_property
    def recipes(self) -> Recipes:
        """What its passes count for, at any sizes."""
        return Recipes(self.setting, [port.value for port in self.kind.inputs])

    def among(self, models: list[Context]) -> None:
        """Lets it follow others of its structure, or lead them; see `scaled`."""
        self._models = models

    def counted(self, zero: int, remat: Remat) -> Counted:
        """What the passes at a ZeRO stage with a remat policy count for."""
        # ZeRO 1 has the passes of 0.
        key = 0 if zero == 1 else zero, plainest(self.static, remat)
        if key not in self._counted:
            self._counted[key] = self._followed(*key) or self._lead(*key)
        return self._counted[key]

    def _followed(self, zero: int, remat: Remat) -> Counted | None:
        """As it follows from a model's; None where no model has such passes, or all would choose otherwise here."""
        for model in self._models or ():
            passes = model.led.get((zero, remat))
            if passes is not None and self._is_alike(model, stored=zero >= 2):
                found = self._scaled_from(model).counted(passes)
                if found is not None:
                    return found
        return None

    def _is_alike(self, model: Context, *, stored: bool) -> bool:
        key = id(model), stored
        if key not in self._alike:
            self._alike[key] = alike(model, self, stored=stored)
        return self._alike[key]

    def _scaled_from(self, model: Context) -> Scaled:
        if id(model) not in self._scaled:
            self._scaled[id(model)] = Scaled(self.setting, model.setting, model.recipes)
        return self._scaled[id(model)]

    def _lead(self, zero: int, remat: Remat) -> Counted:
        if self._models is not None and not self.led and len(self._models) < MAX_MODELS:
            self._models.append(self)
        passes = self.led[zero, remat] = self.passes(zero, remat)
        return passes.counted

    # ------------------------------------------------------------------------------------------ plans

    def plan(self, zero: int, remat: Remat) -> LocalPlan:
        """The layer's plan at a ZeRO stage with a remat policy."""
        key = zero, plainest(self.static, remat)
        if key not in self._plans:
            self._plans[key] = self._plan(*key)
        return self._plans[key]

    def _plan(self, zero: int, remat: Remat) -> LocalPlan:
        passes = self.passes(zero, remat)
        stored = self.stored(zero, passes.counted.gradient_layouts)
        forward, backward = (
            counts.at(self.microbatch, self.microbatch, run.instructions)
            for counts, run in zip(passes.counted.counts, (passes.forward, passes.backward), strict=True)
        )
        plan = LayerPlan(
            forward=forward,
            backward=backward,
            residual_bytes=sum(passes.counted.residual_bytes),
            parameters=tuple(parameter.plan for parameter in stored.values()),
            inputs=self.ports.input_specs(sharded=zero == 3),
            outputs=self.output_specs,
            notes=self.kind.notes,
            kept_inputs=tuple((port, stays + grows) for port, stays, grows in passes.counted.kept_inputs),
        )
        return LocalPlan(
            static=self.static, plan=plan, axes=self.axes, sizes=self.sizes,
            inputs=self.ports.inputs(sharded=zero == 3), outputs=self.ports.outputs,
            forward=forward.instructions, backward=backward.instructions,
            output_versions=passes.output_versions, residuals=passes.residuals(),
            gradient_versions=passes.gradient_versions, gradient_layouts=passes.counted.gradient_layouts,
            cotangents=self.ports.cotangents, summands=self._summands(passes.counted.gradient_layouts),
            sync={i: parameter.sync for i, parameter in stored.items()},
            publish={i: parameter.publish for i, parameter in stored.items()},
            backward_reads=passes.backward_reads, scattered_at_once=passes.scattered_at_once,
            held={"forward": passes.forward.held, "backward": passes.backward.held},
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ forward and backward

    def passes(self, zero: int, remat: Remat) -> Passes:
        """Both passes. ZeRO 0 and 1 keep gradients as they are made, 2 scatters them, 3 gathers parameters as well."""
        key = scatter, repeats = zero >= 2, remat is not Remat.NONE
        through = self.through(remat, sharded=zero == 3, scatter=scatter)
        if key not in through.passes:
            through.passes[key] = self._hand_over(through, sharded=zero == 3, scatter=scatter, repeats=repeats)
        return through.passes[key]

    def through(self, remat: Remat, *, sharded: bool, scatter: bool) -> Through:
        """Both passes but for what happens to gradients at the end, parameters stored sharded or not.

        Gradients of tables may be made scattered if they are to be.
        """
        parts, keep_all = split(self.static, remat), remat is Remat.NONE
        homes = self.storage.homes if scatter else {}
        key = parts.key, sharded, keep_all and bool(parts.saved), bool(homes)
        if key not in self._throughs:
            forward, counts = self._forward(parts, sharded=sharded)
            done = forward.length
            backward, versions, picks = self._start_backward(forward, parts.saved, sharded, keep_all=keep_all)
            backward.homes = homes
            backward.run(parts.backward)
            if forward.length > done:
                counts = forward.counts(len(parts.forward))
            self._throughs[key] = Through(forward, backward, counts, versions, picks, len(parts.backward))
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
    ) -> tuple[Pass, dict[int, list[int]], tuple[Pick, ...]]:
        """A pass that starts from inputs, kept values and cotangents; per kept value, the versions at hand; and picks.

        Without remat, kept values are at hand in every version that forward made, so that backward repeats no
        communication; with remat, in the smallest.
        """
        backward = self._new_pass(sharded=sharded)
        versions: dict[int, list[int]] = {}
        picks: list[Pick] = []
        for value in saved:
            layouts = forward.held[value].layouts
            usable = [i for i, layout in enumerate(layouts) if PENDING not in layout]
            if not usable:
                target = tuple(NOWHERE if p == PENDING else p for p in layouts[0])
                usable = [forward.convert(value, target)[1]]
            if not keep_all:
                pick = Pick(value, forward.held[value], tuple(usable))
                picks.append(pick)
                usable = [pick.smallest(self.setting)]
            versions[value] = usable
            held = forward.held[value]
            backward.held[value] = self.setting.state(
                tuple([held.layouts[i] for i in usable]), lazy=held.lazy, zero=held.zero
            )
        for port, layout in zip(self.kind.outputs, self.ports.cotangents, strict=True):
            if port.cotangent is not None:
                backward.hold(port.cotangent, layout)
        return backward, versions, tuple(picks)

    def _hand_over(self, through: Through, *, sharded: bool, scatter: bool, repeats: bool) -> Passes:
        """Gradients brought into the layouts in which they leave, and all counted."""
        forward, backward = through.forward, through.backward.fork()
        inputs = self.ports.inputs(sharded=sharded)
        gradients = tuple(
            backward.convert(gradient, self._gradient_layout(backward, inputs[i], port, gradient, scatter=scatter))
            for i, port, gradient in self.gradients
        )
        onward = frozenset(
            version
            for version, (_, port, _) in zip(gradients, self.gradients, strict=True)
            if port.role is not PortRole.PARAMETER
        )
        # XLA converts a weight's gradient in the product that makes it, however long it then waits to be scattered.
        weights = frozenset((value, 0) for _, port, value in self.gradients if port.role is PortRole.PARAMETER)
        ends = any(port.role is PortRole.LOSS for port in self.kind.outputs)
        about = About(
            handed_on=onward,
            given=self._given(through, repeats=repeats),
            at_once=weights,
            in_a_row=InARow(forward, backward, onward) if ends else None,
            scattered=self._gradients_as_made() if scatter else (),
            picks=through.picks,
        )
        sizes = {port: int(backward.local_bytes(gradient)) for port, gradient in about.scattered}
        late = scattered_late(sizes)
        counts = replace(
            backward.counts(through.operations, onward, about.given, weights),
            unscattered_bytes=sum([sizes[port] for port in late]),
            through_peaks=about.in_a_row.peaks() if about.in_a_row is not None else (),
        )
        read = counts.read | frozenset(gradients)
        kept = tuple(
            [
                (value, number, position)
                for value, numbers in through.versions.items()
                for position, number in enumerate(numbers)
                if (value, position) in read
            ]
        )
        reads = frozenset(
            i
            for i, port in enumerate(self.kind.inputs)
            if any((port.value, version) in read for version in range(len(backward.held[port.value].layouts)))
        )
        residual_bytes, kept_inputs = self._waiting(forward, backward, kept, reads)
        return Passes(
            forward=forward,
            backward=backward,
            counted=Counted(
                counts=(through.counts, counts),
                residual_bytes=residual_bytes,
                kept_inputs=kept_inputs,
                gradient_layouts=tuple([backward.held[value].layouts[number] for value, number in gradients]),
                dear=(*forward.dear, *backward.dear),
            ),
            kept=kept,
            output_versions=self._output_versions(forward),
            gradient_versions=gradients,
            backward_reads=reads,
            scattered_at_once=frozenset(sizes) - late,
            about=about,
        )

    def _waiting(
        self, forward: Pass, backward: Pass, kept: Sequence[tuple[int, int, int]], reads: frozenset[int]
    ) -> tuple[tuple[int, int], tuple[tuple[int, int, int], ...]]:
        """Bytes of what waits for backward, of values and of inputs, and those of each input; see `Counted`."""
        total = [0, 0]
        for value, number, _ in kept:
            total[forward.grows(value)] += int(forward.local_bytes(value, number))
        inputs = []
        for index in sorted(reads):
            port = self.kind.inputs[index]
            if port.role is PortRole.ACTIVATION:
                size, grows = int(backward.local_bytes(port.value)), backward.grows(port.value)
                total[grows] += size
                inputs.append((index, 0 if grows else size, size if grows else 0))
        return (total[0], total[1]), tuple(inputs)

    def _given(self, through: Through, *, repeats: bool) -> list[Tally]:
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

    def _gradients_as_made(self) -> tuple[tuple[int, int], ...]:
        """Parameters' ports with their gradients, in the order in which backward makes these."""
        made = sorted((gradient, i) for i, port, gradient in self.gradients if port.role is PortRole.PARAMETER)
        return tuple([(i, gradient) for gradient, i in made])

    def _output_versions(self, forward: Pass) -> tuple[Version, ...]:
        """Versions in which forward hands out the layer's outputs: they are there."""
        pairs = zip(self.kind.outputs, self.ports.outputs, strict=True)
        return tuple(forward.convert(port.value, layout) for port, layout in pairs)

    def _summands(self, gradient_layouts: Sequence[Layout]) -> dict[int, Summand]:
        """By input port; see `LocalPlan.summands`."""
        found = {}
        for (i, port, gradient), layout in zip(self.gradients, gradient_layouts, strict=True):
            if port.summands:
                whole = tuple([PENDING if place == PENDING else NOWHERE for place in layout])
                frame = self.setting.frame(gradient, frozenset())
                pairs = zip(self.axes.axes, layout, strict=True)
                alike = [axis for axis, place in pairs if place == NOWHERE and axis.role is not Role.STORAGE]
                names = tuple([name for axis in alike for name in axis.names])
                found[i] = Summand(tuple(convert(self.axes.axes, frame, layout, whole)), names)
        return found

    def _gradient_layout(
        self, backward: Pass, came: Layout, port: InputPort, gradient: int, *, scatter: bool
    ) -> Layout:
        """Activations' gradients leave as the activation came; parameters' keep sums pending until the step's end.

        What is handed back as summands leaves as it is made.

        To scatter: ZeRO's axes are the data axes seen again, so that what is pending over those is pending over them.
        The gradient is first relabelled so, as a version of its own, at no cost.
        """
        if port.summands:
            return backward.held[gradient].layouts[0]
        if port.role is not PortRole.PARAMETER:
            return came
        stored = self.storage.layout(port.value, sharded=False)
        now = backward.held[gradient].layouts[0]
        pending = tuple(PENDING if n == PENDING else s for n, s in zip(now, stored, strict=True))
        if not scatter:
            return pending
        backward.relabel(gradient, self.storage.mirrored(now))
        return self.storage.scattered(port.value, pending)
