"""A Vision Transformer in Linen, its modules set up by hand, with Flax's own attention."""

from __future__ import annotations

import flax.linen as nn
import optax

from .batches import VOCAB, image_batch
from .case import ModelCase


class Block(nn.Module):
    width: int
    heads: int

    def setup(self):
        self.norm1 = nn.LayerNorm()
        self.attention = nn.MultiHeadDotProductAttention(num_heads=self.heads, use_bias=False)
        self.norm2 = nn.LayerNorm()
        self.up = nn.Dense(4 * self.width)
        self.down = nn.Dense(self.width)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.gelu(self.up(self.norm2(x))))


class LinenViT(nn.Module):
    width: int = 64
    heads: int = 8
    layers: int = 3

    def setup(self):
        self.patches = nn.Conv(self.width, kernel_size=(4, 4), strides=(4, 4), padding="VALID")
        self.positions = self.param("positions", nn.initializers.normal(0.02), (16, self.width))
        self.blocks = [Block(self.width, self.heads) for _ in range(self.layers)]
        self.norm = nn.LayerNorm()
        self.head = nn.Dense(VOCAB)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, self.width) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def loss_fn(model, batch):
    logits = model(batch["images"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def tiny() -> ModelCase:
    return ModelCase(
        name="linen_vit", flavour="linen", make=LinenViT, loss_fn=loss_fn, batch=image_batch, init_key="images"
    )
