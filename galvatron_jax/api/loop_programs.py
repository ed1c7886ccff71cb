"""Like layers in a row as the profiler times them: in the executor's own loop.

A loop takes each layer's parameters out of a stack, and puts what its backward reads into others. A layer by itself
makes no such copies, and is faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax

from galvatron_jax.partition.layer_plan import BoundarySpec
from galvatron_jax.partition.layers import LocalPlan
from galvatron_jax.runtime.emit import STAND_INS, LayerProgram
from galvatron_jax.runtime.execution import Executor, Repeats, Tape, orders_dims
from galvatron_jax.runtime.runs import Layouts, Run, Way, loop_of
from galvatron_jax.runtime.storage import Storage
from galvatron_jax.runtime.totals import Totals
from galvatron_jax.spec.model import PortRole
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.trace.model import Traced

LAYERS = 2
"""In a row: the fewest that make a loop."""


class LoneExecutor(Executor):
    """Runs layers without communication, on values that lie as the layers want them."""

    def program(self, run: Run) -> LayerProgram:
        """The run's layer program with stand-ins for collectives."""
        return LayerProgram(run.local, self.traced.programs[run.kind].flat, via=STAND_INS)

    def move(self, x: Any, shape: Sequence[int], source: BoundarySpec, target: BoundarySpec, *, lead: int = 0) -> Any:
        """Nothing is to be moved."""
        assert source == target, f"{source} -> {target}"
        return x


class TimedLoop:
    """Forward and backward of layers in a loop on one device; a `profiler.LocalProgram`."""

    num_layers = LAYERS

    def __init__(self, executor: LoneExecutor, run: Run):
        self._executor = executor
        self._run = run
        self._program = executor.program(run)
        self._kind = run.local.static.kind

    @property
    def forward_inputs(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Local shapes of what the loop reads: of the first layer, or of all layers where each has its own."""
        return [
            self._struct(port.value, layout, stacked=way.way is Way.STACKED)
            for port, layout, way in zip(self._kind.inputs, self._run.local.inputs, self._run.inputs, strict=True)
        ]

    @property
    def backward_inputs(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Local shapes of what the forward loop leaves, and of the cotangents."""
        return [*jax.tree.leaves((self._tape.inputs, self._tape.residuals)), *self._cotangents.values()]

    def forward_fn(self, *arrays: jax.Array) -> object:
        """What later layers read, and what is left for backward."""
        store: dict[str, Any] = {}
        tape = self._executor.forward_loop(self._run, list(arrays), store)
        return {name: store[name] for name in self._read_later}, tape.inputs, tape.residuals

    def backward_fn(self, *arrays: jax.Array) -> object:
        """Gradients of the input ports."""
        structure = jax.tree.structure((self._tape.inputs, self._tape.residuals))
        inputs, residuals = jax.tree.unflatten(structure, arrays[: structure.num_leaves])
        cotangents = dict(zip(self._cotangents, arrays[structure.num_leaves :], strict=True))
        return self._executor.backward_loop(0, self._run, Tape(inputs, residuals), cotangents, Totals({}))

    @cached_property
    def _read_later(self) -> list[str]:
        """What layers beyond the loop read, and results."""
        spec, run = self._executor.traced.spec, self._run
        inside = range(run.start, run.stop)
        read = {name for index, layer in enumerate(spec.layers) if index not in inside for name in layer.inputs}
        read |= {name for _, name in spec.results}
        return [name for names in run.outputs for name in names if name in read]

    @cached_property
    def _tape(self) -> Tape:
        """Shapes of what forward leaves."""
        _, inputs, residuals = jax.eval_shape(self.forward_fn, *self.forward_inputs)
        return Tape(inputs, residuals)

    @cached_property
    def _cotangents(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """By reference: of all that is read later and has any."""
        return {
            name: self._struct(port.cotangent, layout)
            for port, layout, names in zip(self._kind.outputs, self._run.local.outputs, self._run.outputs, strict=True)
            if port.cotangent is not None
            for name in names
            if name in self._read_later
        }

    def _struct(self, value: int, layout: tuple[int, ...], *, stacked: bool = False) -> jax.ShapeDtypeStruct:
        shape = self._program.shape(value, layout)
        dtype = self._program.flat.avals[value].dtype
        return jax.ShapeDtypeStruct((LAYERS, *shape) if stacked else shape, dtype)


def timed_loop(
    traced: Traced, local: LocalPlan, strategy: LayerStrategy, *, kind: int, mesh: Mapping[str, int]
) -> TimedLoop | None:
    """The loop over layers of a kind; None where no two follow one another, or no loop can follow what they pass on.

    Args:
        traced: the model.
        local: the kind's local program.
        strategy: what it was planned under.
        kind: its number.
        mesh: sizes of the mesh axes.
    """
    run = loop_of(traced.spec, local, kind=kind, length=LAYERS)
    if run is None:
        return None
    specs = {
        name: local.input_spec(port)
        for port, way in enumerate(run.inputs)
        if local.static.kind.inputs[port].role is not PortRole.PARAMETER
        for name in way.references
    }
    specs |= {name: local.output_spec(port) for port, names in enumerate(run.outputs) for name in names}
    whole = dict.fromkeys(specs, ())  # Shapes are read where something moves.
    storage = Storage((), {}, {}, {})
    ordered = orders_dims(jax.devices()[0])
    executor = LoneExecutor(
        traced, [run], Layouts(mesh, specs, whole), storage, [Repeats.of(local.static, strategy)], ordered=ordered
    )
    return TimedLoop(executor, run)
