"""What every model of the tests gives: how to make it, its loss, its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A small model with its loss and batches, as a user would hand them over.

    Example:
        >>> case = MODELS["gpt2"]  # doctest: +SKIP
        >>> model = case.make()(nnx.Rngs(0))  # doctest: +SKIP
        >>> loss = case.loss_fn(model, case.batch(8))  # doctest: +SKIP
    """

    name: str
    flavour: Literal["nnx", "linen"]
    make: Callable[[], Any]
    """Returns ``build(rngs) -> nnx.Module`` for NNX, the unbound module for Linen."""
    loss_fn: Callable[[Any, Any], Any]
    """``(model, batch) -> loss`` or ``(loss, aux)``; a Linen model arrives bound to its parameters."""
    batch: Callable[..., dict[str, np.ndarray]]
    """``(batch_size, *, seed=0) -> arrays``, batch dim first."""
    init_key: str = "tokens"
    """Which leaf of the batch a Linen model is initialised with."""
