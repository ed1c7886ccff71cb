"""A Llama in Linen: projections to head-shaped dims, keys and values repeated for their group, interleaved rotation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from .batches import VOCAB, next_token_batch
from .case import ModelCase


def rotate(x, angles):
    """Turns each even element against its odd neighbour: ``Float[batch, seq, heads, head_dim]``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


class Attention(nn.Module):
    heads: int
    kv_heads: int

    @nn.compact
    def __call__(self, x, angles):
        length, width = x.shape[1:]
        head_dim = width // self.heads
        query = nn.DenseGeneral((self.heads, head_dim), use_bias=False, name="query")(x)
        key = nn.DenseGeneral((self.kv_heads, head_dim), use_bias=False, name="key")(x)
        value = nn.DenseGeneral((self.kv_heads, head_dim), use_bias=False, name="value")(x)
        query, key = rotate(query, angles), rotate(key, angles)
        key = jnp.repeat(key, self.heads // self.kv_heads, axis=2)
        value = jnp.repeat(value, self.heads // self.kv_heads, axis=2)
        scores = jnp.einsum("bihd,bjhd->bhij", query, key) * head_dim**-0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
        mixed = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), value)
        return nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, name="out")(mixed)


class Block(nn.Module):
    heads: int
    kv_heads: int

    @nn.compact
    def __call__(self, x, angles):
        x = x + Attention(self.heads, self.kv_heads, name="attention")(nn.RMSNorm(name="norm1")(x), angles)
        hidden = nn.RMSNorm(name="norm2")(x)
        gate_up = nn.Dense(4 * x.shape[-1], use_bias=False, name="gate_up")(hidden)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return x + nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.silu(gate) * up)


class LinenLlama(nn.Module):
    width: int = 64
    heads: int = 8
    kv_heads: int = 4
    layers: int = 3

    @nn.compact
    def __call__(self, tokens):
        head_dim = self.width // self.heads
        frequencies = 10_000.0 ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        angles = jnp.arange(tokens.shape[1], dtype=jnp.float32)[:, None] * frequencies
        x = nn.Embed(VOCAB, self.width, name="embed")(tokens)
        for layer in range(self.layers):
            x = Block(self.heads, self.kv_heads, name=f"block_{layer}")(x, angles)
        return nn.Dense(VOCAB, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


def loss_fn(model, batch):
    logits = model(batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def tiny() -> ModelCase:
    return ModelCase(name="linen_llama", flavour="linen", make=LinenLlama, loss_fn=loss_fn, batch=next_token_batch)
