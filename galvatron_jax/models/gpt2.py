"""GPT-2 (Radford et al., 2019): pre-norm decoder, fused QKV, learned positions, tied or untied head, dropout."""

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
from .checks import check_divides
from .losses import cross_entropy
from .norms import LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Sizes of a GPT-2; the defaults are GPT-2 small."""

    vocab_size: int = 50257
    seq_length: int = 1024
    """Longest sequence: the number of learned positions, and the length of the example batch."""
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.0
    """Dropped share of embeddings, attention weights and residual branches (0.1 in the paper)."""
    tie_embeddings: bool = True
    """Whether the head is the transposed token embedding."""
    dtype: str = "float32"
    """What activations and products are computed in."""
    param_dtype: str = "float32"
    """What parameters are stored in."""

    def __post_init__(self) -> None:
        check_divides("GPT2Config", "width", self.width, "num_heads", self.num_heads)


def _linear(config: GPT2Config, *, depth_scaled: bool = False) -> functools.partial[nnx.Linear]:
    # Layers that write to the residual stream start smaller, by the number of such layers (GPT-2 paper, 2.3).
    std = 0.02 / math.sqrt(2 * config.num_layers) if depth_scaled else 0.02
    init = nnx.initializers.normal(std)
    return functools.partial(nnx.Linear, kernel_init=init, dtype=config.dtype, param_dtype=config.param_dtype)


def _norm(config: GPT2Config, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.width, epsilon=1e-5, param_dtype=config.param_dtype, rngs=rngs)


class GPT2Attention(nnx.Module):
    """Causal self-attention with one projection for query, key and value."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.qkv = _linear(config)(config.width, 3 * config.width, rngs=rngs)
        self.out = _linear(config, depth_scaled=True)(config.width, config.width, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Array) -> Array:
        """``Float[batch, seq, width]`` to the same."""
        batch, length, width = x.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        mixed = attend(query, key, value, scale=heads[-1] ** -0.5, mask=causal_mask(length), dropout=self.dropout)
        return self.out(mixed.reshape(x.shape))


class GPT2MLP(nnx.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.up = _linear(config)(config.width, config.mlp_width, rngs=rngs)
        self.down = _linear(config, depth_scaled=True)(config.mlp_width, config.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, seq, width]`` to the same."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class GPT2Block(nnx.Module):
    """Attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = GPT2Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = GPT2MLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Array) -> Array:
        """``Float[batch, seq, width]`` to the same."""
        x = x + self._drop(self.attention(self.attention_norm(x)))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: Array) -> Array:
        return x if self.dropout is None else self.dropout(x)


class GPT2(nnx.Module):
    """A GPT-2 language model.

    Example:
        >>> model = GPT2(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 32), jnp.int32)).shape
        (2, 32, 128)
    """

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.config = config
        embed = functools.partial(nnx.Embed, dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        init = nnx.initializers.normal
        self.token_embedding = embed(config.vocab_size, config.width, embedding_init=init(0.02))
        self.position_embedding = embed(config.seq_length, config.width, embedding_init=init(0.01))
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.blocks = nnx.List([GPT2Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        if not config.tie_embeddings:
            self.head = _linear(config)(config.width, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Logits of the next token.

        Args:
            tokens: ``Int[batch, seq]``, ``seq <= config.seq_length``.

        Returns:
            ``Float[batch, seq, vocab]`` in the compute dtype.
        """
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(tokens.shape[1]))
        if self.dropout is not None:
            x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.token_embedding.attend(x) if self.config.tie_embeddings else self.head(x)


def loss_fn(model: GPT2, batch: dict[str, Array]) -> Array:
    """Mean cross-entropy of each next token; ``batch["tokens"]`` is ``Int[batch, seq + 1]``."""
    tokens = batch["tokens"]
    return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def example_batch(config: GPT2Config, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    return {"tokens": jax.ShapeDtypeStruct((batch_size, config.seq_length + 1), jnp.int32)}


def random_batch(config: GPT2Config, batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of random tokens."""
    shape = (batch_size, config.seq_length + 1)
    return {"tokens": np.random.default_rng(seed).integers(config.vocab_size, size=shape, dtype=np.int32)}


def _preset(num_layers: int, width: int, num_heads: int, **other: Any) -> GPT2Config:
    return GPT2Config(num_layers=num_layers, width=width, num_heads=num_heads, mlp_width=4 * width, **other)


# Published sizes: Radford et al. (2019), table 2, with the released checkpoints' parameter counts.
PRESETS = {
    "tiny": _preset(4, 64, 8, vocab_size=128, seq_length=32),
    "small": _preset(12, 768, 12),  # 124 M
    "medium": _preset(24, 1024, 16),  # 355 M
    "large": _preset(36, 1280, 20),  # 774 M
    "xl": _preset(48, 1600, 25),  # 1558 M
}
