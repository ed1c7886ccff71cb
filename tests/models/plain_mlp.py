"""A perceptron without any repeated block."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from .batches import vector_batch
from .case import ModelCase


class PlainMLP(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(32, 128, rngs=rngs)
        self.second = nnx.Linear(128, 64, rngs=rngs)
        self.last = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.last(nnx.tanh(self.second(nnx.tanh(self.first(inputs)))))[:, 0]


def loss_fn(model, batch):
    return jnp.mean((model(batch["inputs"]) - batch["targets"]) ** 2)


def tiny() -> ModelCase:
    return ModelCase(
        name="plain_mlp",
        flavour="nnx",
        make=lambda: lambda rngs: PlainMLP(rngs=rngs),
        loss_fn=loss_fn,
        batch=vector_batch,
    )
