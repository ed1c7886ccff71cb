"""T5 (Raffel et al., 2020): encoder–decoder, RMSNorm, relative position buckets, optionally gated (version 1.1)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from .attention import attend, causal_mask
from .losses import cross_entropy
from .norms import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes of a T5; the defaults are T5 base."""

    vocab_size: int = 32128
    encoder_length: int = 512
    """Length of the encoder's example tokens; relative positions set no limit."""
    decoder_length: int = 512
    """Length of the decoder's example tokens."""
    width: int = 768
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    num_heads: int = 12
    head_dim: int = 64
    """Width of a head, which need not be ``width / num_heads``."""
    mlp_width: int = 3072
    gated: bool = False
    """Gated GELU, as version 1.1, rather than ReLU."""
    num_buckets: int = 32
    """Buckets of relative positions."""
    max_distance: int = 128
    """Positions farther apart than this share the last bucket."""
    tie_embeddings: bool = True
    """Whether the head is the transposed token embedding (scaled by ``width ** -0.5``)."""
    dropout: float = 0.0
    """Dropped share of embeddings, attention weights, MLP and residual branches (0.1 in the paper)."""
    dtype: str = "float32"
    """What activations and products are computed in."""
    param_dtype: str = "float32"
    """What parameters are stored in."""


def _linear(config: T5Config, *, std: float) -> functools.partial[nnx.Linear]:
    return functools.partial(
        nnx.Linear,
        use_bias=False,
        kernel_init=nnx.initializers.normal(std),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
    )


def _norm(config: T5Config, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(config.width, epsilon=1e-6, param_dtype=config.param_dtype, rngs=rngs)


def position_bucket(distance: Array, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Array:
    """Buckets of relative positions: exact when near, logarithmic when far (Raffel et al., section 2.1).

    Args:
        distance: ``Int[...]``, key position minus query position.
        bidirectional: whether keys after the query have buckets of their own (the encoder).
        num_buckets: how many buckets there are.
        max_distance: distances from here on share the last bucket.

    Returns:
        ``Int[...]`` in ``0 … num_buckets - 1``.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).astype(distance.dtype)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))


class T5PositionBias(nnx.Module):
    """What every layer of a stack adds to its attention scores, by relative position; computed once."""

    def __init__(self, config: T5Config, *, bidirectional: bool, rngs: nnx.Rngs):
        self.bidirectional = bidirectional
        self.max_distance = config.max_distance
        self.table = nnx.Embed(
            config.num_buckets,
            config.num_heads,
            embedding_init=nnx.initializers.normal(config.width**-0.5),
            dtype=jnp.float32,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )

    def __call__(self, length: int) -> Array:
        """``Float32[1, heads, length, length]``."""
        positions = jnp.arange(length)
        buckets = position_bucket(
            positions[None, :] - positions[:, None],
            bidirectional=self.bidirectional,
            num_buckets=self.table.num_embeddings,
            max_distance=self.max_distance,
        )
        return self.table(buckets).transpose(2, 0, 1)[None]


class T5Attention(nnx.Module):
    """Attention without scaling (the initialisation takes its place), to itself or to the encoded input."""

    def __init__(self, config: T5Config, *, causal: bool, rngs: nnx.Rngs):
        self.causal = causal
        self.head_dim = config.head_dim
        inner = config.num_heads * config.head_dim
        self.query = _linear(config, std=(config.width * config.head_dim) ** -0.5)(config.width, inner, rngs=rngs)
        self.key = _linear(config, std=config.width**-0.5)(config.width, inner, rngs=rngs)
        self.value = _linear(config, std=config.width**-0.5)(config.width, inner, rngs=rngs)
        self.out = _linear(config, std=inner**-0.5)(inner, config.width, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Array, source: Array, bias: Array | None = None) -> Array:
        """Mixes values of the source into each position of ``x``.

        Args:
            x: ``Float[batch, queries, width]``.
            source: ``Float[batch, keys, width]``; ``x`` itself for self-attention.
            bias: ``Float32[1, heads, queries, keys]``.

        Returns:
            ``Float[batch, queries, width]``.
        """
        batch, length, _ = x.shape
        query = self.query(x).reshape(batch, length, -1, self.head_dim)
        key = self.key(source).reshape(batch, source.shape[1], -1, self.head_dim)
        value = self.value(source).reshape(batch, source.shape[1], -1, self.head_dim)
        mask = causal_mask(length) if self.causal else None
        mixed = attend(query, key, value, scale=1.0, mask=mask, bias=bias, dropout=self.dropout)
        return self.out(mixed.reshape(batch, length, -1))


class T5MLP(nnx.Module):
    """ReLU, or GELU gated by a second projection."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        up = _linear(config, std=config.width**-0.5)
        self.up = up(config.width, config.mlp_width, rngs=rngs)
        self.gate = up(config.width, config.mlp_width, rngs=rngs) if config.gated else None
        self.down = _linear(config, std=config.mlp_width**-0.5)(config.mlp_width, config.width, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Array) -> Array:
        """``Float[batch, seq, width]`` to the same."""
        if self.gate is None:
            hidden = jax.nn.relu(self.up(x))
        else:
            hidden = jax.nn.gelu(self.gate(x), approximate=True) * self.up(x)
        return self.down(hidden if self.dropout is None else self.dropout(hidden))


class T5EncoderBlock(nnx.Module):
    """Self-attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = T5Attention(config, causal=False, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = T5MLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Array, bias: Array) -> Array:
        """``Float[batch, seq, width]`` to the same; the bias is ``Float32[1, heads, seq, seq]``."""
        normed = self.attention_norm(x)
        x = x + self._drop(self.attention(normed, normed, bias))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: Array) -> Array:
        return x if self.dropout is None else self.dropout(x)


class T5DecoderBlock(nnx.Module):
    """Causal self-attention, attention to the encoded input, and MLP."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = T5Attention(config, causal=True, rngs=rngs)
        self.cross_norm = _norm(config, rngs)
        self.cross_attention = T5Attention(config, causal=False, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = T5MLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Array, encoded: Array, bias: Array) -> Array:
        """One layer of the decoder.

        Args:
            x: ``Float[batch, seq, width]``.
            encoded: ``Float[batch, encoder_seq, width]``.
            bias: ``Float32[1, heads, seq, seq]``.

        Returns:
            ``Float[batch, seq, width]``.
        """
        normed = self.attention_norm(x)
        x = x + self._drop(self.attention(normed, normed, bias))
        x = x + self._drop(self.cross_attention(self.cross_norm(x), encoded))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: Array) -> Array:
        return x if self.dropout is None else self.dropout(x)


class T5Encoder(nnx.Module):
    """The stack that reads the input."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.bias = T5PositionBias(config, bidirectional=True, rngs=rngs)
        self.blocks = nnx.List([T5EncoderBlock(config, rngs=rngs) for _ in range(config.num_encoder_layers)])
        self.norm = _norm(config, rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, encoder_seq, width]`` to the same."""
        bias = self.bias(x.shape[1])
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


class T5Decoder(nnx.Module):
    """The stack that writes the output."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.bias = T5PositionBias(config, bidirectional=False, rngs=rngs)
        self.blocks = nnx.List([T5DecoderBlock(config, rngs=rngs) for _ in range(config.num_decoder_layers)])
        self.norm = _norm(config, rngs)

    def __call__(self, x: Array, encoded: Array) -> Array:
        """``Float[batch, seq, width]`` to the same; ``encoded`` is ``Float[batch, encoder_seq, width]``."""
        bias = self.bias(x.shape[1])
        for block in self.blocks:
            x = block(x, encoded, bias)
        return self.norm(x)


class T5(nnx.Module):
    """A T5.

    Example:
        >>> model = T5(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> tokens = jnp.zeros((2, 32), jnp.int32)
        >>> model(tokens, tokens).shape
        (2, 32, 128)
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.width = config.width
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.encoder = T5Encoder(config, rngs=rngs)
        self.decoder = T5Decoder(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None
        if config.tie_embeddings:
            self.head = None
        else:
            self.head = _linear(config, std=config.width**-0.5)(config.width, config.vocab_size, rngs=rngs)

    def __call__(self, encoder_tokens: Array, decoder_tokens: Array) -> Array:
        """Logits of the decoder's next token.

        Args:
            encoder_tokens: ``Int[batch, encoder_seq]``.
            decoder_tokens: ``Int[batch, decoder_seq]``, the targets shifted right.

        Returns:
            ``Float[batch, decoder_seq, vocab]`` in the compute dtype.
        """
        encoded = self._drop(self.encoder(self._drop(self.token_embedding(encoder_tokens))))
        x = self._drop(self.decoder(self._drop(self.token_embedding(decoder_tokens)), encoded))
        return self.token_embedding.attend(x * self.width**-0.5) if self.head is None else self.head(x)

    def _drop(self, x: Array) -> Array:
        return x if self.dropout is None else self.dropout(x)


def loss_fn(model: T5, batch: dict[str, Array]) -> Array:
    """Mean cross-entropy of each target.

    Args:
        model: the T5.
        batch: ``encoder_tokens``, ``Int[batch, encoder_seq]``; ``decoder_tokens`` and ``targets``,
            ``Int[batch, decoder_seq]``.
    """
    logits = model(batch["encoder_tokens"], batch["decoder_tokens"])
    return cross_entropy(logits, batch["targets"]).mean()


def example_batch(config: T5Config, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    decoder = jax.ShapeDtypeStruct((batch_size, config.decoder_length), jnp.int32)
    encoder = jax.ShapeDtypeStruct((batch_size, config.encoder_length), jnp.int32)
    return {"encoder_tokens": encoder, "decoder_tokens": decoder, "targets": decoder}


def random_batch(config: T5Config, batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens; the decoder's inputs are its targets, shifted right behind a zero."""
    rng = np.random.default_rng(seed)
    source = rng.integers(config.vocab_size, size=(batch_size, config.encoder_length), dtype=np.int32)
    targets = rng.integers(config.vocab_size, size=(batch_size, config.decoder_length), dtype=np.int32)
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {"encoder_tokens": source, "decoder_tokens": shifted, "targets": targets}


def _preset(layers: int, width: int, heads: int, mlp_width: int, **other: Any) -> T5Config:
    return T5Config(
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        width=width,
        num_heads=heads,
        mlp_width=mlp_width,
        **other,
    )


# Published sizes: Raffel et al. (2020), section 3.7, and version 1.1's released configuration. The large ones, named by
# the layers of both stacks together, are Galvatron's (Miao et al., VLDB 2023, table 1); large-48 is T5 large.
PRESETS = {
    "tiny": _preset(2, 64, 8, 128, vocab_size=128, encoder_length=32, decoder_length=32, head_dim=8),
    "small": _preset(6, 512, 8, 2048),  # 60.5 M
    "base": _preset(12, 768, 12, 3072),  # 223 M
    "base-v1.1": _preset(12, 768, 12, 2048, gated=True, tie_embeddings=False),  # 248 M
    "large-32": _preset(16, 1024, 16, 4096),  # 502 M
    "large-48": _preset(24, 1024, 16, 4096),  # 738 M
}
