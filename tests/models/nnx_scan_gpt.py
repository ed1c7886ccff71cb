"""A GPT with its blocks stacked by ``nnx.vmap`` and run by ``nnx.scan``."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from flax import nnx

from .batches import SEQ, VOCAB, next_token_batch
from .case import ModelCase
from .gpt_block import Block


class ScanGPT(nnx.Module):
    def __init__(self, width: int = 64, heads: int = 8, layers: int = 4, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(width, heads, rngs=rngs)

        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.positions = nnx.Embed(SEQ, width, rngs=rngs)
        self.blocks = stack(rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        return self.embed.attend(self.norm(run(x, self.blocks)))


def loss_fn(model, batch):
    logits = model(batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def tiny() -> ModelCase:
    return ModelCase(
        name="nnx_scan_gpt",
        flavour="nnx",
        make=lambda: lambda rngs: ScanGPT(rngs=rngs),
        loss_fn=loss_fn,
        batch=next_token_batch,
    )
