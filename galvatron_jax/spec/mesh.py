"""Meshes as data: axes of prime size, slowest link first. No JAX."""

from __future__ import annotations

import string

from galvatron_jax.errors import InputError
from galvatron_jax.spec.plan import MeshAxis


def prime_factors(number: int) -> tuple[int, ...]:
    """Prime factors, largest first; none for 1.

    Example:
        >>> prime_factors(24)
        (3, 2, 2, 2)
    """
    factors = []
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return tuple(sorted(factors + [number] * (number > 1), reverse=True))


def prime_axes(num_devices: int, devices_per_node: int) -> tuple[MeshAxis, ...]:
    """The mesh of a cluster: one axis per prime factor, named a, b, c, ..., axes between nodes before those within.

    Every degree of parallelism that divides a level's devices is then a set of axes.

    Args:
        num_devices: Devices to use. Up to one node's worth they all lie in one node.
        devices_per_node: Devices that share the fast links.

    Raises:
        InputError: when the devices do not fill whole nodes.

    Example:
        >>> [(axis.name, axis.size, axis.level) for axis in prime_axes(12, 4)]
        [('a', 3, 'inter'), ('b', 2, 'intra'), ('c', 2, 'intra')]
    """
    if num_devices < 1 or devices_per_node < 1:
        raise InputError(f"A mesh of {num_devices} devices in nodes of {devices_per_node}: both must be at least 1.")
    within = min(num_devices, devices_per_node)
    if num_devices % within:
        raise InputError(
            f"{num_devices} devices do not fill nodes of {devices_per_node}; "
            f"use {num_devices - num_devices % within} or {num_devices + within - num_devices % within}."
        )
    sizes = [(size, "inter") for size in prime_factors(num_devices // within)]
    sizes += [(size, "intra") for size in prime_factors(within)]
    return tuple(
        MeshAxis(name=name, size=size, level=level)
        for name, (size, level) in zip(string.ascii_lowercase, sizes, strict=False)
    )


def mesh_shape(axes: tuple[MeshAxis, ...]) -> dict[str, int]:
    """Axis sizes by name, in mesh order.

    Example:
        >>> mesh_shape(prime_axes(8, 8))
        {'a': 2, 'b': 2, 'c': 2}
    """
    return {axis.name: axis.size for axis in axes}
