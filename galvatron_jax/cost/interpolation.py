"""Layer plans between planned micro-batches.

Under one strategy the planner takes the same decisions over a wide range of micro-batches, and then every figure of a
plan is affine in the micro-batch: activations grow with it, parameters do not. Where the plans at both ends and in the
middle of a range have one structure and lie on one line, those between are read off that line. (A peak is a maximum of
affine functions, hence convex: three points on a line prove the line.) Otherwise the range is halved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from galvatron_jax.partition.layer_plan import Collective, LayerPlan, PhasePlan

_RELATIVE = 1e-9


@dataclass(frozen=True)
class _Range:
    """Planned micro-batches around the one that is asked for, ascending."""

    low: int
    high: int
    at: int

    @property
    def weight(self) -> float:
        return (self.at - self.low) / (self.high - self.low)

    def integer(self, low: int, high: int) -> int:
        """The value on the line, exact where it is a whole number."""
        return low + (high - low) * (self.at - self.low) // (self.high - self.low)

    def number(self, low: float, high: float) -> float:
        """The value on the line."""
        return low + (high - low) * self.weight


def plan_between(plan: Callable[[int], LayerPlan], microbatches: Sequence[int], *, at: int) -> LayerPlan:
    """The plan at one of several micro-batches, planned only where the line through others does not give it.

    Args:
        plan: plans a micro-batch; it should remember.
        microbatches: all that may be asked for, ascending.
        at: the one that is.
    """
    low, high = 0, len(microbatches) - 1
    index = microbatches.index(at)
    while high - low >= 3:
        middle = (low + high) // 2
        ends = _Range(microbatches[low], microbatches[high], microbatches[middle])
        first, last = plan(ends.low), plan(ends.high)
        if index in (low, middle, high):
            return plan(at)
        line = between(first, last, ends)
        if line is not None and _agree(line, plan(ends.at)):
            found = between(first, last, _Range(ends.low, ends.high, at))
            assert found is not None
            return found
        low, high = (low, middle) if index < middle else (middle, high)
    return plan(at)


def between(low: LayerPlan, high: LayerPlan, where: _Range) -> LayerPlan | None:
    """The plan on the line between two; None when their structures differ."""
    forward, backward = _phase(low.forward, high.forward, where), _phase(low.backward, high.backward, where)
    if forward is None or backward is None:
        return None
    # Parameters do not grow with the micro-batch.
    if (low.inputs, low.outputs, low.parameters) != (high.inputs, high.outputs, high.parameters):
        return None
    return LayerPlan(
        forward=forward,
        backward=backward,
        residual_bytes=where.integer(low.residual_bytes, high.residual_bytes),
        parameters=low.parameters,
        inputs=low.inputs,
        outputs=low.outputs,
        notes=low.notes,
    )


def _phase(low: PhasePlan, high: PhasePlan, where: _Range) -> PhasePlan | None:
    collectives = _collectives(low.collectives, high.collectives, where)
    if collectives is None or low.operations != high.operations:
        return None
    return PhasePlan(
        instructions=(),
        collectives=collectives,
        flops=where.number(low.flops, high.flops),
        bytes=where.number(low.bytes, high.bytes),
        peak_bytes=where.integer(low.peak_bytes, high.peak_bytes),
        operations=low.operations,
    )


def _collectives(
    low: tuple[Collective, ...], high: tuple[Collective, ...], where: _Range
) -> tuple[Collective, ...] | None:
    if len(low) != len(high):
        return None
    found = []
    for one, other in zip(low, high, strict=True):
        if replace(one, bytes=0) != replace(other, bytes=0):
            return None
        found.append(replace(one, bytes=where.integer(one.bytes, other.bytes)))
    return tuple(found)


def _agree(line: LayerPlan, planned: LayerPlan) -> bool:
    """Whether a plan lies on the line."""
    for one, other in ((line.forward, planned.forward), (line.backward, planned.backward)):
        if (one.collectives, one.peak_bytes, one.operations) != (other.collectives, other.peak_bytes, other.operations):
            return False
        if not (_close(one.flops, other.flops) and _close(one.bytes, other.bytes)):
            return False
    same = (line.residual_bytes, line.parameters, line.inputs, line.outputs)
    return same == (planned.residual_bytes, planned.parameters, planned.inputs, planned.outputs)


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _RELATIVE * max(abs(one), abs(other))
