"""A GPT in Linen, its mask a NumPy constant in each block."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .batches import SEQ, VOCAB, next_token_batch
from .case import ModelCase


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        qkv = nn.Dense(3 * width, name="qkv")(nn.LayerNorm(name="norm1")(x))
        query, key, value = jnp.split(qkv.reshape(batch, length, self.heads, -1), 3, axis=-1)
        scores = jnp.einsum("bihd,bjhd->bhij", query, key) / (width // self.heads) ** 0.5
        scores = jnp.where(np.tril(np.ones((length, length), bool)), scores, -1e9)
        mixed = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), value)
        x = x + nn.Dense(width, name="proj")(mixed.reshape(batch, length, width))
        hidden = nn.gelu(nn.Dense(4 * width, name="fc1")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(width, name="fc2")(hidden)


class LinenGPT(nn.Module):
    width: int = 64
    heads: int = 8
    layers: int = 3

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, self.width, name="embed")
        positions = self.param("positions", nn.initializers.normal(0.02), (SEQ, self.width))
        x = embed(tokens) + positions[: tokens.shape[1]]
        for layer in range(self.layers):
            x = Block(self.heads, name=f"block_{layer}")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


def loss_fn(model, batch):
    logits = model(batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def tiny() -> ModelCase:
    return ModelCase(name="linen_gpt", flavour="linen", make=LinenGPT, loss_fn=loss_fn, batch=next_token_batch)
