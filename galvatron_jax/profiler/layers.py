"""Times of each layer kind's forward and backward program at local shapes, collectives left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import jax

from galvatron_jax.profiler.bench import Bench
from galvatron_jax.profiler.points import LayerTimingRequest
from galvatron_jax.spec.profile import LayerTiming, Timing
from galvatron_jax.spec.strategy import SequenceParallel

_LOG = logging.getLogger(__name__)


class LocalProgram(Protocol):
    """Forward and backward program of one device, for one layer or some like ones, with stand-ins for collectives.

    Forward's outputs (activations and residuals) and backward's (gradients of parameters and inputs) must all be
    returned: what is not returned is not timed.
    """

    num_layers: int
    """Of which a call runs the programs."""

    @property
    def forward_inputs(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Local shapes of what `forward_fn` takes."""
        ...

    @property
    def backward_inputs(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Local shapes of what `backward_fn` takes: residuals, cotangents, parameters."""
        ...

    def forward_fn(self, *arrays: jax.Array) -> object:
        """Runs the forward program on local arrays."""
        ...

    def backward_fn(self, *arrays: jax.Array) -> object:
        """Runs the backward program, recomputation included, on local arrays."""
        ...


LayerPrograms = Iterable[tuple[LayerTimingRequest, Callable[[], LocalProgram]]]
"""What to time, each with a function that builds its program; not called for what the cache holds."""


def profile_layers(programs: LayerPrograms, *, bench: Bench) -> tuple[LayerTiming, ...]:
    """Times layers on every device of the bench at once.

    A point whose program does not fit in memory is left out with a warning: the search then judges that shape
    from the others.

    Args:
        programs: What to time.
        bench: Where to measure.
    """
    timed = (_time_layer(request, build, bench=bench) for request, build in programs)
    return tuple(timing for timing in timed if timing is not None)


def _time_layer(request: LayerTimingRequest, build: Callable[[], LocalProgram], *, bench: Bench) -> LayerTiming | None:
    bench.step(_describe(request))
    built: list[LocalProgram] = []

    def program() -> LocalProgram:
        if not built:
            built.append(build())
        return built[0]

    def share() -> int:
        return program().num_layers

    def time(phase: str) -> Timing:
        key = {**_key(request), "phase": phase}
        if phase == "forward":
            return bench.time(key, lambda: (program().forward_fn, program().forward_inputs), share=share)
        return bench.time(key, lambda: (program().backward_fn, program().backward_inputs), share=share)

    try:
        forward, backward = time("forward"), time("backward")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _LOG.warning("%s does not fit in memory and was not timed: %s", _describe(request), str(error).splitlines()[0])
        return None
    return LayerTiming(kind=request.kind, shape=request.shape, remat=request.remat, forward=forward, backward=backward)


def _key(request: LayerTimingRequest) -> dict[str, str | int]:
    return {
        "what": "layer",
        "looped": "where layers repeat",
        "kind": request.kind,
        "remat": request.remat.value,
        **request.shape.model_dump(mode="json"),
    }


def _describe(request: LayerTimingRequest) -> str:
    shape = request.shape
    parts = [f"{request.name} batch {shape.batch}", f"tp {shape.tp}"]
    if shape.sp_kind is not SequenceParallel.NONE:
        parts.append(f"{shape.sp_kind} sp {shape.sp}")
    return ", ".join([*parts, f"remat {request.remat}"])
