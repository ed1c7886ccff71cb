"""A GPT whose user rematerialises each block with ``nnx.remat``."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from flax import nnx

from .batches import SEQ, VOCAB, next_token_batch
from .case import ModelCase
from .gpt_block import Block


class RematGPT(nnx.Module):
    def __init__(self, width: int = 64, heads: int = 8, layers: int = 3, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.positions = nnx.Embed(SEQ, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(self.norm(x))


def loss_fn(model, batch):
    logits = model(batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def tiny() -> ModelCase:
    return ModelCase(
        name="remat_gpt",
        flavour="nnx",
        make=lambda: lambda rngs: RematGPT(rngs=rngs),
        loss_fn=loss_fn,
        batch=next_token_batch,
    )
