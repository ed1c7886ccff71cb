"""BERT (Devlin et al., 2019): post-norm encoder, segment embeddings, masked-language-model head with tied decoder."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from .attention import attend
from .checks import check_divides
from .losses import cross_entropy
from .norms import LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT; the defaults are BERT base."""

    vocab_size: int = 30522
    seq_length: int = 512
    """Longest sequence: the number of learned positions, and the length of the example batch."""
    num_segments: int = 2
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.0
    """Dropped share of embeddings, attention weights and residual branches (0.1 in the paper)."""
    masked_share: float = 0.15
    """Share of positions that ``random_batch`` marks for prediction."""
    dtype: str = "float32"
    """What activations and products are computed in."""
    param_dtype: str = "float32"
    """What parameters are stored in."""

    def __post_init__(self) -> None:
        check_divides("BertConfig", "width", self.width, "num_heads", self.num_heads)


def _linear(config: BertConfig) -> functools.partial[nnx.Linear]:
    init = nnx.initializers.normal(0.02)
    return functools.partial(nnx.Linear, kernel_init=init, dtype=config.dtype, param_dtype=config.param_dtype)


def _norm(config: BertConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.width, epsilon=1e-12, param_dtype=config.param_dtype, rngs=rngs)


class BertAttention(nnx.Module):
    """Bidirectional self-attention with one projection for query, key and value."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.qkv = _linear(config)(config.width, 3 * config.width, rngs=rngs)
        self.out = _linear(config)(config.width, config.width, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """``Float[batch, seq, width]`` to the same; the mask is ``Bool[batch, 1, 1, seq]``, false at padding."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        mixed = attend(query, key, value, scale=query.shape[-1] ** -0.5, mask=mask, dropout=self.dropout)
        return self.out(mixed.reshape(x.shape))


class BertMLP(nnx.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.up = _linear(config)(config.width, config.mlp_width, rngs=rngs)
        self.down = _linear(config)(config.mlp_width, config.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, seq, width]`` to the same."""
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class BertBlock(nnx.Module):
    """Attention and MLP, each added to its input and then normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.attention = BertAttention(config, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.mlp = BertMLP(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """``Float[batch, seq, width]`` to the same; the mask is ``Bool[batch, 1, 1, seq]``, false at padding."""
        x = self.attention_norm(x + self._drop(self.attention(x, mask)))
        return self.mlp_norm(x + self._drop(self.mlp(x)))

    def _drop(self, x: Array) -> Array:
        return x if self.dropout is None else self.dropout(x)


class BertEmbedding(nnx.Module):
    """Token, position and segment embeddings, added and normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        embed = functools.partial(
            nnx.Embed,
            features=config.width,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.token = embed(config.vocab_size)
        self.position = embed(config.seq_length)
        self.segment = embed(config.num_segments)
        self.norm = _norm(config, rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, tokens: Array, segments: Array | None = None) -> Array:
        """``Int[batch, seq]`` to ``Float[batch, seq, width]``; no segments means all zero."""
        segments = jnp.zeros_like(tokens) if segments is None else segments
        x = self.token(tokens) + self.position(jnp.arange(tokens.shape[1])) + self.segment(segments)
        x = self.norm(x)
        return x if self.dropout is None else self.dropout(x)


class BertHead(nnx.Module):
    """What turns an encoded position into something to compare with the token embeddings."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.dense = _linear(config)(config.width, config.width, rngs=rngs)
        self.norm = _norm(config, rngs)
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (config.vocab_size,), config.param_dtype))

    def __call__(self, x: Array, embedding: nnx.Embed) -> Array:
        """``Float[batch, seq, width]`` to logits ``Float[batch, seq, vocab]``."""
        x = self.norm(jax.nn.gelu(self.dense(x), approximate=False))
        return embedding.attend(x) + self.bias[...].astype(x.dtype)


class Bert(nnx.Module):
    """A BERT with its masked-language-model head.

    Example:
        >>> model = Bert(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 32), jnp.int32)).shape
        (2, 32, 128)
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.embedding = BertEmbedding(config, rngs=rngs)
        self.blocks = nnx.List([BertBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.head = BertHead(config, rngs=rngs)

    def __call__(self, tokens: Array, *, segments: Array | None = None, present: Array | None = None) -> Array:
        """Logits of every position's token.

        Args:
            tokens: ``Int[batch, seq]``, ``seq <= config.seq_length``.
            segments: ``Int[batch, seq]``, which sentence a position belongs to; zero when absent.
            present: ``Bool[batch, seq]``, false at padding; all true when absent.

        Returns:
            ``Float[batch, seq, vocab]`` in the compute dtype.
        """
        mask = None if present is None else present[:, None, None, :]
        x = self.embedding(tokens, segments)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x, self.embedding.token)


def loss_fn(model: Bert, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of the masked positions.

    Args:
        model: the BERT.
        batch: ``tokens`` and ``targets``, ``Int[batch, seq]``, and ``mask``, ``Bool[batch, seq]``, true where a
            position is to be predicted. ``segments`` and ``present`` (see :class:`Bert`) may be there too.

    Returns:
        The mean, and ``{"weight": how many positions it is the mean of}``.
    """
    logits = model(batch["tokens"], segments=batch.get("segments"), present=batch.get("present"))
    mask = batch["mask"].astype(jnp.float32)
    weight = mask.sum()
    losses = cross_entropy(logits, batch["targets"])
    return (losses * mask).sum() / jnp.maximum(weight, 1.0), {"weight": weight}


def example_batch(config: BertConfig, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    shape = (batch_size, config.seq_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return {"tokens": tokens, "targets": tokens, "mask": jax.ShapeDtypeStruct(shape, jnp.bool_)}


def random_batch(config: BertConfig, batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens; the marked positions' inputs are token 0."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, config.seq_length)
    targets = rng.integers(config.vocab_size, size=shape, dtype=np.int32)
    mask = rng.random(shape) < config.masked_share
    return {"tokens": np.where(mask, np.int32(0), targets), "targets": targets, "mask": mask}


def _preset(num_layers: int, width: int, num_heads: int, **other: Any) -> BertConfig:
    return BertConfig(num_layers=num_layers, width=width, num_heads=num_heads, mlp_width=4 * width, **other)


# Published sizes: Devlin et al. (2019), section 3; the huge ones are Galvatron's (Miao et al., VLDB 2023, table 1).
PRESETS = {
    "tiny": _preset(4, 64, 8, vocab_size=128, seq_length=32),
    "base": _preset(12, 768, 12),  # 110 M
    "large": _preset(24, 1024, 16),  # 335 M
    "huge-32": _preset(32, 1280, 16),  # 672 M
    "huge-48": _preset(48, 1280, 16),  # 987 M
}
