"""Layout changes of values that cross layers: plain PartitionSpecs, one factor per dim."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from galvatron_jax.partition.counts import collective
from galvatron_jax.partition.layer_plan import BoundarySpec, Collective
from galvatron_jax.partition.layout import NOWHERE, Axis, Frame, Role, Step, StepKind, convert
from galvatron_jax.partition.static import itemsize


def boundary_steps(
    dims: tuple[int, ...], source: BoundarySpec, target: BoundarySpec, *, mesh: Mapping[str, int]
) -> tuple[Step, ...]:
    """Steps between two layouts of a whole array with these dims."""
    return _boundary_steps(dims, source, target, tuple(mesh.items()))


@functools.lru_cache(maxsize=65536)
def _boundary_steps(
    dims: tuple[int, ...], source: BoundarySpec, target: BoundarySpec, mesh: tuple[tuple[str, int], ...]
) -> tuple[Step, ...]:
    if source == target:
        return ()
    order = [name for name, _ in mesh]
    axes = tuple(Axis(Role.DATA, (name,), size, rank) for rank, (name, size) in enumerate(mesh))
    ways = [_order(a, b, order) for a, b in zip(source, target, strict=True)]
    if None in ways:
        # The same axes in another order: no chain of single moves keeps shards contiguous.
        whole = ((),) * len(dims)
        return _boundary_steps(dims, source, whole, mesh) + _boundary_steps(dims, whole, target, mesh)
    frame = Frame(dims, tuple(way == 1 for way in ways))
    return tuple(convert(axes, frame, _layout(source, order), _layout(target, order)))


def _order(a: tuple[str, ...], b: tuple[str, ...], order: list[str]) -> int | None:
    """1 when both splits of a dim stand in mesh order, -1 when in reverse; None when neither."""
    ranks = [[order.index(name) for name in names] for names in (a, b)]
    for way in (1, -1):
        if all(r == sorted(r, reverse=way < 0) for r in ranks):
            return way
    return None


def _layout(spec: BoundarySpec, order: list[str]) -> tuple[int, ...]:
    layout = [NOWHERE] * len(order)
    for dim, names in enumerate(spec):
        for name in names:
            layout[order.index(name)] = dim
    return tuple(layout)


def boundary_collectives(
    dims: tuple[int, ...], dtype: str, source: BoundarySpec, target: BoundarySpec, *, mesh: Mapping[str, int]
) -> tuple[Collective, ...]:
    """Collectives that bring a value from one layer's layout to another's.

    Args:
        dims: global shape, of one micro-batch.
        dtype: its dtype.
        source: how it is laid out.
        target: how it is wanted.
        mesh: axes with sizes, slowest link first.
    """
    size = itemsize(dtype)
    steps = boundary_steps(dims, source, target, mesh=mesh)
    return tuple(collective(s, size, dtype) for s in steps if s.kind is not StepKind.SLICE)


def home_spec(
    dims: tuple[int, ...], batch_dim: int | None, batch_axes: tuple[str, ...], mesh: Mapping[str, int]
) -> BoundarySpec:
    """The plan-wide layout of values that cross more than one layer: the batch dim over `batch_axes`."""
    spec: list[tuple[str, ...]] = [()] * len(dims)
    if batch_dim is not None and dims[batch_dim] % math.prod(mesh[a] for a in batch_axes) == 0:
        spec[batch_dim] = tuple(batch_axes)
    return tuple(spec)
