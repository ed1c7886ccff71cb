"""The model that a configuration names: one of the zoo, or a factory of the user's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from galvatron_jax.api import auto_shard
from galvatron_jax.cli.config import ModelConfig
from galvatron_jax.errors import InputError
from galvatron_jax.models import registry
from galvatron_jax.spec.validation import did_you_mean


@dataclass(frozen=True)
class LoadedModel:
    """A model with what training it takes."""

    name: str
    model: Any
    loss_fn: Callable[[Any, Any], Any]
    example_batch: Any
    """Shapes of a global batch."""
    random_batch: Callable[[int], Any]
    """From a seed."""
    vocabulary: int | None
    """Tokens that it knows; None where it does not say."""

    @property
    def tokens_per_batch(self) -> int | None:
        """Tokens of a global batch; None where the batch is not one array of tokens."""
        leaves = jax.tree.leaves(self.example_batch)
        if len(leaves) != 1 or len(leaves[0].shape) != 2 or not np.issubdtype(leaves[0].dtype, np.integer):
            return None
        # A window holds the inputs and one target more.
        return leaves[0].shape[0] * (leaves[0].shape[1] - 1)


def load_model(config: ModelConfig, *, batch_size: int) -> LoadedModel:
    """Builds the model, abstract, so that its size costs nothing.

    Raises:
        InputError: when there is no such family, size, field or factory, or the factory returns something else.
    """
    return _of_zoo(config, batch_size) if config.factory is None else _of_factory(config.factory, batch_size)


def _of_zoo(config: ModelConfig, batch_size: int) -> LoadedModel:
    assert config.family is not None
    try:
        family = registry.family(config.family)
        if config.size is None:
            raise ValueError(f"No size of {config.family} given; there are: {', '.join(family.presets)}.")
        sizes = registry.model_config(config.family, config.size, **config.overrides)
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    model_class: Any = family.model
    return LoadedModel(
        name=f"{config.family}:{config.size}" + (" (changed)" if config.overrides else ""),
        model=auto_shard(model_class)(sizes, rngs=nnx.Rngs(0)),
        loss_fn=family.loss_fn,
        example_batch=family.example_batch(sizes, batch_size),
        random_batch=lambda seed: family.random_batch(sizes, batch_size, seed=seed),
        vocabulary=getattr(sizes, "vocab_size", None),
    )


def _of_factory(factory: str, batch_size: int) -> LoadedModel:
    made = _find(factory)(batch_size)
    if not isinstance(made, tuple) or len(made) != 3:
        raise InputError(f"{factory} returned a {type(made).__name__}; it must return (model, loss_fn, example_batch).")
    model, loss_fn, example_batch = made
    return LoadedModel(
        name=factory,
        model=model,
        loss_fn=loss_fn,
        example_batch=example_batch,
        random_batch=lambda seed: _random_like(example_batch, seed),
        vocabulary=None,
    )


def _find(factory: str) -> Callable[[int], Any]:
    module_name, _, name = factory.partition(":")
    # As `python -m` does: modules of the folder the command runs in are found.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        hint = did_you_mean(module_name, registry.families())
        raise InputError(
            f"{factory!r} is neither family:size of the zoo nor module:function: {module_name!r} is no family, and no "
            f"module of that name is here or installed.{hint}"
        ) from error
    if not callable(getattr(module, name, None)):
        known = [other for other in vars(module) if callable(getattr(module, other)) and not other.startswith("_")]
        raise InputError(f"Module {module_name!r} has no function {name!r}.{did_you_mean(name, known)}")
    return getattr(module, name)


def _random_like(example_batch: Any, seed: int) -> Any:
    """Random values in the shapes of a batch; 0 or 1 for integers, which every model's tables hold."""
    generator = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        if np.issubdtype(leaf.dtype, np.integer):
            return generator.integers(2, size=leaf.shape).astype(leaf.dtype)
        return generator.standard_normal(leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, example_batch)
