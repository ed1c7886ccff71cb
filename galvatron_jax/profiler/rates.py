"""What one device sustains while all work at once: matrix products, memory traffic, optimizer updates."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from galvatron_jax.profiler.bench import Bench

MATMUL_DTYPES = ("float32", "bfloat16")
RATE_POINTS = len(MATMUL_DTYPES) + 2
"""Points that `measure_matmul` per dtype, `measure_memory` and `measure_update` take together."""

# Adam reads parameter, gradient and two moments, and writes all but the gradient.
_ADAM_ARRAYS_TOUCHED = 7


def measure_matmul(bench: Bench, *, dtype: str) -> float:
    """FLOP/s of one device on a square matrix product large enough to be limited by arithmetic."""
    size = 512 if _on_cpu(bench) else 8192
    bench.step(f"matrix product in {dtype}")
    operand = jax.ShapeDtypeStruct((size, size), jnp.dtype(dtype))
    key = {"what": "matmul", "dtype": dtype, "size": size}
    timing = bench.time(key, lambda: (jnp.matmul, [operand, operand]))
    return 2 * size**3 / timing.median_s


def measure_memory(bench: Bench) -> float:
    """Bytes per second that one device reads and writes, together, when it scales an array larger than its caches."""
    elements = 4 * _elements(bench)
    bench.step("memory bandwidth")
    array = jax.ShapeDtypeStruct((elements,), jnp.float32)
    timing = bench.time({"what": "memory", "elements": elements}, lambda: (lambda x: x * 0.5, [array]))
    return 2 * 4 * elements / timing.median_s


def measure_update(bench: Bench) -> float:
    """Bytes read and written per second by one device in an Adam update.

    Each parameter, moment and gradient read counts, and each parameter and moment written: seven arrays.
    """
    elements = _elements(bench)
    bench.step("optimizer update")
    array = jax.ShapeDtypeStruct((elements,), jnp.float32)
    timing = bench.time({"what": "adam update", "elements": elements}, lambda: (_adam, [array] * 4))
    return _ADAM_ARRAYS_TOUCHED * 4 * elements / timing.median_s


def _adam(parameter: jax.Array, gradient: jax.Array, mean: jax.Array, square: jax.Array) -> tuple[jax.Array, ...]:
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.999 * square + 0.001 * gradient * gradient
    return parameter - 1e-3 * mean / (jnp.sqrt(jnp.abs(square)) + 1e-8), mean, square


def _elements(bench: Bench) -> int:
    """Of an array: several of these, or one four times as large, are more than caches hold."""
    return 1 << (22 if _on_cpu(bench) else 27)


def _on_cpu(bench: Bench) -> bool:
    return bench.mesh.devices.flat[0].platform == "cpu"
