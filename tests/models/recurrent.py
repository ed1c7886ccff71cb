"""Blocks that loop over time with ``lax.scan``: a diagonal linear recurrence, and one from hidden to hidden."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from .batches import VOCAB, next_token_batch
from .case import ModelCase


class RecurrentBlock(nnx.Module):
    def __init__(self, width: int, inner: int, *, dense: bool, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.into = nnx.Linear(width, inner, rngs=rngs)
        self.decay = None if dense else nnx.Param(jnp.linspace(-1.0, 1.0, inner))
        self.mix = nnx.Linear(inner, inner, use_bias=False, rngs=rngs) if dense else None
        self.out = nnx.Linear(inner, width, rngs=rngs)

    def __call__(self, x):
        inputs = jnp.swapaxes(self.into(self.norm(x)), 0, 1)
        decay = None if self.decay is None else jax.nn.sigmoid(self.decay[...])

        def step(hidden, u):
            hidden = jnp.tanh(u + self.mix(hidden)) if decay is None else decay * hidden + u
            return hidden, hidden

        _, outputs = lax.scan(step, jnp.zeros(inputs.shape[1:], inputs.dtype), inputs)
        return x + self.out(jnp.swapaxes(outputs, 0, 1))


class RecurrentLM(nnx.Module):
    def __init__(self, width: int = 64, layers: int = 3, *, dense: bool, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        blocks = [RecurrentBlock(width, 2 * width, dense=dense, rngs=rngs) for _ in range(layers)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model, batch):
    logits = model(batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def tiny(*, dense: bool) -> ModelCase:
    return ModelCase(
        name="recurrent_dense" if dense else "recurrent_diagonal",
        flavour="nnx",
        make=lambda: lambda rngs: RecurrentLM(dense=dense, rngs=rngs),
        loss_fn=loss_fn,
        batch=next_token_batch,
    )
