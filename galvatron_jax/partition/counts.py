"""Counting a planned pass: its collectives, FLOPs, traffic and peak of live temporaries, as the micro-batch grows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import NamedTuple

from galvatron_jax.partition.instructions import Version
from galvatron_jax.partition.layer_plan import Collective, PhasePlan
from galvatron_jax.partition.layout import Axis, Role, Step, StepKind
from galvatron_jax.partition.liveness import Where
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.spec.program import FLOAT_BYTES

Amount = tuple[float, float]
"""What stays whatever the micro-batch, and what is proportional to it, both at the micro-batch planned."""
NONE: Amount = (0.0, 0.0)
Sent = tuple[Collective, bool]
"""A collective, and whether its bytes are proportional to the micro-batch."""


class Tally(NamedTuple):
    """What one instruction counts for."""

    read: tuple[Version, ...]
    made: tuple[tuple[Version, float, bool], ...]
    """Versions made, with their local bytes, and whether these are proportional to the micro-batch."""
    fused: bool
    """Whether it is done with its neighbours, so that what it reads costs nothing."""
    moved: Amount
    """Bytes that it reads, and that a loop's body moves."""
    inner_peaks: tuple[Amount, ...] = ()
    """Bytes that live at most in a loop's body; see `Counts.peaks`."""
    sent: tuple[Sent, ...] = ()
    place: Where = Where.WHOLE


@dataclass(frozen=True, slots=True)
class Counts:
    """What a pass counts for."""

    sent: tuple[Sent, ...]
    flops: Amount
    moved: Amount
    peaks: tuple[Amount, ...]
    """Bytes of live temporaries when they are most, at one micro-batch or another."""
    operations: int
    read: AbstractSet[Version] = frozenset()
    """Versions read."""
    through_peaks: tuple[Amount, ...] = ()
    """For the backward of a layer that ends in the loss, of its forward and backward together, one after the other."""
    unscattered_bytes: int = 0
    """See `PhasePlan.unscattered_bytes`; parameters do not grow."""

    def at(self, microbatch: int, planned_at: int, instructions: tuple = ()) -> PhasePlan:
        """The phase at another micro-batch than the one planned, everything decided alike."""
        return PhasePlan(
            instructions=instructions,
            collectives=tuple(
                replace(each, bytes=each.bytes * microbatch // planned_at)
                if grows and microbatch != planned_at
                else each
                for each, grows in self.sent
            ),
            flops=amount_at(self.flops, microbatch, planned_at),
            bytes=amount_at(self.moved, microbatch, planned_at),
            peak_bytes=self.peak_bytes_at(microbatch, planned_at),
            operations=self.operations,
            through_peak_bytes=self.through_peak_bytes_at(microbatch, planned_at),
            unscattered_bytes=self.unscattered_bytes,
        )

    def peak_bytes_at(self, microbatch: int, planned_at: int) -> int:
        """The peak of live temporaries at another micro-batch than the one planned."""
        return _largest_at(self.peaks, microbatch, planned_at)

    def through_peak_bytes_at(self, microbatch: int, planned_at: int) -> int:
        """The same of forward and backward in a row; 0 where they are not."""
        return _largest_at(self.through_peaks, microbatch, planned_at)


def _largest_at(peaks: Iterable[Amount], microbatch: int, planned_at: int) -> int:
    return int(max([amount_at(peak, microbatch, planned_at) for peak in peaks], default=0))


def amount_at(amount: Amount, microbatch: int, planned_at: int) -> float:
    """An amount at another micro-batch than the one planned."""
    return amount[0] + amount[1] * microbatch / planned_at


def collective(step: Step, size: int, dtype: str) -> Collective:
    """A step as the cost model counts it."""
    if step.dtype is not None:
        size, dtype = FLOAT_BYTES[step.dtype], step.dtype
    local = math.prod(step.shape) * size
    if step.kind is StepKind.ALL_GATHER:
        local *= step.size
    return Collective(CollectiveKind(step.kind.value), step.names, step.size, local, dtype=dtype)


def collectives(steps: Iterable[Step], size: int, dtype: str) -> tuple[Collective, ...]:
    """The collectives among some steps on a value of `size` bytes an element."""
    return tuple([collective(step, size, dtype) for step in steps if step.kind is not StepKind.SLICE])


def combined(
    axes: Sequence[Axis], names: tuple[str, ...], how: str, shape: Sequence[int], size: int, dtype: str
) -> Collective:
    """The all-reduce of a maximum or a minimum; booleans go as integers."""
    group = math.prod(a.size for a in axes if a.role is not Role.STORAGE and set(a.names) <= set(names))
    local = math.prod(shape) * (4 if dtype == "bool" else size)
    return Collective(CollectiveKind.ALL_REDUCE, names, group, local, how, "int32" if dtype == "bool" else dtype)


def all_sent(tallies: Iterable[Tally]) -> tuple[Sent, ...]:
    """Collectives of a pass, those of loops as often as they run."""
    return tuple([sent for tally in tallies for sent in tally.sent])


def sent_bytes(tallies: Iterable[Tally]) -> Amount:
    """Bytes that one device sends (ring algorithms; Patarasuk & Yuan, 2009)."""
    total = [0.0, 0.0]
    for one, grows in all_sent(tallies):
        passes = 2.0 if one.kind is CollectiveKind.ALL_REDUCE else 1.0
        total[grows] += passes * one.bytes * (one.group_size - 1) / one.group_size
    return total[0], total[1]


def largest(amounts: Iterable[Amount]) -> tuple[Amount, ...]:
    """Those that are larger than each other one at some micro-batch, at least."""
    kept: list[Amount] = []
    for amount in sorted(set(amounts), reverse=True):
        if not kept or amount[1] > kept[-1][1]:
            kept.append(amount)
    return tuple(kept)
