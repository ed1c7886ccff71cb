"""Batches that the hand-written models share."""

from __future__ import annotations

import numpy as np

VOCAB = 128
SEQ = 32


def next_token_batch(batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """``tokens`` and ``targets``, ``Int[batch, seq]``, one shifted against the other."""
    text = np.random.default_rng(seed).integers(VOCAB, size=(batch_size, SEQ + 1), dtype=np.int32)
    return {"tokens": text[:, :-1], "targets": text[:, 1:]}


def image_batch(batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """``images``, ``Float[batch, 16, 16, 3]``, and ``labels``, ``Int[batch]``."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((batch_size, 16, 16, 3), dtype=np.float32)
    return {"images": images, "labels": rng.integers(VOCAB, size=batch_size, dtype=np.int32)}


def vector_batch(batch_size: int, *, seed: int = 0, width: int = 32) -> dict[str, np.ndarray]:
    """``inputs``, ``Float[batch, width]``, and ``targets``, ``Float[batch]``."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((batch_size, width), dtype=np.float32)
    return {"inputs": inputs, "targets": np.sin(inputs.sum(axis=1))}
