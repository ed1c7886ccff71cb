"""Vision Transformer (Dosovitskiy et al., 2021): pre-norm encoder over image patches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

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
class ViTConfig:
    """Sizes of a Vision Transformer; the defaults are ViT-B/16 at 224 pixels."""

    image_size: int = 224
    """Height and width of an image in pixels."""
    channels: int = 3
    patch_size: int = 16
    """Height and width of a patch in pixels."""
    num_classes: int = 1000
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    pooling: Literal["token", "mean"] = "token"
    """What the head reads: an extra class token, as in the paper, or the mean over the patches."""
    dropout: float = 0.0
    """Dropped share of embeddings and of the MLP's two outputs."""
    dtype: str = "float32"
    """What activations and products are computed in."""
    param_dtype: str = "float32"
    """What parameters are stored in."""

    def __post_init__(self) -> None:
        check_divides("ViTConfig", "width", self.width, "num_heads", self.num_heads)
        check_divides("ViTConfig", "image_size", self.image_size, "patch_size", self.patch_size)
        if self.pooling not in ("token", "mean"):
            raise ValueError(f"ViTConfig: pooling={self.pooling!r} is neither 'token' nor 'mean'.")

    @property
    def seq_length(self) -> int:
        """Patches, and the class token if there is one."""
        return (self.image_size // self.patch_size) ** 2 + (self.pooling == "token")


def _linear(config: ViTConfig) -> functools.partial[nnx.Linear]:
    init = nnx.initializers.normal(0.02)
    return functools.partial(nnx.Linear, kernel_init=init, dtype=config.dtype, param_dtype=config.param_dtype)


def _norm(config: ViTConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.width, epsilon=1e-6, param_dtype=config.param_dtype, rngs=rngs)


class ViTAttention(nnx.Module):
    """Bidirectional self-attention with one projection for query, key and value."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.qkv = _linear(config)(config.width, 3 * config.width, rngs=rngs)
        self.out = _linear(config)(config.width, config.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, seq, width]`` to the same."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        mixed = attend(query, key, value, scale=query.shape[-1] ** -0.5)
        return self.out(mixed.reshape(x.shape))


class ViTMLP(nnx.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.up = _linear(config)(config.width, config.mlp_width, rngs=rngs)
        self.down = _linear(config)(config.mlp_width, config.width, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Array) -> Array:
        """``Float[batch, seq, width]`` to the same."""
        x = self._drop(jax.nn.gelu(self.up(x), approximate=False))
        return self._drop(self.down(x))

    def _drop(self, x: Array) -> Array:
        return x if self.dropout is None else self.dropout(x)


class ViTBlock(nnx.Module):
    """Attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = ViTAttention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = ViTMLP(config, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, seq, width]`` to the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ViTEmbedding(nnx.Module):
    """Patches by a strided convolution, a class token in front if asked for, learned positions."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        self.patches = nnx.Conv(
            config.channels,
            config.width,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        normal = nnx.initializers.normal(0.02)
        shape = (1, config.seq_length, config.width)
        self.positions = nnx.Param(normal(rngs.params(), shape, config.param_dtype))
        if config.pooling == "token":
            self.class_token = nnx.Param(normal(rngs.params(), (1, 1, config.width), config.param_dtype))
        else:
            self.class_token = None
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, images: Array) -> Array:
        """``Float[batch, height, width, channels]`` to ``Float[batch, seq, width]``."""
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.positions[...].astype(x.dtype)
        return x if self.dropout is None else self.dropout(x)


class ViT(nnx.Module):
    """A Vision Transformer classifier.

    Example:
        >>> model = ViT(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 16, 16, 3))).shape
        (2, 128)
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.pooling = config.pooling
        self.embedding = ViTEmbedding(config, rngs=rngs)
        self.blocks = nnx.List([ViTBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        self.head = _linear(config)(config.width, config.num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Logits of the class.

        Args:
            images: ``Float[batch, height, width, channels]``.

        Returns:
            ``Float[batch, classes]`` in the compute dtype.
        """
        x = self.embedding(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.pooling == "token" else x.mean(axis=1))


def loss_fn(model: ViT, batch: dict[str, Array]) -> Array:
    """Mean cross-entropy; ``images`` is ``Float[batch, height, width, channels]``, ``labels`` ``Int[batch]``."""
    return cross_entropy(model(batch["images"]), batch["labels"]).mean()


def example_batch(config: ViTConfig, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    shape = (batch_size, config.image_size, config.image_size, config.channels)
    return {
        "images": jax.ShapeDtypeStruct(shape, jnp.float32),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def random_batch(config: ViTConfig, batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Images of normal noise with random labels."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, config.image_size, config.image_size, config.channels)
    return {
        "images": rng.standard_normal(shape, dtype=np.float32),
        "labels": rng.integers(config.num_classes, size=batch_size, dtype=np.int32),
    }


def _preset(num_layers: int, width: int, num_heads: int, **other: Any) -> ViTConfig:
    return ViTConfig(num_layers=num_layers, width=width, num_heads=num_heads, mlp_width=4 * width, **other)


# Published sizes: Dosovitskiy et al. (2021), table 1; the huge ones, with patches of 16 pixels, are Galvatron's
# (Miao et al., VLDB 2023, table 1).
PRESETS = {
    "tiny": _preset(4, 64, 8, num_classes=128, image_size=16, patch_size=4),
    "base": _preset(12, 768, 12),  # 86 M
    "large": _preset(24, 1024, 16),  # 307 M
    "huge-32": _preset(32, 1280, 16),  # 632 M
    "huge-48": _preset(48, 1280, 16),  # 947 M
}
