"""Times a function of local arrays while every device of a mesh runs it at once.

Devices that share something (virtual devices their cores, GPUs their power or host link) slow each other down
in a real step; running the same work everywhere puts that into the figure. The work is repeated inside one
compiled program, as a training step runs its layers, so that neither dispatch nor transfers are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax.errors import InputError
from galvatron_jax.profiler.timing import DEFAULT_SAMPLING, Sampling, sample
from galvatron_jax.spec.profile import Timing

LocalFunction = Callable[..., object]
"""Takes the local arrays of one device and returns a tree of them; may use collectives over the mesh's axes."""

# Elements drawn at random; larger inputs repeat them, for drawing gigabytes would take longer than measuring.
_RANDOM_BLOCK = 1 << 16
_KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
# No output ever equals it; the compiler does not know that.
_NEVER = 1.2345e30


def time_everywhere(
    function: LocalFunction,
    inputs: Sequence[jax.ShapeDtypeStruct],
    *,
    mesh: Mesh,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Timing:
    """Times `function` on all devices of `mesh` at once.

    All outputs are kept, so none of the work is dead code. Inputs are never donated. Each repetition stands under
    a condition on what the one before made, so the compiler can neither hoist the work out of the loop nor overlap
    two repetitions, and no input is copied. The condition costs microseconds on a CPU, about ten on a GPU.

    Args:
        function: Work of one device.
        inputs: Local shapes and dtypes. Floats get random values, integers and booleans 0 and 1, keys random bits.
        mesh: Devices; its axis names are bound inside `function`.
        sampling: Effort.

    Returns:
        Seconds of one application.

    Raises:
        InputError: when the function returns no array, so that there is nothing to time.
    """
    arrays = [_place(struct, mesh, seed) for seed, struct in enumerate(inputs)]
    program = compile_everywhere(function, arrays, mesh=mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def run(count: int) -> None:
        jax.block_until_ready(program(jax.device_put(np.int32(count), replicated), *arrays))

    return sample(run, sampling=sampling)


def compile_everywhere(function: LocalFunction, arrays: Sequence[jax.Array], *, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles ``(count, *arrays) -> outputs``, which applies `function` `count` times on every device.

    Args:
        function: Work of one device.
        arrays: Global arrays whose leading dim has one entry per device.
        mesh: Devices.
    """
    shards = PartitionSpec(mesh.axis_names)

    def local(count: jax.Array, *blocks: jax.Array) -> list[jax.Array]:
        values = [block.reshape(block.shape[1:]) for block in blocks]
        return [output[None] for output in _repeat(function, values, count)]

    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), *[shards] * len(arrays)), out_specs=shards, check_vma=False
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return jax.jit(spread).lower(count, *arrays).compile()


def _repeat(function: LocalFunction, values: list[jax.Array], count: jax.Array) -> list[jax.Array]:
    """The outputs of the last of `count` applications, each of which waits for the one before."""
    structs = jax.eval_shape(lambda *xs: _outputs(function, xs), *values)
    if not any(struct.size for struct in structs):
        raise InputError(f"Nothing to time: {function!r} returns no array besides its own inputs.")

    def nothing(*_: jax.Array) -> list[jax.Array]:
        return [jnp.zeros(struct.shape, struct.dtype) for struct in structs]

    def work(*xs: jax.Array) -> list[jax.Array]:
        return _outputs(function, xs)

    def body(_: jax.Array, previous: list[jax.Array]) -> list[jax.Array]:
        return lax.cond(_signal(previous), nothing, work, *values)

    return lax.fori_loop(jnp.int32(0), count, body, nothing())


def _outputs(function: LocalFunction, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays that the function made; what it hands through would only be copied, which is no work of its own."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(function(*inputs))}
    made = [leaf for key, leaf in leaves.items() if key not in {id(value) for value in inputs}]
    return [jax.random.key_data(leaf) if _is_key(leaf.dtype) else jnp.asarray(leaf) for leaf in made]


def _signal(outputs: list[jax.Array]) -> jax.Array:
    """False, in a way that only running the program that made `outputs` can tell."""
    output = next(output for output in outputs if output.size)
    return output[(0,) * output.ndim].astype(jnp.float32) == jnp.float32(_NEVER)


def _place(struct: jax.ShapeDtypeStruct, mesh: Mesh, seed: int) -> jax.Array:
    """A global array with `struct` on each device along a new leading dim."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    if _is_key(struct.dtype):
        implementation, words = _key_layout(struct.dtype)
        bits = _place(jax.ShapeDtypeStruct((*struct.shape, words), jnp.uint32), mesh, seed)
        return jax.random.wrap_key_data(bits, impl=implementation)
    block = np.resize(_random_values(struct.dtype, min(struct.size, _RANDOM_BLOCK), seed), (1, *struct.shape))
    return jax.make_array_from_callback((mesh.size, *struct.shape), sharding, lambda _: block)


def _random_values(dtype: np.dtype, size: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if jnp.issubdtype(dtype, jnp.inexact):
        return (0.1 * generator.standard_normal(size)).astype(dtype)
    return generator.integers(0, 2, size).astype(dtype)


def _is_key(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _key_layout(dtype: object) -> tuple[str, int]:
    """Name of a key dtype's implementation, and its words per key."""
    for name in _KEY_IMPLEMENTATIONS:
        key = jax.random.key(0, impl=name)
        if key.dtype == dtype:
            return name, jax.random.key_data(key).shape[-1]
    raise InputError(f"Random keys of type {dtype} are none of {', '.join(_KEY_IMPLEMENTATIONS)}.")
