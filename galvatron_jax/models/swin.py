"""Swin Transformer (Liu et al., 2021): four stages of attention in windows, shifted in every second block."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from .attention import softmax_float32
from .checks import check_divides
from .losses import cross_entropy
from .norms import LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Sizes of a Swin Transformer; the defaults are Swin-T at 224 pixels."""

    image_size: int = 224
    """Height and width of an image in pixels."""
    channels: int = 3
    patch_size: int = 4
    """Height and width of a patch in pixels."""
    window_size: int = 7
    """Height and width of a window in patches; a stage smaller than it has one window, never shifted."""
    num_classes: int = 1000
    width: int = 96
    """Width of the first stage; every later one has twice the width and half the resolution."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks of each stage, an even number: regular and shifted windows alternate."""
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    """Heads of each stage."""
    mlp_ratio: int = 4
    dtype: str = "float32"
    """What activations and products are computed in."""
    param_dtype: str = "float32"
    """What parameters are stored in."""

    def __post_init__(self) -> None:
        owner = "SwinConfig"
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"{owner}: depths={self.depths}, num_heads={self.num_heads} need one entry a stage each.")
        check_divides(owner, "image_size", self.image_size, "patch_size", self.patch_size)
        for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            if depth < 2 or depth % 2:
                raise ValueError(f"{owner}: depths[{stage}]={depth} must be 2, 4, ...: blocks come in pairs.")
            check_divides(owner, f"width_of({stage})", self.width_of(stage), f"num_heads[{stage}]", heads)
            resolution, window = self.resolution_of(stage), self.window_of(stage)
            check_divides(owner, f"resolution_of({stage})", resolution, "window_size", window)

    def width_of(self, stage: int) -> int:
        """Width of a stage's residual stream."""
        return self.width * 2**stage

    def resolution_of(self, stage: int) -> int:
        """Height and width of a stage in patches."""
        return self.image_size // self.patch_size // 2**stage

    def window_of(self, stage: int) -> int:
        """Height and width of a stage's windows in patches."""
        return min(self.window_size, self.resolution_of(stage))


def _linear(config: SwinConfig, *, use_bias: bool = True) -> functools.partial[nnx.Linear]:
    return functools.partial(
        nnx.Linear,
        use_bias=use_bias,
        kernel_init=nnx.initializers.normal(0.02),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
    )


def _norm(config: SwinConfig, width: int, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(width, epsilon=1e-5, param_dtype=config.param_dtype, rngs=rngs)


def to_windows(x: Array, window: int) -> Array:
    """``Float[batch, height, width, channels]`` to ``Float[batch, windows, window², channels]``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, window * window, channels)


def from_windows(x: Array, height: int, width: int) -> Array:
    """Undoes :func:`to_windows`: back to ``Float[batch, height, width, channels]``."""
    batch, _, area, channels = x.shape
    window = round(area**0.5)
    x = x.reshape(batch, height // window, width // window, window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


def relative_index(window: int) -> Array:
    """``Int[window², window²]``: for each pair of positions, the row of the bias table for their distance."""
    rows, columns = jnp.divmod(jnp.arange(window * window), window)
    down = rows[:, None] - rows[None, :] + window - 1
    right = columns[:, None] - columns[None, :] + window - 1
    return down * (2 * window - 1) + right


def shift_mask(resolution: int, window: int, shift: int) -> Array:
    """``Bool[windows, window², window²]``: which pairs of a shifted window were neighbours before the cyclic shift."""
    places = jnp.arange(resolution)
    # The last row of windows holds two regions: its own patches, and those that the shift brought from the other side.
    band = (places >= resolution - window).astype(jnp.int32) + (places >= resolution - shift).astype(jnp.int32)
    region = (3 * band[:, None] + band[None, :])[None, :, :, None]
    region = to_windows(region, window)[0, :, :, 0]
    return region[:, :, None] == region[:, None, :]


class WindowAttention(nnx.Module):
    """Attention within each window, biased by relative position."""

    def __init__(self, config: SwinConfig, stage: int, *, rngs: nnx.Rngs):
        width, window = config.width_of(stage), config.window_of(stage)
        self.num_heads = config.num_heads[stage]
        self.window = window
        self.qkv = _linear(config)(width, 3 * width, rngs=rngs)
        self.out = _linear(config)(width, width, rngs=rngs)
        table = ((2 * window - 1) ** 2, self.num_heads)
        self.bias_table = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), table, config.param_dtype))

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """``Float[batch, windows, window², width]`` to the same; the mask as :func:`shift_mask` makes it."""
        batch, windows, area, width = x.shape
        qkv = self.qkv(x).reshape(batch, windows, area, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
        bias = jnp.take(self.bias_table[...], relative_index(self.window), axis=0).transpose(2, 0, 1)
        scores = jnp.einsum("bwqhd,bwkhd->bwhqk", query * query.shape[-1] ** -0.5, key)
        weights = softmax_float32(scores, bias=bias, mask=None if mask is None else mask[:, None])
        return self.out(jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value).reshape(x.shape))


class SwinMLP(nnx.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: SwinConfig, stage: int, *, rngs: nnx.Rngs):
        width = config.width_of(stage)
        self.up = _linear(config)(width, config.mlp_ratio * width, rngs=rngs)
        self.down = _linear(config)(config.mlp_ratio * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, height, width, channels]`` to the same."""
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class SwinBlock(nnx.Module):
    """Window attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(self, config: SwinConfig, stage: int, *, shifted: bool, rngs: nnx.Rngs):
        width, resolution = config.width_of(stage), config.resolution_of(stage)
        self.window = config.window_of(stage)
        self.shift = self.window // 2 if shifted and self.window < resolution else 0
        self.attention_norm = _norm(config, width, rngs)
        self.attention = WindowAttention(config, stage, rngs=rngs)
        self.mlp_norm = _norm(config, width, rngs)
        self.mlp = SwinMLP(config, stage, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, height, width, channels]`` to the same."""
        x = x + self._attend(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def _attend(self, x: Array) -> Array:
        _, height, width, _ = x.shape
        mask = None
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
            mask = shift_mask(height, self.window, self.shift)
        x = from_windows(self.attention(to_windows(x, self.window), mask), height, width)
        return jnp.roll(x, (self.shift, self.shift), axis=(1, 2)) if self.shift else x


class SwinBlockPair(nnx.Module):
    """Two successive blocks (figure 3b of the paper): regular windows, then shifted ones.

    A stage repeats this pair, so all its elements do the same.
    """

    def __init__(self, config: SwinConfig, stage: int, *, rngs: nnx.Rngs):
        self.regular = SwinBlock(config, stage, shifted=False, rngs=rngs)
        self.shifted = SwinBlock(config, stage, shifted=True, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, height, width, channels]`` to the same."""
        return self.shifted(self.regular(x))


class PatchMerging(nnx.Module):
    """Joins each square of 2 x 2 patches into one of twice the width."""

    def __init__(self, config: SwinConfig, stage: int, *, rngs: nnx.Rngs):
        width = config.width_of(stage)
        self.norm = _norm(config, 4 * width, rngs)
        self.reduce = _linear(config, use_bias=False)(4 * width, 2 * width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, height, width, channels]`` to ``Float[batch, height / 2, width / 2, 2 channels]``."""
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        return self.reduce(self.norm(x.reshape(batch, height // 2, width // 2, 4 * channels)))


class SwinStage(nnx.Module):
    """Blocks of one resolution, then the merging into the next one's."""

    def __init__(self, config: SwinConfig, stage: int, *, rngs: nnx.Rngs):
        pairs = config.depths[stage] // 2
        self.blocks = nnx.List([SwinBlockPair(config, stage, rngs=rngs) for _ in range(pairs)])
        last = stage == len(config.depths) - 1
        self.merging = None if last else PatchMerging(config, stage, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``Float[batch, height, width, channels]`` to the next stage's."""
        for block in self.blocks:
            x = block(x)
        return x if self.merging is None else self.merging(x)


class Swin(nnx.Module):
    """A Swin Transformer classifier.

    Example:
        >>> model = nnx.eval_shape(lambda: Swin(PRESETS["tiny"], rngs=nnx.Rngs(0)))  # shapes only
        >>> nnx.eval_shape(lambda model, images: model(images), model, jnp.zeros((2, 16, 16, 3))).shape
        (2, 128)
    """

    def __init__(self, config: SwinConfig, *, rngs: nnx.Rngs):
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
        self.patch_norm = _norm(config, config.width, rngs)
        self.stages = nnx.List([SwinStage(config, stage, rngs=rngs) for stage in range(len(config.depths))])
        width = config.width_of(len(config.depths) - 1)
        self.norm = _norm(config, width, rngs)
        self.head = _linear(config)(width, config.num_classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Logits of the class.

        Args:
            images: ``Float[batch, height, width, channels]``.

        Returns:
            ``Float[batch, classes]`` in the compute dtype.
        """
        x = self.patch_norm(self.patches(images))
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x).mean(axis=(1, 2)))


def loss_fn(model: Swin, batch: dict[str, Array]) -> Array:
    """Mean cross-entropy; ``images`` is ``Float[batch, height, width, channels]``, ``labels`` ``Int[batch]``."""
    return cross_entropy(model(batch["images"]), batch["labels"]).mean()


def example_batch(config: SwinConfig, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    shape = (batch_size, config.image_size, config.image_size, config.channels)
    return {
        "images": jax.ShapeDtypeStruct(shape, jnp.float32),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def random_batch(config: SwinConfig, batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Images of normal noise with random labels."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, config.image_size, config.image_size, config.channels)
    return {
        "images": rng.standard_normal(shape, dtype=np.float32),
        "labels": rng.integers(config.num_classes, size=batch_size, dtype=np.int32),
    }


def _preset(depth: int, width: int, heads: int, **other: Any) -> SwinConfig:
    num_heads = (heads, 2 * heads, 4 * heads, 8 * heads)
    return SwinConfig(depths=(2, 2, depth, 2), width=width, num_heads=num_heads, **other)


# Published sizes: Liu et al. (2021), section 3.3; the huge ones are Galvatron's (Miao et al., VLDB 2023, table 1).
PRESETS = {
    "tiny": SwinConfig(
        image_size=16,
        patch_size=1,
        window_size=2,
        num_classes=128,
        width=16,
        depths=(2, 2, 4, 2),
        num_heads=(8, 8, 8, 8),
    ),
    "swin-t": _preset(6, 96, 3),  # 28 M
    "base": _preset(18, 128, 4),  # 88 M
    "huge-32": _preset(26, 320, 10),  # 701 M
    "huge-48": _preset(42, 320, 10),  # 1016 M
}
