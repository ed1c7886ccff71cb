"""The live devices as a mesh of prime axes, and the groups of devices that its axes span."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from galvatron_jax.errors import InputError


@dataclass(frozen=True)
class AxisGroup:
    """Devices that one collective joins: those that differ only along `axes`."""

    axes: tuple[str, ...]
    size: int
    level: str
    """`intra` when every group lies within a node (a process), else `inter`."""


def peak_memory_bytes() -> int | None:
    """Most bytes that a device of this process has held so far; None where devices do not say (CPUs)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known, default=None)


def live_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes of prime size over the live devices, the axes that cross nodes first.

    Twelve devices of two processes become axes `a` (2, across processes), `b` (2) and `c` (3).

    Args:
        devices: Devices to use; all there are by default.

    Raises:
        InputError: when the processes hold unlike numbers of devices.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    nodes = num_nodes(devices)
    sizes = [*_primes(nodes), *_primes(len(devices) // nodes)] or [1]
    names = [chr(ord("a") + index) for index in range(len(sizes))]
    return Mesh(np.array(devices).reshape(sizes), names)


def num_nodes(devices: Sequence[jax.Device]) -> int:
    """Processes among the devices; each is taken for a node.

    Raises:
        InputError: when the processes hold unlike numbers of devices.
    """
    held = [sum(d.process_index == index for d in devices) for index in sorted({d.process_index for d in devices})]
    if len(set(held)) > 1:
        raise InputError(f"The processes hold {held} devices; use the same number in each.")
    return len(held)


def axis_groups(mesh: Mesh) -> tuple[AxisGroup, ...]:
    """One group for each size and link level that collectives over subsets of the mesh's axes can have.

    Of several subsets of one size and level the one over the last axes stands for all.
    """
    found: dict[tuple[int, str], AxisGroup] = {}
    names = list(reversed(mesh.axis_names))
    for length in range(1, len(names) + 1):
        for subset in itertools.combinations(names, length):
            axes = tuple(name for name in mesh.axis_names if name in subset)
            group = AxisGroup(axes, math.prod(mesh.shape[name] for name in axes), _level(mesh, axes))
            if group.size > 1:
                found.setdefault((group.size, group.level), group)
    return tuple(sorted(found.values(), key=lambda group: (group.level, group.size)))


def memory_bytes(device: jax.Device) -> int:
    """Memory that one device can use: the allocator's limit, or on a CPU its share of what the host has."""
    stats = device.memory_stats() or {}
    if stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    sharing = sum(other.process_index == device.process_index for other in jax.devices(device.platform))
    return _host_memory_bytes() // sharing


def usable_cores() -> int:
    """Cores this process may run on, pinning included."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _host_memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            with open(path) as file:
                text = file.read().strip()
            total = min(total, int(text)) if text.isdigit() else total
    return total


def _level(mesh: Mesh, axes: tuple[str, ...]) -> str:
    positions = [mesh.axis_names.index(name) for name in axes]
    members = np.moveaxis(mesh.devices, positions, range(-len(positions), 0))
    members = members.reshape(-1, math.prod(mesh.shape[name] for name in axes))
    return "inter" if any(len({device.process_index for device in row}) > 1 for row in members) else "intra"


def _primes(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors
