"""Losses in float32, whatever dtype the model computes in."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Cross-entropy of each position.

    Args:
        logits: ``Float[..., classes]``.
        targets: ``Int[...]``.

    Returns:
        ``Float32[...]``.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
