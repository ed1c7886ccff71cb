"""A traced layer's local programs as the profiler times them: real work on local shapes, no communication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax

from galvatron_jax.api.loop_programs import TimedLoop, timed_loop
from galvatron_jax.partition import plan_local
from galvatron_jax.profiler import LayerTimingRequest
from galvatron_jax.runtime.emit import STAND_INS, LayerProgram
from galvatron_jax.spec.model import LayerKind
from galvatron_jax.trace.model import Traced


class TimedLayer:
    """Forward and backward of one layer on one device; a `profiler.LocalProgram`.

    Collectives are replaced by stand-ins that give arrays of the same shapes, so that only computation is timed.
    """

    num_layers = 1

    def __init__(self, kind: LayerKind, program: LayerProgram):
        self._kind = kind
        self._program = program
        self._cotangents = [q for q, port in enumerate(kind.outputs) if port.cotangent is not None]

    @property
    def forward_inputs(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Local shapes of the input ports."""
        layouts = self._program.local.inputs
        return [self._struct(port.value, layout) for port, layout in zip(self._kind.inputs, layouts, strict=True)]

    @property
    def backward_inputs(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Local shapes of the input ports, the residuals and the cotangents, in this order."""
        residuals = [
            jax.ShapeDtypeStruct(residual.shape, self._program.flat.avals[residual.value].dtype)
            for residual in self._program.local.residuals
        ]
        cotangents = [
            self._struct(self._cotangent(port), self._program.local.outputs[port]) for port in self._cotangents
        ]
        return [*self.forward_inputs, *residuals, *cotangents]

    def forward_fn(self, *arrays: jax.Array) -> object:
        """Outputs and residuals."""
        return self._program.forward(arrays)

    def backward_fn(self, *arrays: jax.Array) -> object:
        """Gradients of the input ports."""
        first, second = len(self._kind.inputs), len(self._kind.inputs) + len(self._program.local.residuals)
        cotangents = dict(zip(self._cotangents, arrays[second:], strict=True))
        return self._program.backward(arrays[:first], arrays[first:second], cotangents)

    def _cotangent(self, port: int) -> int:
        value = self._kind.outputs[port].cotangent
        assert value is not None
        return value

    def _struct(self, value: int, layout: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self._program.shape(value, layout), self._program.flat.avals[value].dtype)


def timed_layer(traced: Traced, request: LayerTimingRequest, *, mesh: Mapping[str, int]) -> TimedLayer | TimedLoop:
    """The local programs of a layer kind under the strategy of a request: a loop's, where such layers make one.

    Args:
        traced: the model that the layer belongs to.
        request: which kind, strategy and micro-batch.
        mesh: sizes of the mesh axes.
    """
    index = next(i for i, kind in enumerate(traced.spec.kinds) if kind.fingerprint == request.kind)
    kind = traced.spec.kinds[index]
    local = plan_local(
        kind,
        request.strategy,
        mesh=mesh,
        microbatch=request.microbatch,
        model_microbatch=traced.spec.microbatch,
    )
    loop = timed_loop(traced, local, request.strategy, kind=index, mesh=mesh)
    if loop is not None:
        return loop
    return TimedLayer(kind, LayerProgram(local, traced.programs[index].flat, via=STAND_INS))
