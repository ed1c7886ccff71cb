"""A Mamba (Gu & Dao, 2023): selective state space by ``associative_scan``, gated, behind a causal depthwise filter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .batches import VOCAB, next_token_batch
from .case import ModelCase


class ShiftFilter(nnx.Module):
    """Causal filter of each channel, as a sum of shifted copies."""

    def __init__(self, channels: int, taps: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(0.5)(rngs.params(), (taps, channels)))

    def __call__(self, x):
        taps, length = self.kernel.shape[0], x.shape[1]
        padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
        return sum(padded[:, tap : tap + length] * self.kernel[tap] for tap in range(taps))


class MambaBlock(nnx.Module):
    def __init__(self, width: int, inner: int, states: int, rank: int, *, depthwise: bool, rngs: nnx.Rngs):
        self.states, self.rank = states, rank
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.in_proj = nnx.Linear(width, 2 * inner, use_bias=False, rngs=rngs)
        if depthwise:
            self.filter = nnx.Conv(inner, inner, (4,), padding="CAUSAL", feature_group_count=inner, rngs=rngs)
        else:
            self.filter = ShiftFilter(inner, 4, rngs=rngs)
        self.x_proj = nnx.Linear(inner, rank + 2 * states, use_bias=False, rngs=rngs)
        self.dt_proj = nnx.Linear(rank, inner, rngs=rngs)
        decay = jnp.broadcast_to(jnp.arange(1, states + 1, dtype=jnp.float32), (inner, states))
        self.log_decay = nnx.Param(jnp.log(decay))
        self.skip = nnx.Param(jnp.ones((inner,)))
        self.out_proj = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        hidden, gate = jnp.split(self.in_proj(self.norm(x)), 2, axis=-1)
        hidden = nnx.silu(self.filter(hidden))
        mixed = self.state_space(hidden) * nnx.silu(gate)
        return x + self.out_proj(mixed)

    def state_space(self, x):
        step, into, out = jnp.split(self.x_proj(x), [self.rank, self.rank + self.states], axis=-1)
        step = nnx.softplus(self.dt_proj(step))  # [batch, seq, inner]
        keep = jnp.exp(-step[..., None] * jnp.exp(self.log_decay[...]))  # [batch, seq, inner, states]
        add = (step * x)[..., None] * into[:, :, None, :]

        def compose(first, second):
            return first[0] * second[0], second[0] * first[1] + second[1]

        _, state = jax.lax.associative_scan(compose, (keep, add), axis=1)
        return jnp.einsum("bsin,bsn->bsi", state, out) + x * self.skip[...]


class Mamba(nnx.Module):
    def __init__(self, width: int = 32, layers: int = 3, *, depthwise: bool, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.blocks = nnx.List(
            [
                MambaBlock(width, inner=2 * width, states=8, rank=4, depthwise=depthwise, rngs=rngs)
                for _ in range(layers)
            ]
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model, batch):
    logits = model(batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def tiny(*, depthwise: bool = False) -> ModelCase:
    return ModelCase(
        name="mamba_depthwise" if depthwise else "mamba",
        flavour="nnx",
        make=lambda: lambda rngs: Mamba(depthwise=depthwise, rngs=rngs),
        loss_fn=loss_fn,
        batch=next_token_batch,
    )
