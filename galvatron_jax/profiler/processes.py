"""Keeping the processes of one job in step: each must take the same decisions from the same numbers."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def agree(values: float | np.ndarray) -> np.ndarray:
    """What process 0 says, on every process, in float64."""
    values = np.asarray(values, np.float64)
    if jax.process_count() == 1:
        return values
    # As words of 32 bits, for JAX would round 64-bit floats.
    words = np.atleast_1d(values).view(np.int32)
    received = np.asarray(multihost_utils.broadcast_one_to_all(words)).astype(np.int32)
    return received.view(np.float64).reshape(values.shape)


def least(value: float) -> float:
    """The least that any process says, on every process, in float64."""
    if jax.process_count() == 1:
        return value
    words = np.asarray([value], np.float64).view(np.int32)
    gathered = np.asarray(multihost_utils.process_allgather(words), np.int32)
    return float(gathered.reshape(-1).view(np.float64).min())
