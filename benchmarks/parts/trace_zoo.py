"""Models of the zoo, traced without their parameters."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from galvatron_jax.models import registry
from galvatron_jax.trace.model import Traced, trace


def trace_zoo(name: str, preset: str, *, microbatch: int, called: str, **changes: Any) -> Traced:
    """A model of the zoo, as a step sees it.

    Args:
        name: of the family.
        preset: of its size.
        microbatch: examples.
        called: what the result calls itself.
        changes: fields of its configuration that differ from the preset.
    """
    family = registry.family(name)
    config = registry.model_config(name, preset, **changes)

    def make(seed: int | None) -> nnx.Module:
        return family.model(config, rngs=nnx.Rngs(jax.random.key(0 if seed is None else seed)))

    batch = family.example_batch(config, microbatch)
    return trace(nnx.eval_shape(lambda: make(0)), family.loss_fn, batch, make=make, name=called)
