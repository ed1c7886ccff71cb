"""A GPT in Linen whose blocks are rematerialised by ``nn.remat`` and stacked by ``nn.scan``."""

from __future__ import annotations

import flax.linen as nn
import optax

from .batches import SEQ, VOCAB, next_token_batch
from .case import ModelCase
from .linen_gpt import Block


class ScannedBlock(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, _):
        return Block(self.heads, name="block")(x), None


class LinenScanGPT(nn.Module):
    width: int = 64
    heads: int = 8
    layers: int = 4

    @nn.compact
    def __call__(self, tokens):
        positions = self.param("positions", nn.initializers.normal(0.02), (SEQ, self.width))
        x = nn.Embed(VOCAB, self.width, name="embed")(tokens) + positions[: tokens.shape[1]]
        blocks = nn.scan(
            nn.remat(ScannedBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = blocks(self.heads, name="blocks")(x, None)
        return nn.Dense(VOCAB, name="head")(nn.LayerNorm(name="norm")(x))


def loss_fn(model, batch):
    logits = model(batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def tiny() -> ModelCase:
    return ModelCase(name="linen_scan_gpt", flavour="linen", make=LinenScanGPT, loss_fn=loss_fn, batch=next_token_batch)
