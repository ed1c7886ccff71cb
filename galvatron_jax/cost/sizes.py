"""Shapes and bytes of a layer's values at a given micro-batch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache

from galvatron_jax.partition.layer_plan import BoundarySpec
from galvatron_jax.spec.model import LayerKind, Variable
from galvatron_jax.spec.program import FactorRole

LINE = 128
"""Elements of a line of a pipeline's flat arrays, in which every layer's every parameter begins a new one; see
`runtime.packing`."""
_BITS = re.compile(r"(\d+)")


@lru_cache
def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype by its JAX name; sub-byte types count a byte, random keys eight.

    Example:
        >>> itemsize("bfloat16"), itemsize("bool"), itemsize("float8_e4m3fn"), itemsize("key<fry>")
        (2, 1, 1, 8)
    """
    if dtype.startswith("key<"):
        return 8
    bits = _BITS.search(dtype)
    return max(1, int(bits[1]) // 8) if bits else 1


def lines_of(elements: int) -> int:
    """Lines of an array in a pipeline's flat arrays.

    Example:
        >>> lines_of(0), lines_of(128), lines_of(129)
        (0, 1, 2)
    """
    return -(-elements // LINE)


def whole_bytes(variable: Variable) -> int:
    """Bytes of a whole leaf of the model.

    Example:
        >>> whole_bytes(Variable(path="scale", shape=(2, 8), dtype="bfloat16"))
        32
    """
    return itemsize(variable.dtype) * math.prod(variable.shape)


def value_dims(kind: LayerKind, value: int, *, microbatch: int, model_microbatch: int) -> tuple[int, ...]:
    """Global shape of a value of a layer kind when it runs on `microbatch` examples.

    Args:
        kind: the layer kind, traced at `model_microbatch` examples.
        value: index into `kind.program.values`.
        microbatch: examples of one micro-batch, over all devices.
        model_microbatch: `ModelSpec.microbatch`.
    """
    factors = kind.program.factors
    dims = []
    for dim in kind.program.values[value].dims:
        size = math.prod(factors[factor].size for factor in dim)
        dims.append(size * microbatch // model_microbatch if _grows(kind, dim) else size)
    return tuple(dims)


def _grows(kind: LayerKind, dim: tuple[int, ...]) -> bool:
    """Whether a dim grows with the micro-batch: values that never meet have batch factors of their own."""
    return any(kind.program.factors[factor].role is FactorRole.BATCH for factor in dim)


def batch_spec(kind: LayerKind, value: int, batch_axes: tuple[str, ...]) -> BoundarySpec:
    """The plan-wide layout of a value: its batch dim over `batch_axes`, nothing else split."""
    spec: list[tuple[str, ...]] = []
    pending = batch_axes
    for dim in kind.program.values[value].dims:
        here = _grows(kind, dim)
        spec.append(pending if here else ())
        pending = () if here else pending
    return tuple(spec)


def local_bytes(dims: tuple[int, ...], dtype: str, spec: BoundarySpec, mesh: Mapping[str, int]) -> int:
    """Bytes that one device holds of an array laid out as `spec` says.

    Example:
        >>> local_bytes((8, 16), "float32", (("a",), ()), {"a": 2})
        256
    """
    count = itemsize(dtype)
    for index, size in enumerate(dims):
        axes = spec[index] if index < len(spec) else ()
        count *= -(-size // math.prod(mesh[axis] for axis in axes))
    return count
