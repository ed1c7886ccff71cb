"""The devices a command runs on."""

from __future__ import annotations

import os

import jax

_HOST_COUNT_FLAG = "--xla_force_host_platform_device_count"


def use_virtual_cpus(count: int) -> None:
    """Splits the CPU into virtual devices, for machines without accelerators; others are not affected.

    Leaves it alone where `XLA_FLAGS` or `JAX_NUM_CPU_DEVICES` say a number already. Call before JAX is used.

    Args:
        count: virtual devices.
    """
    if _HOST_COUNT_FLAG in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    jax.config.update("jax_num_cpu_devices", count)


def describe_devices() -> str:
    """How many devices of which kind JAX has."""
    devices = jax.devices()
    return f"{len(devices)} × {devices[0].device_kind}"
