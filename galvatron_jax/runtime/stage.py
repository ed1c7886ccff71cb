"""One stage of a pipeline: its layers forward and backward, and what must pass in, out and through time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from galvatron_jax.errors import InputError
from galvatron_jax.runtime.clocks import Clock, clock_of
from galvatron_jax.runtime.execution import Executor, Tape
from galvatron_jax.runtime.packing import Batch, in_batches
from galvatron_jax.runtime.runs import Way
from galvatron_jax.runtime.totals import Totals
from galvatron_jax.spec.model import ModelSpec, PortRole
from galvatron_jax.trace.model import Traced

_SEED = "seed"
"""Name of the loss's cotangent among what a stage keeps."""


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline. All arrays are local to a device of its group."""

    number: int
    executor: Executor
    receives: tuple[str, ...]
    """References of values that earlier stages hand over, in the plan-wide layout."""
    sends: tuple[str, ...]
    """References of values that the next stage receives: its own, and those that pass through."""
    changes: tuple[str, ...]
    """Paths of the model state that its layers make anew."""
    remembers: tuple[str, ...]
    """Those of them that its layers also read."""
    last: bool

    # ------------------------------------------------------------------------------------------ shapes

    def shape_of(self, reference: str) -> jax.ShapeDtypeStruct:
        """Local shape of a value as it waits at a cut."""
        executor = self.executor
        shape = executor.local_shape(executor.layouts.shapes[reference], executor.layouts.specs[reference])
        return jax.ShapeDtypeStruct(shape, executor.traced.avals[reference].dtype)

    @property
    def received_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Local shapes of what the stage receives."""
        return {reference: self.shape_of(reference) for reference in self.receives}

    @property
    def cotangent_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Local shapes of what the stage hands back: the cotangents of what it receives."""
        flowing = flows(self.executor.traced.spec)
        return {r: self.shape_of(r) for r in self.receives if r in flowing}

    @property
    def gradient_shapes(self) -> dict[tuple[int, int], jax.ShapeDtypeStruct]:
        """Local shapes of the accumulated gradients, by (run, port)."""
        found: dict[tuple[int, int], jax.ShapeDtypeStruct] = {}
        for number, run in enumerate(self.executor.runs):
            program = self.executor.program(run)
            for port, x in enumerate(run.local.static.kind.inputs):
                if x.role is PortRole.PARAMETER and x.gradient is not None:
                    value, layout = run.local.gradient_of(port)
                    lead = (run.length,) if self.stacks(number, port) else ()
                    dtype = program.flat.avals[value].dtype
                    found[number, port] = jax.ShapeDtypeStruct(lead + program.shape(value, layout), dtype)
        return found

    def stacks(self, run: int, port: int) -> bool:
        """Whether each layer of a run has its own array at an input port."""
        found = self.executor.runs[run]
        return found.length > 1 and found.inputs[port].way is Way.STACKED

    # ------------------------------------------------------------------------------------------ once a step

    @cached_property
    def synchronised_batches(self) -> tuple[Batch[tuple[int, int]], ...]:
        """Gradients by (run, port), as they are synchronised together; those of tied parameters whole."""
        owned = self.executor.storage.owned
        tied = set(self.executor.storage.tied.values())

        def stacked(port: tuple[int, int]) -> bool:
            return self.stacks(*port) and port in owned and owned[port] not in tied

        return tuple(in_batches(self.gradient_shapes, stacked))

    # ------------------------------------------------------------------------------------------ passes

    def forward(
        self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Mapping[str, Any], received: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], list[Tape]]:
        """Runs the stage's layers on one micro-batch.

        Args:
            params: stored arrays by key.
            state: model state by path.
            batch: leaves of the micro-batch by path.
            received: values by reference.

        Returns:
            What it sends, by reference; results by sink; and what backward needs.
        """
        store = self.executor.store(state, batch) | dict(received)
        tapes = self.executor.all_forward(params, store)
        return {r: store[r] for r in self.sends}, self._results(store), tapes

    def again(
        self, params: Mapping[str, Any], state: Mapping[str, Any], batch: Mapping[str, Any], received: Mapping[str, Any]
    ) -> list[Tape]:
        """Runs forward again, for what backward needs alone; not in the last stage, whose results are wanted too."""
        store = self.executor.store(state, batch) | dict(received)
        return self.executor.all_forward(params, store, residuals_only=True)

    def _results(self, store: Mapping[str, Any]) -> dict[str, Any]:
        """New state that the stage makes; in the last stage, loss, weight and aux too."""
        found = {}
        for sink, reference in self.executor.traced.spec.results:
            kind, _, path = sink.partition(":")
            mine = any(path == p or path.startswith(f"{p}[") for p in self.changes) if kind == "state" else self.last
            if mine and reference in store:
                found[sink] = store[reference]
        return found

    def backward(self, tapes: Sequence[Tape], cotangents: Mapping[str, Any], totals: Totals) -> dict[str, Any]:
        """Cotangents of what the stage received.

        Args:
            tapes: as forward left them.
            cotangents: by reference, of what the stage sent; the loss's in the last one.
            totals: what gradients of parameters are added to.
        """
        known = dict(cotangents)
        self.executor.all_backward(tapes, known, totals)
        handed: dict[str, Any] = {}
        for reference, shape in self.cotangent_shapes.items():
            x = known.get(reference)
            handed[reference] = jnp.zeros(shape.shape, shape.dtype) if x is None else x
        return handed

    # ------------------------------------------------------------------------------------------ kept for backward

    def inputs_to_keep(self, state: Mapping[str, Any], received: Mapping[str, Any]) -> dict[str, Any]:
        """What running forward again takes, by name."""
        return {**received, **{f"state:{path}": state[path] for path in self.remembers}}

    def inputs_kept(
        self, state: Mapping[str, Any], kept: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Mapping[str, Any], dict[str, Any]]:
        """State as forward saw it, the micro-batch, and what the stage received."""
        before = dict(state) | {path: kept[f"state:{path}"] for path in self.remembers}
        return before, batch, {r: kept[r] for r in self.receives}

    def tapes_to_keep(self, tapes: Sequence[Tape], seed: Any | None) -> tuple[dict[str, Any], dict[str, str]]:
        """What backward takes that is not at hand then, by name; and for every name the one that holds its array."""
        arrays: dict[str, Any] = {}
        names: dict[str, str] = {}
        holders: dict[int, str] = {}
        for name, x in self._taped(tapes):
            names[name] = holders.setdefault(id(x), name)
            arrays[names[name]] = x
        if seed is not None:
            arrays[_SEED] = seed
        return arrays, names

    def _taped(self, tapes: Sequence[Tape]) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for number, tape in enumerate(tapes):
            found += [
                (f"input:{number}:{port}", x)
                for port, x in enumerate(tape.inputs)
                if x is not None and not self._at_hand(number, port)
            ]
            found += [(f"residual:{number}:{i}", x) for i, x in enumerate(tape.residuals)]
        return found

    def _at_hand(self, number: int, port: int) -> bool:
        """Whether an input is there in backward as in forward: parameters and constants."""
        role = self.executor.runs[number].local.static.kind.inputs[port].role
        return role in (PortRole.PARAMETER, PortRole.CONSTANT)

    def tapes_kept(
        self,
        kept: Mapping[str, Any],
        names: Mapping[str, str],
        params: Mapping[str, Any],
        state: Mapping[str, Any],
        batch: Mapping[str, Any],
    ) -> tuple[list[Tape], Any | None]:
        """The inverse of `tapes_to_keep`, with what is at hand; and the loss's cotangent."""
        store = self.executor.store(state, batch)
        tapes = []
        for number, run in enumerate(self.executor.runs):
            inputs: list[Any] = []
            for port in range(len(run.inputs)):
                if f"input:{number}:{port}" in names:
                    inputs.append(kept[names[f"input:{number}:{port}"]])
                elif self._at_hand(number, port) and run.local.reads_input(port):
                    inputs.append(self.executor.input(number, run, port, params, store))
                else:
                    inputs.append(None)
            residuals = [kept[names[f"residual:{number}:{i}"]] for i in range(len(run.local.residuals))]
            tapes.append(Tape(inputs, residuals))
        return tapes, kept.get(_SEED)


def make_stages(executors: Sequence[Executor]) -> tuple[tuple[Stage, ...], Clock | None]:
    """Stages from the executors of their layers, and the clock of the state that they share.

    Raises:
        InputError: when a model state variable is read in one stage and made from data in another.
    """
    spec = executors[0].traced.spec
    starts = [executor.runs[0].start for executor in executors]
    stops = [*starts[1:], len(spec.layers)]
    crossing = [_crossing(spec, start) for start in [*starts[1:], len(spec.layers)]]
    received = [(), *crossing[:-1]]
    sent = [*crossing[:-1], ()]
    ranges = list(zip(starts, stops, strict=True))
    makers, readers = _makers(spec, ranges), _readers(spec, ranges)
    shared = [path for path, stages in makers.items() if len(stages | readers.get(path, set())) > 1]
    clock = _clock(executors[0].traced, shared, makers, readers) if shared else None
    changed = {path: next(iter(stages)) for path, stages in makers.items() if path not in shared}
    stages = []
    for number, executor in enumerate(executors):
        changes = tuple(path for path, stage in changed.items() if stage == number)
        remembers = tuple(path for path in changes if number in readers.get(path, ()))
        last = number == len(executors) - 1
        stages.append(Stage(number, executor, tuple(received[number]), tuple(sent[number]), changes, remembers, last))
    return tuple(stages), clock


def flows(spec: ModelSpec) -> set[str]:
    """References of values that have a cotangent."""
    return {
        reference
        for layer in spec.layers
        for port, reference in zip(spec.kinds[layer.kind].outputs, layer.outputs, strict=True)
        if port.cotangent is not None
    }


def _crossing(spec: ModelSpec, cut: int) -> tuple[str, ...]:
    """References of values made before a layer and needed by it or later ones."""
    made = [reference for layer in spec.layers[:cut] for reference in layer.outputs]
    needed = {reference for layer in spec.layers[cut:] for reference in layer.inputs}
    needed |= {reference for sink, reference in spec.results if not sink.startswith("state:")}
    return tuple(reference for reference in made if reference in needed)


def _path(reference: str) -> str:
    """The path of a state variable, of which a reference may name one layer's slice."""
    return reference.removeprefix("state:").partition("[")[0]


def _readers(spec: ModelSpec, ranges: Sequence[tuple[int, int]]) -> dict[str, set[int]]:
    """Per path of state, the stages that read it."""
    found: dict[str, set[int]] = defaultdict(set)
    for number, (start, stop) in enumerate(ranges):
        for layer in spec.layers[start:stop]:
            for reference in layer.inputs:
                if reference.startswith("state:"):
                    found[_path(reference)].add(number)
    return found


def _makers(spec: ModelSpec, ranges: Sequence[tuple[int, int]]) -> dict[str, set[int]]:
    """Per path of state that a step makes anew, the stages that do."""
    stage_of = {
        reference: number
        for number, (start, stop) in enumerate(ranges)
        for layer in spec.layers[start:stop]
        for reference in layer.outputs
    }
    found: dict[str, set[int]] = defaultdict(set)
    for sink, reference in spec.results:
        if sink.startswith("state:") and reference in stage_of:
            found[_path(sink)].add(stage_of[reference])
    return found


def _clock(traced: Traced, paths: Sequence[str], makers: Mapping, readers: Mapping) -> Clock:
    clock, others = clock_of(traced, paths)
    for path in others:
        raise InputError(
            f"State {path!r} is read in pipeline stages {sorted(readers.get(path, ()))} and made from data in "
            f"{sorted(makers[path])}: the next micro-batch would need it before this one is through. Give each layer a "
            "variable of its own, or keep these layers in one stage."
        )
    return clock
