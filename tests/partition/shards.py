"""What each device holds of an array under a layout: the definition that steps and emission are tested against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from galvatron_jax.partition.layout import NOWHERE, PENDING, Axis, Frame, Layout, Role, names_at, order_at

MESH = {"a": 2, "b": 2, "c": 2}
POSITIONS = list(itertools.product(*(range(n) for n in MESH.values())))
"""Coordinates of every device, in the order of the devices."""


def mesh() -> Mesh:
    """The eight devices under three axes of two."""
    return Mesh(np.array(jax.devices()).reshape(2, 2, 2), tuple(MESH), axis_types=(AxisType.Auto,) * 3)


@st.composite
def logical_axes(draw: st.DrawFn) -> tuple[Axis, ...]:
    """The mesh axes, grouped at random into logical axes of random roles."""
    names = list(MESH)
    groups = draw(st.sampled_from([("a", "b", "c"), ("ab", "c"), ("a", "bc"), ("ac", "b"), ("abc",), ("c", "a")]))
    roles = st.sampled_from([Role.DATA, Role.TENSOR, Role.SEQUENCE])
    return tuple(Axis(draw(roles), tuple(g), math.prod(MESH[n] for n in g), names.index(g[0])) for g in groups)


@st.composite
def layouts(draw: st.DrawFn, axes: Sequence[Axis], frame: Frame, *, pending: bool = False) -> Layout:
    """A layout that the sizes allow."""
    layout: list[int] = []
    left = list(frame.sizes)
    for axis in axes:
        places = [NOWHERE] + [p for p, n in enumerate(left) if n % axis.size == 0] + [PENDING] * pending
        place = draw(st.sampled_from(places))
        if place >= 0:
            left[place] //= axis.size
        layout.append(place)
    return tuple(layout)


def _index(names: Sequence[str], device: Sequence[int]) -> int:
    index = 0
    for name in names:
        index = index * MESH[name] + device[list(MESH).index(name)]
    return index


def shard(array: np.ndarray, axes: Sequence[Axis], frame: Frame, layout: Layout, device: Sequence[int]) -> np.ndarray:
    """A device's part of an array that has one dim per position; of a pending sum, a summand."""
    for position in range(array.ndim):
        here = sorted(
            (a for a, place in enumerate(layout) if place == position),
            key=lambda a: order_at(axes, frame, position, a),
        )
        names = [n for a in here for n in names_at(axes, frame, position, a)]
        size = array.shape[position] // math.prod(MESH[n] for n in names)
        array = array.take(range(_index(names, device) * size, (_index(names, device) + 1) * size), axis=position)
    for axis, place in zip(axes, layout, strict=True):
        for name in axis.names if place == PENDING else ():
            # Whole numbers that add up to one.
            array = array * np.asarray([3, -2][_index([name], device)], array.dtype)
    return array


def all_shards(array: np.ndarray, axes: Sequence[Axis], frame: Frame, layout: Layout) -> np.ndarray:
    """Every device's part, stacked."""
    return np.stack([shard(array, axes, frame, layout, device) for device in POSITIONS])
