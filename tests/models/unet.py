"""A U-Net-like denoiser: blocks on the way in hand their outputs across to blocks on the way out (U-ViT, 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .case import ModelCase

SEQ, CHANNELS = 16, 8


class Mixer(nnx.Module):
    """Mixes positions, then channels, each modulated by the time."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.time = nnx.Linear(width, width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x, time):
        heads = (*x.shape[:2], 8, x.shape[2] // 8)
        query, key, value = (part.reshape(heads) for part in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1))
        mixed = jax.nn.dot_product_attention(query, key, value)
        x = x + self.out(mixed.reshape(x.shape))
        hidden = self.norm2(x) * (1.0 + self.time(time)[:, None, :])
        return x + self.down(nnx.silu(self.up(hidden)))


class InBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.mixer = Mixer(width, rngs=rngs)

    def __call__(self, x, time):
        return self.mixer(x, time)


class OutBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.join = nnx.Linear(2 * width, width, rngs=rngs)
        self.mixer = Mixer(width, rngs=rngs)

    def __call__(self, x, skip, time):
        return self.mixer(self.join(jnp.concatenate([x, skip], axis=-1)), time)


class UNet(nnx.Module):
    def __init__(self, width: int = 64, depth: int = 3, *, rngs: nnx.Rngs):
        self.into = nnx.Linear(CHANNELS, width, rngs=rngs)
        self.time = nnx.Linear(16, width, rngs=rngs)
        self.in_blocks = nnx.List([InBlock(width, rngs=rngs) for _ in range(depth)])
        self.middle = Mixer(width, rngs=rngs)
        self.out_blocks = nnx.List([OutBlock(width, rngs=rngs) for _ in range(depth)])
        self.out = nnx.Linear(width, CHANNELS, rngs=rngs)

    def __call__(self, noisy, time):
        angles = time[:, None] * jnp.exp(-jnp.arange(8, dtype=jnp.float32))
        time = nnx.silu(self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)))
        x, skips = self.into(noisy), []
        for block in self.in_blocks:
            x = block(x, time)
            skips.append(x)
        x = self.middle(x, time)
        for block in self.out_blocks:
            x = block(x, skips.pop(), time)
        return self.out(x)


def loss_fn(model, batch):
    return jnp.mean((model(batch["noisy"], batch["time"]) - batch["noise"]) ** 2)


def denoising_batch(batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """``noisy`` and ``noise``, ``Float[batch, seq, channels]``, and ``time``, ``Float[batch]``."""
    rng = np.random.default_rng(seed)
    clean, noise = rng.standard_normal((2, batch_size, SEQ, CHANNELS), dtype=np.float32)
    time = rng.random(batch_size, dtype=np.float32)
    mix = time[:, None, None]
    return {"noisy": (1 - mix) * clean + mix * noise, "time": time, "noise": noise}


def tiny() -> ModelCase:
    return ModelCase(
        name="unet",
        flavour="nnx",
        make=lambda: lambda rngs: UNet(rngs=rngs),
        loss_fn=loss_fn,
        batch=denoising_batch,
    )
