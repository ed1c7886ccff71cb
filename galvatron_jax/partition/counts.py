"""Counting a planned pass: its collectives, FLOPs, traffic and peak of live temporaries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from galvatron_jax.partition.instructions import Convert, Version
from galvatron_jax.partition.layer_plan import Collective
from galvatron_jax.partition.layout import Axis, Role, Step, StepKind
from galvatron_jax.spec.profile import CollectiveKind


@dataclass(frozen=True, slots=True)
class Tally:
    """What one instruction counts for."""

    read: tuple[Version, ...]
    made: tuple[tuple[Version, float], ...]
    """Versions made, with their local bytes."""
    fused: bool
    """Whether it is done with its neighbours, so that what it reads costs nothing."""
    moved: float
    """Bytes that it reads, and that a loop's body moves."""
    inner_peak: float = 0.0
    """Bytes that live at most in a loop's body."""
    collectives: tuple[Collective, ...] = ()


def collective(step: Step, size: int, dtype: str) -> Collective:
    """A step as the cost model counts it."""
    local = math.prod(step.shape) * size
    if step.kind is StepKind.ALL_GATHER:
        local *= step.size
    return Collective(CollectiveKind(step.kind.value), step.names, step.size, local, dtype=dtype)


def collectives(steps: Iterable[Step], size: int, dtype: str) -> tuple[Collective, ...]:
    """The collectives among some steps on a value of `size` bytes an element."""
    return tuple(collective(step, size, dtype) for step in steps if step.kind is not StepKind.SLICE)


def count_conversion(made: Convert, read_bytes: float, made_bytes: float, size: int, dtype: str) -> Tally:
    """A conversion counts its collectives; slices alone fuse with what reads them."""
    found = collectives(made.steps, size, dtype)
    return Tally(
        read=((made.value, made.source),),
        made=(((made.value, made.target), made_bytes),),
        fused=not found,
        moved=read_bytes if found else 0.0,
        collectives=found,
    )


def combined(
    axes: Sequence[Axis], names: tuple[str, ...], how: str, shape: Sequence[int], size: int, dtype: str
) -> Collective:
    """The all-reduce of a maximum or a minimum; booleans go as integers."""
    group = math.prod(a.size for a in axes if a.role is not Role.STORAGE and set(a.names) <= set(names))
    local = math.prod(shape) * (4 if dtype == "bool" else size)
    return Collective(CollectiveKind.ALL_REDUCE, names, group, local, how, "int32" if dtype == "bool" else dtype)


def all_collectives(tallies: Iterable[Tally]) -> tuple[Collective, ...]:
    """Collectives of a pass, those of loops as often as they run."""
    return tuple(found for tally in tallies for found in tally.collectives)


def traffic(tallies: Sequence[Tally]) -> tuple[float, float]:
    """Bytes that unfused operations read and write, and the peak of live results.

    Elementwise operations fuse into their neighbours; what they make counts only when several operations read it.
    """
    uses: dict[Version, int] = {}
    for tally in tallies:
        for version in tally.read:
            uses[version] = uses.get(version, 0) + 1
    moved = live = peak = 0.0
    alive: dict[Version, float] = {}
    for tally in tallies:
        if tally.inner_peak:
            peak = max(peak, live + tally.inner_peak)
        for version, size in tally.made:
            if not tally.fused or uses.get(version, 0) > 1:
                alive[version] = size
                live += size
                moved += size
        moved += tally.moved
        if live > peak:
            peak = live
        for version in tally.read:
            uses[version] -= 1
            if uses[version] == 0 and version in alive:
                live -= alive.pop(version)
    return moved, peak
