"""Attention and rotary positions, shared by the Transformer families."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def softmax_float32(scores: Array, *, mask: Array | None = None, bias: Array | None = None) -> Array:
    """Softmax over the last dim, computed in float32 and returned in the scores' own dtype.

    Args:
        scores: attention scores, any leading dims.
        mask: Boolean, broadcastable to the scores; ``False`` is not attended to.
        bias: added to the scores before the mask, broadcastable to them.
    """
    logits = scores.astype(jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1).astype(scores.dtype)


def causal_mask(length: int) -> Array:
    """``Bool[length, length]``: query ``i`` sees keys ``0 … i``."""
    positions = jnp.arange(length)
    return positions[:, None] >= positions[None, :]


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float,
    mask: Array | None = None,
    bias: Array | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Multi-head attention.

    Args:
        query: ``Float[batch, queries, heads, head_dim]``.
        key: ``Float[batch, keys, heads, head_dim]``.
        value: ``Float[batch, keys, heads, head_dim]``.
        scale: multiplies the scores.
        mask: Boolean, broadcastable to ``[batch, heads, queries, keys]``.
        bias: added to the scores, broadcastable like the mask.
        dropout: applied to the attention weights.

    Returns:
        ``Float[batch, queries, heads, head_dim]``.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key)
    weights = softmax_float32(scores, mask=mask, bias=bias)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def attend_grouped(query: Array, key: Array, value: Array, *, scale: float, mask: Array | None = None) -> Array:
    """Grouped-query attention (Ainslie et al., 2023): each key/value head serves ``heads / kv_heads`` query heads.

    Args:
        query: ``Float[batch, queries, heads, head_dim]``.
        key: ``Float[batch, keys, kv_heads, head_dim]``.
        value: ``Float[batch, keys, kv_heads, head_dim]``.
        scale: multiplies the scores.
        mask: Boolean, ``[queries, keys]``.

    Returns:
        ``Float[batch, queries, heads, head_dim]``.
    """
    # Scores stand as the product makes them, query heads next to their keys: XLA's GPU compiler would else turn them
    # round, an array of the size of all scores each time.
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqngd,bknd->bnqgk", query * scale, key)
    weights = softmax_float32(scores, mask=None if mask is None else mask[:, None, :])
    return jnp.einsum("bnqgk,bknd->bqngd", weights, value).reshape(batch, queries, heads, head_dim)


def rotary_table(length: int, head_dim: int, *, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of rotary positions (Su et al., 2021), each ``Float32[length, head_dim / 2]``."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns ``Float[batch, seq, heads, head_dim]`` by its position; the first and second half are a pair (as Llama)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
