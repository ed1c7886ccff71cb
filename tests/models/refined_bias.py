"""Blocks that hand an attention bias on, each refining it, and a head that reads all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .batches import SEQ, VOCAB, next_token_batch
from .case import ModelCase

HEADS = 8


class BiasedBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.qkv = nnx.LinearGeneral(width, (3, HEADS, width // HEADS), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, width // HEADS), width, axis=(-2, -1), rngs=rngs)
        self.refine = nnx.Param(0.1 * jax.random.normal(rngs.params(), (HEADS, 1, 1)))

    def __call__(self, x, bias):
        qkv = self.qkv(self.norm(x))
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return x + self.out(mixed), bias + self.refine[...] * jnp.tanh(bias)


class RefinedBias(nnx.Module):
    def __init__(self, width: int = 64, layers: int = 4, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.bias = nnx.Param(jax.random.normal(rngs.params(), (HEADS, SEQ, SEQ)))
        self.blocks = nnx.List([BiasedBlock(width, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x, bias = self.embed(tokens), jnp.sin(self.bias[...])
        seen = [bias]
        for block in self.blocks:
            x, bias = block(x, bias)
            seen.append(bias)
        weights = jax.nn.softmax(sum(seen).mean(axis=0))
        return self.head(self.norm(x + weights @ x))


def loss_fn(model, batch):
    logits = model(batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def tiny() -> ModelCase:
    return ModelCase(
        name="refined_bias",
        flavour="nnx",
        make=lambda: lambda rngs: RefinedBias(rngs=rngs),
        loss_fn=loss_fn,
        batch=next_token_batch,
    )
