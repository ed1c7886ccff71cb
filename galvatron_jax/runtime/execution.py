"""One micro-batch of the *local* executor: forward and backward of all runs, on local arrays.

Runs inside a `shard_map` that is manual over every mesh axis. Nothing here is differentiated by JAX: each layer's
backward program was traced with its forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from galvatron_jax.partition.boundary import boundary_steps
from galvatron_jax.partition.instructions import Version
from galvatron_jax.partition.layer_plan import BoundarySpec
from galvatron_jax.partition.remat import plainest
from galvatron_jax.partition.static import StaticKind
from galvatron_jax.runtime.emit import LayerProgram, run_steps
from galvatron_jax.runtime.packing import Rows
from galvatron_jax.runtime.runs import Layouts, Run, Way
from galvatron_jax.runtime.storage import Storage, make_storage
from galvatron_jax.runtime.totals import Gradients, Totals
from galvatron_jax.spec.model import PortRole
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.strategy import LayerStrategy, Remat
from galvatron_jax.trace.model import Traced


class Repeats(Enum):
    """What a layer's backward program does again of what its forward did."""

    NOTHING = "nothing"
    GATHERS = "gathers"
    """Of parameters: ZeRO-3."""
    WORK = "work"
    """Rematerialisation."""

    @staticmethod
    def of(static: StaticKind, strategy: LayerStrategy) -> Repeats:
        """What layers of a kind under a strategy repeat."""
        if plainest(static, strategy.remat) is not Remat.NONE:
            return Repeats.WORK
        return Repeats.GATHERS if strategy.zero == 3 else Repeats.NOTHING


@dataclass
class Tape:
    """What the forward pass of a run leaves for its backward pass."""

    inputs: list[Any]
    """Per port: a value for all layers, or one for each, stacked or in `Rows`; None where backward reads none."""
    residuals: list[Any]
    made: dict[Version, Any] = field(default_factory=dict)
    """By the last layer's forward, whose backward may follow at once."""


@dataclass
class MicrobatchResult:
    """What one micro-batch gives."""

    values: dict[str, Any]
    """Loss, weight, aux and state by sink, as `ModelSpec.results` names them."""
    gradients: Gradients


@dataclass(frozen=True)
class Executor:
    """Runs micro-batches of a planned model."""

    traced: Traced
    runs: Sequence[Run]
    layouts: Layouts
    storage: Storage
    repeats: Sequence[Repeats] = field(default=())
    """Per run."""
    ordered: bool = True
    """Whether what a loop keeps for the loop backward has its order of dims prescribed.

    XLA's GPU compiler may want another order in each, and would copy all layers' at once in between. On CPUs, where it
    is not memory that is short, the layers' own copies cost more: 3 % of a step of `benchmarks/step_overhead.py`.
    """

    def program(self, run: Run) -> LayerProgram:
        """The run's layer program."""
        return LayerProgram(run.local, self.traced.programs[run.kind].flat)

    # ------------------------------------------------------------------------------------------ layouts

    def local_shape(self, shape: Sequence[int], spec: BoundarySpec) -> tuple[int, ...]:
        """Local shape of a value laid out as `spec` says."""
        mesh = self.layouts.mesh
        return tuple(n // math.prod(mesh[a] for a in axes) for n, axes in zip(shape, spec, strict=True))

    def move(self, x: Any, shape: Sequence[int], source: BoundarySpec, target: BoundarySpec, *, lead: int = 0) -> Any:
        """Changes the layout of a local array."""
        if source == target:
            return x
        steps = boundary_steps(tuple(shape), source, target, mesh=self.layouts.mesh)
        return run_steps(x, steps, self.local_shape(shape, target), lead=lead)

    def fetch(self, store: Mapping[str, Any], reference: str, target: BoundarySpec) -> Any:
        """A waiting value in the layout that a layer wants."""
        return self.move(store[reference], self.layouts.shapes[reference], self.layouts.specs[reference], target)

    # ------------------------------------------------------------------------------------------ one micro-batch

    def microbatch(
        self,
        parameters: Mapping[str, Any],
        state: Mapping[str, Any],
        batch: Mapping[str, Any],
        totals: Gradients | None = None,
    ) -> MicrobatchResult:
        """Loss, new state and gradients of one micro-batch.

        The gradients are those of the loss times its weight, so that sums over micro-batches stay exact.

        Args:
            parameters: local stored arrays by key.
            state: state leaves by path, whole.
            batch: local leaves of the micro-batch by path, their batch dim over the plan's batch axes.
            totals: gradients of earlier micro-batches, to which these are added in place.
        """
        store = self.store(state, batch)
        tapes = self.all_forward(parameters, store)
        values = {sink: store[reference] for sink, reference in self.traced.spec.results}
        sums = Totals(dict(totals or {}))
        self.all_backward(tapes, self.seed(values), sums)
        return MicrobatchResult(values, sums.gradients)

    def store(self, state: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        """What layers read from outside, by reference: leaves of the batch, constants and state."""
        store: dict[str, Any] = {f"batch:{k}": v for k, v in batch.items()}
        store |= self.traced.constants
        self._add_state(store, state)
        return store

    def all_forward(
        self, parameters: Mapping[str, Any], store: dict[str, Any], *, residuals_only: bool = False
    ) -> list[Tape]:
        """Runs all layers; values go into the store, but for those that nothing here reads if only backward is next."""
        return [
            self.forward(number, run, parameters, store, self.read_here(number) if residuals_only else None)
            for number, run in enumerate(self.runs)
        ]

    def read_here(self, number: int) -> frozenset[int] | None:
        """Output ports of a run that later runs read; None for a loop, which hands all of them on."""
        run = self.runs[number]
        if run.length > 1:
            return None
        read = {reference for later in self.runs[number + 1 :] for way in later.inputs for reference in way.references}
        return frozenset(port for port, references in enumerate(run.outputs) if read.intersection(references))

    def all_backward(self, tapes: Sequence[Tape], cotangents: dict[str, Any], totals: Totals) -> None:
        """Runs all layers backward, and adds their gradients up.

        Args:
            tapes: as forward left them.
            cotangents: by reference; those of what was read from outside are added.
            totals: what gradients are added to.
        """
        for number in range(len(self.runs) - 1, -1, -1):
            self.backward(number, self.runs[number], tapes[number], cotangents, totals)
            made = totals.of_run(number)
            if number and made:
                # XLA would put off what nothing waits for, and keep what it is made of: the logits' cotangents.
                made, tied = lax.optimization_barrier((made, cotangents))
                cotangents.update(tied)
                totals.put(made)

    def _add_state(self, store: dict[str, Any], state: Mapping[str, Any]) -> None:
        store |= {f"state:{k}": v for k, v in state.items()}
        wanted = {r for run in self.runs for way in run.inputs for r in way.references if r.startswith("state:")}
        wanted |= {r for _, r in self.traced.spec.results if r.startswith("state:")}
        for reference in wanted - set(store):
            path, _, index = reference.removeprefix("state:").rpartition("[")
            store[reference] = state[path][int(index[:-1])]

    def seed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The loss's cotangent by reference: the weight of the micro-batch.

        It waits for the loss, which XLA would else make at the end, and keep until then what it is made of.
        """
        loss = values["loss"]
        weight = jnp.asarray(values.get("weight", 1.0)).astype(loss.dtype)
        return {dict(self.traced.spec.results)["loss"]: lax.optimization_barrier((weight, loss))[0]}

    # ------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        number: int,
        run: Run,
        parameters: Mapping[str, Any],
        store: dict[str, Any],
        ports: frozenset[int] | None = None,
    ) -> Tape:
        """Runs the layers of a run; puts what others read into the store: some output ports, or all."""
        inputs = [self.input(number, run, port, parameters, store) for port in range(len(run.inputs))]
        if run.length == 1:
            made: dict[Version, Any] | None = {} if number == len(self.runs) - 1 else None
            outputs, residuals = self.program(run).forward(inputs, ports, made)
            for port, x in enumerate(outputs):
                if x is not None:
                    self._keep(run, port, store, [x])
            return Tape([self._needed(run, p, x) for p, x in enumerate(inputs)], residuals, made or {})
        return self.forward_loop(run, inputs, store)

    def input(self, number: int, run: Run, port: int, parameters: Mapping[str, Any], store: Mapping[str, Any]) -> Any:
        """What an input port of a run reads, stacked over its layers where each has its own."""
        way = run.inputs[port]
        if (number, port) in self.storage.owned:
            return self._local_parameter(run, port, parameters[self.storage.owned[number, port]])
        if (number, port) in self.storage.tied:
            return self._tied_parameter(number, run, port, parameters)
        target = run.local.input_spec(port)
        if way.way is Way.STACKED:
            return jnp.stack([self.fetch(store, r, target) for r in way.references])
        return self.fetch(store, way.references[0], target)

    def _local_parameter(self, run: Run, port: int, x: Any) -> Any:
        value = run.local.static.kind.inputs[port].value
        shape = self.program(run).shape(value, run.local.inputs[port])
        if isinstance(x, Rows):
            return x.reshaped(shape)
        return jnp.reshape(x, x.shape[:1] + shape if run.inputs[port].way is Way.STACKED else shape)

    def _tied_parameter(self, number: int, run: Run, port: int, parameters: Mapping[str, Any]) -> Any:
        """A parameter that an earlier layer owns, from its layout there."""
        group = self.storage.group(self.storage.tied[number, port])
        reference = run.inputs[port].references[0]
        x = parameters[group.key]
        x = x[group.references.index(reference)] if group.stacked else x
        wanted = spec_of(run, port, optimizer=False)
        return self.move(x, group.shape, group.boundary(), wanted)

    def _keep(self, run: Run, port: int, store: dict[str, Any], arrays: Sequence[Any]) -> None:
        """Puts an output of each layer into the store, in the layout in which it waits."""
        for reference, x in zip(run.outputs[port], arrays, strict=True):
            source = run.local.output_spec(port)
            target = self.layouts.specs[reference]
            store[reference] = self.move(x, self.layouts.shapes[reference], source, target)

    def _needed(self, run: Run, port: int, x: Any) -> Any:
        return x if run.local.reads_input(port) else None

    def forward_loop(self, run: Run, inputs: list[Any], store: dict[str, Any]) -> Tape:
        """Runs several layers, from the arrays of the run's input ports; puts what others read into the store."""
        carried = [p for p, way in enumerate(run.inputs) if way.way is Way.CARRY]
        stacked = [p for p, way in enumerate(run.inputs) if way.way is Way.STACKED]
        outside = [q for q, outside in enumerate(run.read_outside) if outside]
        program, layers = self.program(run), Layers.of({p: inputs[p] for p in stacked}, run.length)

        def body(carry: list[Any], slices: Any) -> tuple[list[Any], Any]:
            ports = dict(enumerate(inputs)) | dict(zip(carried, carry, strict=True)) | layers.ports(slices)
            outputs, residuals = program.forward([ports[p] for p in range(len(inputs))])
            waiting = [self._waiting(run, q, x) for q, x in enumerate(outputs)]
            kept = [self._needed(run, p, ports[p]) for p in carried]
            residuals = [self._between_loops(x) for x in residuals]
            return [waiting[run.inputs[p].output] for p in carried], (residuals, kept, [waiting[q] for q in outside])

        final, (residuals, kept, made) = lax.scan(body, [inputs[p] for p in carried], layers.slices, length=run.length)
        handed_on = {run.inputs[p].output for p in carried}
        for q, x in zip(outside, made, strict=True):
            first = self.layouts.specs[run.outputs[q][0]]
            for index, reference in enumerate(run.outputs[q][:-1] if q in handed_on else run.outputs[q]):
                shape, waits = self.layouts.shapes[reference], self.layouts.specs[reference]
                store[reference] = self.move(x[index], shape, first, waits)
        for p, x in zip(carried, final, strict=True):
            first, *_, last = run.outputs[run.inputs[p].output]
            store[last] = self.move(x, self.layouts.shapes[last], self.layouts.specs[first], self.layouts.specs[last])
        tape = [self._needed(run, p, x) for p, x in enumerate(inputs)]
        for p, x in zip(carried, kept, strict=True):
            tape[p] = x
        return Tape(tape, residuals)

    def _waiting(self, run: Run, port: int, x: Any) -> Any:
        reference = run.outputs[port][0]
        return self.move(x, self.layouts.shapes[reference], run.local.output_spec(port), self.layouts.specs[reference])

    # ------------------------------------------------------------------------------------------ backward

    def backward(self, number: int, run: Run, tape: Tape, cotangents: dict[str, Any], totals: Totals) -> None:
        """Runs the layers of a run backward; takes cotangents of what it made, adds those of what it read.

        Args:
            number: of the run.
            run: the run.
            tape: what its forward left.
            cotangents: by reference.
            totals: what the gradients of parameters are added to.
        """
        ports = [p for p, port in enumerate(run.local.static.kind.inputs) if port.gradient is not None]
        if not ports:
            return
        if run.length == 1:
            seeds = {q: self._seed_of(run, q, 0, cotangents) for q in self._seeded(run)}
            if number < len(self.runs) - 1:  # The last one's backward follows its forward: nothing is kept in between.
                tape = self._fenced(number, tape, seeds)
            grads = self.program(run).backward(tape.inputs, tape.residuals, seeds, tape.made)
            found = dict(zip(ports, grads, strict=True))
        else:
            found = self.backward_loop(number, run, tape, cotangents, totals)
        for p, x in found.items():
            if run.local.static.kind.inputs[p].role is PortRole.PARAMETER:
                totals.add(number, p, x)
            else:
                self._hand_back(run, p, x, cotangents)

    def _fenced(self, number: int, tape: Tape, seeds: dict[int, Any]) -> Tape:
        """Keeps XLA from doing again early what backward repeats, or from merging it with what was done before.

        Both would keep it in between. XLA peels loops, so what a loop repeats is tied to its cotangents as well.
        """
        repeats = self.repeats[number] if self.repeats else Repeats.NOTHING
        if repeats is Repeats.NOTHING or not seeds:
            return tape
        if repeats is Repeats.WORK:
            inputs, residuals, _ = lax.optimization_barrier((tape.inputs, tape.residuals, seeds))
            return Tape(inputs, residuals)
        ports = self.runs[number].local.static.kind.inputs
        gathered = {p: x for p, x in enumerate(tape.inputs) if ports[p].role is PortRole.PARAMETER}
        held, _ = lax.optimization_barrier((gathered, seeds))
        return Tape([held.get(p, x) for p, x in enumerate(tape.inputs)], tape.residuals)

    @staticmethod
    def _seeded(run: Run) -> list[int]:
        return [q for q, port in enumerate(run.local.static.kind.outputs) if port.cotangent is not None]

    def _seed_of(self, run: Run, port: int, index: int, cotangents: Mapping[str, Any]) -> Any:
        """The cotangent of an output in the layer's own layout; zero where nothing came back."""
        reference = run.outputs[port][index]
        shape, target = self.layouts.shapes[reference], run.local.output_spec(port)
        if reference not in cotangents:
            dtype = self.traced.avals[reference].dtype
            return jnp.zeros(self.local_shape(shape, target), dtype)
        return self.move(cotangents[reference], shape, self.layouts.specs[reference], target)

    def _hand_back(self, run: Run, port: int, x: Any, cotangents: dict[str, Any]) -> None:
        way = run.inputs[port]
        source = run.local.input_spec(port)
        arrays = x if way.way is Way.STACKED and run.length > 1 else [x]
        references = way.references if way.way is Way.STACKED else way.references[:1]
        for reference, y in zip(references, arrays, strict=True):
            if not reference.startswith("value:"):
                continue
            if run.local.static.kind.inputs[port].summands and not (way.way is Way.CARRY and run.length > 1):
                y = self.program(run).summand(port, y)
            y = self.move(y, self.layouts.shapes[reference], source, self.layouts.specs[reference])
            cotangents[reference] = cotangents[reference] + y if reference in cotangents else y

    def backward_loop(
        self, number: int, run: Run, tape: Tape, cotangents: Mapping[str, Any], totals: Totals
    ) -> dict[int, Any]:
        """Gradients by input port, but for those that are added to totals that there are: layer by layer, in place."""
        ways = run.inputs
        ports = [p for p, port in enumerate(run.local.static.kind.inputs) if port.gradient is not None]
        carried = [p for p in ports if ways[p].way is Way.CARRY]
        feeds = {ways[p].output: p for p in carried}
        shared = [p for p in ports if ways[p].way is Way.SHARED]
        added = [p for p in ports if ways[p].way is Way.STACKED and totals.holds(number, p)]
        stacked = [p for p in ports if ways[p].way is Way.STACKED and p not in added]
        seeded = self._seeded(run)
        layers = Layers.of({p: tape.inputs[p] for p, way in enumerate(ways) if way.way is not Way.SHARED}, run.length)
        extras = {q: x for q in seeded if (x := self._stacked_seeds(run, q, cotangents, q in feeds)) is not None}
        program, kind = self.program(run), run.local.static.kind

        def body(carry: tuple[dict, list, Any], xs: tuple[Any, list, dict, Any]) -> tuple[tuple, list]:
            back, sums, changed = carry
            slices, residuals, outer, layer = xs
            inputs = list(tape.inputs)
            for p, x in layers.ports(slices).items():
                inputs[p] = x
            seeds = {q: self._back(run, q, back[q]) for q in back}
            for q, x in outer.items():
                seeds[q] = seeds[q] + x if q in seeds else x
            fenced = self._fenced(number, Tape(inputs, [self._between_loops(x) for x in residuals]), seeds)
            grads = dict(zip(ports, program.backward(fenced.inputs, fenced.residuals, seeds), strict=True))
            back = {
                ways[p].output: program.summand(p, grads[p]) if kind.inputs[p].summands else grads[p] for p in carried
            }
            sums = [a + grads[p] for a, p in zip(sums, shared, strict=True)]
            for p in added:
                changed = totals.with_row(changed, number, p, layer, grads[p])
            return (back, sums, changed), [self._scattered(run, p, grads[p]) for p in stacked]

        first = {q: self._last_seed(run, q, cotangents) for q in feeds}
        zero = self._zero_after((first, extras))
        before = [self._zero_gradient(run, p, zero) for p in shared]
        (back, sums, changed), slices = lax.scan(
            body,
            (first, before, totals.of_run(number) if added else {}),
            (layers.slices, tape.residuals, extras, jnp.arange(run.length)),
            length=run.length,
            reverse=True,
        )
        if added:
            totals.put(changed)
        found = {p: back[ways[p].output] for p in carried}
        return found | dict(zip(shared, sums, strict=True)) | dict(zip(stacked, slices, strict=True))

    def _between_loops(self, x: Any) -> Any:
        """What passes from a loop forward to a loop backward, in its order of dims."""
        if not self.ordered or x.ndim < 2 or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
            return x
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    def _scattered(self, run: Run, port: int, x: Any) -> Any:
        """A layer's gradient of a parameter, which a loop is to store: scattered in the layer's turn, or in the next.

        XLA's GPU compiler puts what a loop only stores off into the next turn (`CollectivePipeliner`), and holds it
        twice there before it is scattered: as carried, and copied. It does not where a barrier comes in between.
        """
        return lax.optimization_barrier(x) if self.ordered and port in run.local.scattered_at_once else x

    def _zero_after(self, waits: Any) -> Any:
        """A zero that a loop's sums begin with, there only after some arrays.

        XLA's GPU compiler makes the zeros of several loops in one kernel, ahead of the first: what the last one adds to
        would be there while all the others work, with all that they keep.
        """
        zero = jnp.zeros((), jnp.float32)
        return lax.optimization_barrier((zero, waits))[0] if self.ordered else zero

    def _zero_gradient(self, run: Run, port: int, zero: Any) -> Any:
        """A zero in the shape of a gradient."""
        value, layout = run.local.gradient_of(port)
        dtype = self.traced.programs[run.kind].flat.avals[value].dtype
        return jnp.broadcast_to(zero.astype(dtype), self.program(run).shape(value, layout))

    def _last_seed(self, run: Run, port: int, cotangents: Mapping[str, Any]) -> Any:
        """Cotangent of the last layer's carried output, in the layout in which carried values wait."""
        reference, target = run.outputs[port][-1], self.layouts.specs[run.outputs[port][0]]
        whole = self.layouts.shapes[reference]
        if reference in cotangents:
            return self.move(cotangents[reference], whole, self.layouts.specs[reference], target)
        return jnp.zeros(self.local_shape(whole, target), self.traced.avals[reference].dtype)

    def _back(self, run: Run, port: int, x: Any) -> Any:
        reference = run.outputs[port][0]
        return self.move(x, self.layouts.shapes[reference], self.layouts.specs[reference], run.local.output_spec(port))

    def _stacked_seeds(self, run: Run, port: int, cotangents: Mapping[str, Any], carried: bool) -> Any | None:
        """Cotangents from outside the run, stacked over its layers; None when there are none."""
        last = run.length - 1
        own = [r for i, r in enumerate(run.outputs[port]) if r in cotangents and not (carried and i == last)]
        if not own and carried:
            return None
        rest = {r: x for r, x in cotangents.items() if r in own}
        return jnp.stack([self._seed_of(run, port, i, rest) for i in range(run.length)])


@dataclass(frozen=True)
class Layers:
    """What each layer of a loop has of its own, by input port."""

    stacks: Mapping[int, Any]
    """Stacked over the layers; None where a port is not read."""
    rows: Mapping[int, Rows]
    length: int

    @classmethod
    def of(cls, ports: Mapping[int, Any], length: int) -> Layers:
        """From what there is per port."""
        rows = {p: x for p, x in ports.items() if isinstance(x, Rows)}
        return cls({p: x for p, x in ports.items() if p not in rows}, rows, length)

    @property
    def slices(self) -> tuple[Mapping[int, Any], Any]:
        """What a scan goes over."""
        return self.stacks, jnp.arange(self.length) if self.rows else None

    def ports(self, slices: tuple[Mapping[int, Any], Any]) -> dict[int, Any]:
        """One layer's, from what the scan gives."""
        stacks, layer = slices
        return {**stacks, **{p: rows[layer] for p, rows in self.rows.items()}}


def orders_dims(device: jax.Device) -> bool:
    """Whether an executor for a device is `ordered`: where the compiler is not the one for CPUs."""
    return device.platform != "cpu"


def make_executor(
    traced: Traced, plan: Plan, runs: Sequence[Run], layouts: Layouts, *, ordered: bool = True
) -> Executor:
    """The executor of the layers of one stage; `ordered` as it says."""
    repeats = [Repeats.of(run.local.static, plan.strategies[run.start]) for run in runs]
    storage = make_storage(traced, runs, unread=runs[0].start == 0)
    return Executor(traced, runs, layouts, storage, repeats, ordered)


def spec_of(run: Run, port: int, *, optimizer: bool) -> BoundarySpec:
    """A parameter's layout at a port, dim by dim; tied parameters only."""
    entry = next(e for e in run.local.plan.parameters if e.port == port)
    dims = entry.optimizer if optimizer else entry.storage
    return tuple(tuple(name for factor in dim for name in factor) for dim in dims)
