"""A residual network with running statistics (``nnx.BatchNorm``) and random state (``nnx.Dropout``)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from .batches import vector_batch
from .case import ModelCase


class ResidualBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(2 * width, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


class BatchNormNet(nnx.Module):
    def __init__(self, width: int = 64, layers: int = 3, *, rngs: nnx.Rngs):
        self.into = nnx.Linear(32, width, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(width, rngs=rngs) for _ in range(layers)])
        self.out = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, inputs):
        x = self.into(inputs)
        for block in self.blocks:
            x = block(x)
        return self.out(x)[:, 0]


def loss_fn(model, batch):
    return jnp.mean((model(batch["inputs"]) - batch["targets"]) ** 2)


def tiny() -> ModelCase:
    return ModelCase(
        name="batchnorm_net",
        flavour="nnx",
        make=lambda: lambda rngs: BatchNormNet(rngs=rngs),
        loss_fn=loss_fn,
        batch=vector_batch,
    )
