"""The memory budget as users write it."""

from __future__ import annotations

from galvatron_jax.errors import InputError
from galvatron_jax.units import parse_bytes


def memory_budget(memory_per_device: str | int | None) -> int | None:
    """Bytes of a budget such as ``"20GiB"``; None, for all of the device's memory, stays None.

    Raises:
        InputError: when it is no size, or not positive.
    """
    if memory_per_device is None:
        return None
    try:
        budget = parse_bytes(memory_per_device)
    except ValueError as error:
        raise InputError(f"memory_per_device: {error}") from error
    if budget <= 0:
        raise InputError(f"memory_per_device is {memory_per_device!r}; a budget must be positive, such as '20GiB'.")
    return budget
