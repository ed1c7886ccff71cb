"""Running a primitive on local shapes: what changes in its parameters when its operands are shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galvatron_jax import _compat
from galvatron_jax.partition.instructions import IndexShift
from galvatron_jax.trace.flat import FlatOp
from galvatron_jax.trace.rules import ELEMENTWISE, LOCAL_BINDERS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LocalBind:
    """One application of a primitive on local arrays."""

    op: FlatOp
    operand_shapes: tuple[Shape, ...]
    """Whole shapes, as traced."""
    result_shapes: tuple[Shape, ...]
    """Whole shapes, as traced."""
    local_shapes: tuple[Shape, ...]
    """Local shape per result; lazily broadcast dims are 1."""
    shifts: tuple[IndexShift, ...] = ()
    index: Callable[[tuple[str, ...]], Any] = lax.axis_index
    """Number of this device along mesh axes, major to minor."""

    def bind(self, *operands: Any, **changed: Any) -> list[Any]:
        """Applies the primitive with its traced parameters, some of them changed."""
        return _compat.bind_equation(self.op.primitive, {**self.op.params, **changed}, list(operands))


def bind_local(bind: LocalBind, operands: Sequence[Any]) -> list[Any]:
    """Applies one primitive on local arrays."""
    name = bind.op.primitive.name
    if name in LOCAL_BINDERS:
        return LOCAL_BINDERS[name](bind, *operands)
    if name in ELEMENTWISE:
        return _elementwise(bind, operands)
    return bind.bind(*operands)


def _elementwise(bind: LocalBind, operands: Sequence[Any]) -> list[Any]:
    """Operands of size 1 along a dim are broadcast to the local result; true scalars pass as they are."""
    shape = bind.local_shapes[0]
    spread = [
        x if not bind.operand_shapes[i] or jnp.shape(x) == shape else lax.broadcast_in_dim(x, shape, range(len(shape)))
        for i, x in enumerate(operands)
    ]
    return bind.bind(*spread)


def _local(*names: str) -> Any:
    def add(function: Any) -> Any:
        for name in names:
            LOCAL_BINDERS[name] = function
        return function

    return add


@_local("reshape", "squeeze", "expand_dims")
def _reshape(bind: LocalBind, operand: Any) -> list[Any]:
    if bind.op.primitive.name == "reshape" and bind.op.params["dimensions"] is not None:
        operand = lax.transpose(operand, bind.op.params["dimensions"])  # Its dims are read in another order.
    return [jnp.reshape(operand, bind.local_shapes[0])]


@_local("broadcast_in_dim")
def _broadcast_in_dim(bind: LocalBind, operand: Any, *_: Any) -> list[Any]:
    shape = bind.local_shapes[0]
    if operand.size == _size(shape):
        return [jnp.reshape(operand, shape)]
    return [lax.broadcast_in_dim(operand, shape, bind.op.params["broadcast_dimensions"])]


def _size(shape: Shape) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


@_local("slice")
def _slice(bind: LocalBind, operand: Any) -> list[Any]:
    """A dim that is cut is whole, or sharded on factors that the cut keeps: then the cut is in local pieces."""
    params, whole, kept = bind.op.params, bind.operand_shapes[0], bind.result_shapes[0]
    strides = params["strides"] or (1,) * len(whole)
    start, limit, stride = [], [], []
    for dim, (n, local) in enumerate(zip(whole, operand.shape, strict=True)):
        if local == n:
            start.append(params["start_indices"][dim])
            limit.append(params["limit_indices"][dim])
            stride.append(strides[dim])
        elif n == kept[dim]:
            start.append(0)
            limit.append(local)
            stride.append(1)
        elif strides[dim] > 1:
            start.append(params["start_indices"][dim])
            limit.append(local)
            stride.append(strides[dim])
        else:
            piece = bind.local_shapes[0][dim]
            first = params["start_indices"][dim] // kept[dim] * piece
            start.append(first)
            limit.append(first + piece)
            stride.append(1)
    return [lax.slice(operand, start, limit, stride)]


@_local("split")
def _split(bind: LocalBind, operand: Any) -> list[Any]:
    axis = bind.op.params["axis"]
    return bind.bind(operand, sizes=tuple(shape[axis] for shape in bind.local_shapes))


@_local("dynamic_slice")
def _dynamic_slice(bind: LocalBind, operand: Any, *starts: Any) -> list[Any]:
    return bind.bind(operand, *starts, slice_sizes=bind.local_shapes[0])


@_local("gather")
def _gather(bind: LocalBind, operand: Any, indices: Any) -> list[Any]:
    params, whole = bind.op.params, bind.operand_shapes[0]
    sizes = tuple(
        local if size == n else size for size, n, local in zip(params["slice_sizes"], whole, operand.shape, strict=True)
    )
    if not bind.shifts:
        return bind.bind(operand, indices, slice_sizes=sizes)
    indices, inside = _shifted(bind, operand, indices, params["dimension_numbers"].start_index_map)
    # What another shard holds counts as zero here: the sum over shards is the gathered value.
    indices = jnp.where(inside, indices, jnp.iinfo(indices.dtype).max)
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return bind.bind(operand, indices, slice_sizes=sizes, mode=mode, fill_value=0, **_NO_PROMISES)


@_local("scatter-add", "scatter_add")
def _scatter_add(bind: LocalBind, operand: Any, indices: Any, updates: Any) -> list[Any]:
    if not bind.shifts:
        return bind.bind(operand, indices, updates)
    numbers = bind.op.params["dimension_numbers"]
    indices, inside = _shifted(bind, operand, indices, numbers.scatter_dims_to_operand_dims)
    # Updates of other shards add zero to some row of this one. (To drop them by an index out of bounds would be
    # simpler, but XLA on CPU reads beyond a sliced operand there.)
    rows = [1 if dim in numbers.update_window_dims else n for dim, n in enumerate(updates.shape)]
    updates = jnp.where(jnp.reshape(inside, rows), updates, jnp.zeros((), updates.dtype))
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return bind.bind(operand, jnp.where(inside, indices, 0), updates, mode=mode, **_NO_PROMISES)


_NO_PROMISES = {"indices_are_sorted": False, "unique_indices": False}
"""Indices made local are neither sorted nor unique, whatever the whole ones were."""


def _shifted(bind: LocalBind, operand: Any, indices: Any, index_map: Sequence[int]) -> tuple[Any, Any]:
    """Indices relative to the local shard, and whether they fall into it, with a last dim of 1."""
    inside = jnp.ones((*indices.shape[:-1], 1), bool)
    for shift in bind.shifts:
        column = list(index_map).index(shift.dim)
        local = operand.shape[shift.dim]
        chosen = indices[..., column]
        if bind.op.params["mode"] == lax.GatherScatterMode.CLIP:
            chosen = jnp.clip(chosen, 0, shift.size - 1)
        chosen = chosen - (bind.index(shift.names) * local).astype(chosen.dtype)
        inside &= ((chosen >= 0) & (chosen < local))[..., None]
        indices = indices.at[..., column].set(chosen)
    return indices, inside


@_local("conv_general_dilated")
def _convolution(bind: LocalBind, lhs: Any, rhs: Any) -> list[Any]:
    params, whole = bind.op.params, bind.operand_shapes[0]
    spec = params["dimension_numbers"].lhs_spec
    changed: dict[str, Any] = {}
    for key, dim in (("feature_group_count", spec[1]), ("batch_group_count", spec[0])):
        if params[key] > 1:
            changed[key] = lhs.shape[dim] // max(1, whole[dim] // params[key])
    return bind.bind(lhs, rhs, **changed)


def is_key(dtype: Any) -> bool:
    """Whether an array holds random keys."""
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
