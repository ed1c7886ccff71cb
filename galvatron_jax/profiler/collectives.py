"""Times of collectives over every size of group that the mesh's axes span."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from galvatron_jax.profiler.bench import Bench
from galvatron_jax.profiler.devices import AxisGroup, axis_groups
from galvatron_jax.profiler.everywhere import LocalFunction
from galvatron_jax.spec.profile import CollectiveKind, CollectiveTiming
from galvatron_jax.units import KIB, MIB, format_bytes

_BUDGET_SHARE = 1 / 3
"""Of the time for a point: there are many, and each is repeated often within one sample."""

CollectivePoint = tuple[CollectiveKind, AxisGroup, int]
"""What to measure: operation, group, payload in bytes as `CollectiveTiming.bytes` counts it."""


def message_sizes(platform: str) -> tuple[int, ...]:
    """Payloads in bytes that pin latency and bandwidth on a platform, smallest first."""
    return (4 * KIB, 64 * KIB, 1 * MIB, 16 * MIB) if platform == "cpu" else (64 * KIB, 1 * MIB, 16 * MIB, 256 * MIB)


def collective_points(
    groups: Sequence[AxisGroup],
    sizes: Sequence[int],
    *,
    kinds: Sequence[CollectiveKind] = tuple(CollectiveKind),
) -> Iterator[CollectivePoint]:
    """The kinds over every group at every size; sizes are rounded up to what the group can share out."""
    for group in groups:
        for kind in kinds:
            for size in sizes:
                quantum = 4 * group.size
                yield kind, group, -(-size // quantum) * quantum


def measure_collectives(
    bench: Bench,
    *,
    sizes: Sequence[int] | None = None,
    kinds: Sequence[CollectiveKind] = tuple(CollectiveKind),
) -> tuple[CollectiveTiming, ...]:
    """Times collectives in float32, all groups of a size at once, as a training step runs them.

    Args:
        bench: Where to measure.
        sizes: Payloads in bytes; the platform's by default.
        kinds: Operations; all by default. What pipeline stages send one another are permutes.
    """
    sizes = message_sizes(bench.mesh.devices.flat[0].platform) if sizes is None else sizes
    return tuple(
        measure_collective(bench, point) for point in collective_points(axis_groups(bench.mesh), sizes, kinds=kinds)
    )


def measure_collective(bench: Bench, point: CollectivePoint) -> CollectiveTiming:
    """Times one collective."""
    kind, group, payload = point
    bench.step(f"{kind} of {format_bytes(payload)} over {group.size} devices")
    local = local_input(kind, group, payload)
    key = {
        "what": "collective",
        "kind": kind.value,
        "axis_size": group.size,
        "level": group.level,
        "bytes": payload,
        "mesh": "x".join(str(size) for size in bench.mesh.devices.shape),
    }
    brief = replace(bench, sampling=replace(bench.sampling, budget_s=_BUDGET_SHARE * bench.sampling.budget_s))
    timing = brief.time(key, lambda: (collective_function(kind, group), [local]))
    return CollectiveTiming(kind=kind, axis_size=group.size, level=group.level, bytes=payload, timing=timing)


def local_input(kind: CollectiveKind, group: AxisGroup, payload: int) -> jax.ShapeDtypeStruct:
    """What one device contributes: a share of an all-gather's result, else the whole payload."""
    elements = payload // 4
    return jax.ShapeDtypeStruct(
        (elements // group.size if kind is CollectiveKind.ALL_GATHER else elements,), jnp.float32
    )


def collective_function(kind: CollectiveKind, group: AxisGroup) -> LocalFunction:
    """The collective on a local vector, inside a `shard_map` manual over the group's axes."""
    axes = group.axes
    if kind is CollectiveKind.ALL_REDUCE:
        return lambda x: lax.psum(x, axes)
    if kind is CollectiveKind.ALL_GATHER:
        return lambda x: lax.all_gather(x, axes, tiled=True)
    if kind is CollectiveKind.REDUCE_SCATTER:
        return lambda x: lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True)
    if kind is CollectiveKind.ALL_TO_ALL:
        return lambda x: lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)
    ring = [(index, (index + 1) % group.size) for index in range(group.size)]
    return lambda x: lax.ppermute(x, axes, ring)
