"""Llama (Touvron et al., 2023; Llama team, 2024): RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from .attention import attend_grouped, causal_mask, rotary_table, rotate
from .checks import check_divides
from .losses import cross_entropy
from .norms import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama; the defaults are Llama 2 7B."""

    vocab_size: int = 32000
    seq_length: int = 4096
    """Length of the example batch; rotary positions set no limit."""
    width: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    """Heads of keys and values; fewer than ``num_heads`` is grouped-query attention."""
    mlp_width: int = 11008
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    """Whether the head is the transposed token embedding."""
    dtype: str = "float32"
    """What activations and products are computed in."""
    param_dtype: str = "float32"
    """What parameters are stored in."""

    def __post_init__(self) -> None:
        check_divides("LlamaConfig", "width", self.width, "num_heads", self.num_heads)
        check_divides("LlamaConfig", "num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)


def _linear(config: LlamaConfig) -> functools.partial[nnx.Linear]:
    return functools.partial(
        nnx.Linear,
        use_bias=False,
        kernel_init=nnx.initializers.normal(0.02),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
    )


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(config.width, epsilon=config.norm_epsilon, param_dtype=config.param_dtype, rngs=rngs)


class LlamaAttention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.width // config.num_heads
        kv_width = config.num_kv_heads * self.head_dim
        linear = _linear(config)
        self.query = linear(config.width, config.width, rngs=rngs)
        self.key = linear(config.width, kv_width, rngs=rngs)
        self.value = linear(config.width, kv_width, rngs=rngs)
        self.out = linear(config.width, config.width, rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        """``Float[batch, seq, width]`` to the same; the tables are ``Float32[seq, head_dim / 2]``."""
        batch, length, _ = x.shape
        query = self.query(x).reshape(batch, length, -1, self.head_dim)
        key = self.key(x).reshape(batch, length, -1, self.head_dim)
        value = self.value(x).reshape(batch, length, -1, self.head_dim)
        mixed = attend_grouped(
            rotate(query, cos, sin),
            rotate(key, cos, sin),
            value,
            scale=self.head_dim**-0.5,
            mask=causal_mask(length),
        )
        return self.out(mixed.reshape(x.shape))


class LlamaMLP(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        linear = _linear(config)
        self.gate = linear(config.width, config.mlp_width, rngs=rngs)
        self.up = linear(config.width, config.mlp_width, rngs=rngs)
        self.down = linear(config.mlp_width, config.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, seq, width]`` to the same."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nnx.Module):
    """Attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = LlamaAttention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = LlamaMLP(config, rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        """``Float[batch, seq, width]`` to the same; the tables are ``Float32[seq, head_dim / 2]``."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """A Llama language model.

    Example:
        >>> model = Llama(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 32), jnp.int32)).shape
        (2, 32, 128)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.width,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List([LlamaBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        if not config.tie_embeddings:
            self.head = _linear(config)(config.width, config.vocab_size, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Logits of the next token.

        Args:
            tokens: ``Int[batch, seq]``.

        Returns:
            ``Float[batch, seq, vocab]`` in the compute dtype.
        """
        config = self.config
        cos, sin = rotary_table(tokens.shape[1], config.width // config.num_heads, theta=config.rope_theta)
        x = self.token_embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        return self.token_embedding.attend(x) if config.tie_embeddings else self.head(x)


def loss_fn(model: Llama, batch: dict[str, Array]) -> Array:
    """Mean cross-entropy of each next token; ``batch["tokens"]`` is ``Int[batch, seq + 1]``."""
    tokens = batch["tokens"]
    return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def example_batch(config: LlamaConfig, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    return {"tokens": jax.ShapeDtypeStruct((batch_size, config.seq_length + 1), jnp.int32)}


def random_batch(config: LlamaConfig, batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of random tokens."""
    shape = (batch_size, config.seq_length + 1)
    return {"tokens": np.random.default_rng(seed).integers(config.vocab_size, size=shape, dtype=np.int32)}


def _preset(num_layers: int, width: int, heads: int, kv_heads: int, mlp_width: int, **other: Any) -> LlamaConfig:
    return LlamaConfig(
        num_layers=num_layers, width=width, num_heads=heads, num_kv_heads=kv_heads, mlp_width=mlp_width, **other
    )


_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "seq_length": 8192, "rope_theta": 500_000.0}

# Published sizes: Llama 2 (Touvron et al., 2023, table 1), Llama 3 (Llama team, 2024, table 3) and TinyLlama (Zhang et
# al., 2024), with the released checkpoints' widths.
PRESETS = {
    "tiny": _preset(4, 64, 8, 2, 128, vocab_size=128, seq_length=32),
    "tinyllama-1b": _preset(22, 2048, 32, 4, 5632, seq_length=2048),  # 1.10 B
    "llama2-7b": _preset(32, 4096, 32, 32, 11008),  # 6.74 B
    "llama2-13b": _preset(40, 5120, 40, 40, 13824),  # 13.0 B
    "llama2-70b": _preset(80, 8192, 64, 8, 28672),  # 69.0 B
    "llama3-8b": _preset(32, 4096, 32, 8, 14336, **_LLAMA3),  # 8.03 B
    "llama3-70b": _preset(80, 8192, 64, 8, 28672, **_LLAMA3),  # 70.6 B
}
