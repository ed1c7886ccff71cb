"""Mixture of experts in every block of a Llama-like decoder (Mixtral; Jiang et al., 2024), dispatched by einsum.

Tokens go to their experts through one-hot products with a fixed capacity, as in GShard (Lepikhin et al., 2021) and the
Switch Transformer (Fedus et al., 2022): all shapes are static, what exceeds an expert's capacity is passed over.
"""

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

from .attention import rotary_table
from .llama import LlamaAttention, LlamaConfig
from .losses import cross_entropy
from .norms import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(LlamaConfig):
    """Sizes of a mixture of experts, on top of those of :class:`~galvatron_jax.models.llama.LlamaConfig`."""

    num_experts: int = 8
    experts_per_token: int = 2
    capacity_factor: float = 1.25
    """Slots of an expert, as a multiple of what an even spread of tokens would need."""
    balance_weight: float = 0.01
    """Share of the load-balancing loss in the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"MoEConfig: experts_per_token={self.experts_per_token} must be between 1 and "
                f"num_experts={self.num_experts}."
            )

    def capacity(self, length: int) -> int:
        """Slots of each expert for the tokens of one sequence."""
        return max(1, math.ceil(self.capacity_factor * length * self.experts_per_token / self.num_experts))


def _norm(config: MoEConfig, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(config.width, epsilon=config.norm_epsilon, param_dtype=config.param_dtype, rngs=rngs)


def route(probabilities: Array, *, experts_per_token: int, capacity: int) -> tuple[Array, Array]:
    """Gives each token a slot at its likeliest experts, first choices before second ones.

    Args:
        probabilities: ``Float32[batch, seq, experts]``, each token's distribution over experts.
        experts_per_token: how many experts a token goes to.
        capacity: slots of an expert for one sequence.

    Returns:
        The combine weights, ``Float32[batch, seq, experts, capacity]``: at a token's slots its normalised gates, zero
        elsewhere; and the load-balancing loss of each sequence, ``Float32[batch]``: experts times the sum over experts
        of (share of choices) x (mean probability), 1 when even (Fedus et al., equation 4).
    """
    num_experts = probabilities.shape[-1]
    gates, choices = jax.lax.top_k(probabilities, experts_per_token)
    gates = gates / gates.sum(axis=-1, keepdims=True)
    combine = jnp.zeros((*probabilities.shape, capacity), jnp.float32)
    taken = jnp.zeros_like(probabilities[:, :1])
    for rank in range(experts_per_token):
        chosen = jax.nn.one_hot(choices[..., rank], num_experts, dtype=jnp.float32)
        before = jnp.cumsum(chosen, axis=1) - chosen + taken
        # A slot beyond the capacity has no one-hot code, which drops the token.
        slot = jax.nn.one_hot((before * chosen).sum(axis=-1).astype(jnp.int32), capacity, dtype=jnp.float32)
        gated = gates[..., rank, None] * chosen
        combine = combine + gated[..., None] * slot[:, :, None, :]
        taken = taken + chosen.sum(axis=1, keepdims=True)
    share = taken[:, 0] / (probabilities.shape[1] * experts_per_token)
    return combine, num_experts * (share * probabilities.mean(axis=1)).sum(axis=-1)


class Experts(nnx.Module):
    """A SwiGLU for each expert, the weights stacked along the first dim."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        wide = (config.num_experts, config.width, config.mlp_width)
        narrow = (config.num_experts, config.mlp_width, config.width)
        self.gate = nnx.Param(normal(rngs.params(), wide, config.param_dtype))
        self.up = nnx.Param(normal(rngs.params(), wide, config.param_dtype))
        self.down = nnx.Param(normal(rngs.params(), narrow, config.param_dtype))

    def __call__(self, x: Array) -> Array:
        """``Float[batch, experts, capacity, width]`` to the same."""
        gate = jnp.einsum("becd,edf->becf", x, self.gate[...].astype(x.dtype))
        up = jnp.einsum("becd,edf->becf", x, self.up[...].astype(x.dtype))
        return jnp.einsum("becf,efd->becd", jax.nn.silu(gate) * up, self.down[...].astype(x.dtype))


class MoELayer(nnx.Module):
    """Router and experts in place of the MLP."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.router = nnx.Linear(
            config.width,
            config.num_experts,
            use_bias=False,
            kernel_init=nnx.initializers.normal(0.02),
            dtype=jnp.float32,  # routing in low precision is unstable (Fedus et al., 2.4)
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.experts = Experts(config, rngs=rngs)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """``Float[batch, seq, width]`` to the same, and the load-balancing loss ``Float32[batch]``."""
        config = self.config
        combine, balance = route(
            jax.nn.softmax(self.router(x), axis=-1),
            experts_per_token=config.experts_per_token,
            capacity=config.capacity(x.shape[1]),
        )
        dispatch = (combine > 0).astype(x.dtype)
        expert_out = self.experts(jnp.einsum("bsec,bsd->becd", dispatch, x))
        return jnp.einsum("bsec,becd->bsd", combine.astype(x.dtype), expert_out), balance


class MoEBlock(nnx.Module):
    """Attention and experts, each behind a norm, each added to the residual stream."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = LlamaAttention(config, rngs=rngs)
        self.moe_norm = _norm(config, rngs)
        self.moe = MoELayer(config, rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
        """``Float[batch, seq, width]`` to the same, and the load-balancing loss ``Float32[batch]``."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        mixed, balance = self.moe(self.moe_norm(x))
        return x + mixed, balance


class MoE(nnx.Module):
    """A mixture-of-experts language model.

    Example:
        >>> model = MoE(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> logits, balance = model(jnp.zeros((2, 32), jnp.int32))
        >>> logits.shape, balance.shape
        ((2, 32, 128), (2,))
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        embed = functools.partial(nnx.Embed, embedding_init=init, rngs=rngs, **dtypes)
        self.token_embedding = embed(config.vocab_size, config.width)
        self.blocks = nnx.List([MoEBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        if config.tie_embeddings:
            self.head = None
        else:
            linear = functools.partial(nnx.Linear, use_bias=False, kernel_init=init, rngs=rngs, **dtypes)
            self.head = linear(config.width, config.vocab_size)

    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        """Logits of the next token, and how unevenly the experts were used.

        Args:
            tokens: ``Int[batch, seq]``.

        Returns:
            ``Float[batch, seq, vocab]`` in the compute dtype, and the load-balancing loss of each sequence, averaged
            over the layers, ``Float32[batch]``.
        """
        config = self.config
        cos, sin = rotary_table(tokens.shape[1], config.width // config.num_heads, theta=config.rope_theta)
        x = self.token_embedding(tokens)
        balances = []
        for block in self.blocks:
            x, balance = block(x, cos, sin)
            balances.append(balance)
        x = self.norm(x)
        logits = self.token_embedding.attend(x) if self.head is None else self.head(x)
        return logits, jnp.stack(balances).mean(axis=0)


def loss_fn(model: MoE, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of each next token plus the weighted load-balancing loss, and both of them apart.

    Args:
        model: the mixture of experts.
        batch: ``tokens``, ``Int[batch, seq + 1]``.
    """
    tokens = batch["tokens"]
    logits, balance = model(tokens[:, :-1])
    cross = cross_entropy(logits, tokens[:, 1:]).mean()
    balance = balance.mean()
    return cross + model.config.balance_weight * balance, {"cross_entropy": cross, "load_balance": balance}


def example_batch(config: MoEConfig, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    return {"tokens": jax.ShapeDtypeStruct((batch_size, config.seq_length + 1), jnp.int32)}


def random_batch(config: MoEConfig, batch_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of random tokens."""
    shape = (batch_size, config.seq_length + 1)
    return {"tokens": np.random.default_rng(seed).integers(config.vocab_size, size=shape, dtype=np.int32)}


def _preset(num_layers: int, width: int, heads: int, kv_heads: int, mlp_width: int, **other: Any) -> MoEConfig:
    return MoEConfig(
        num_layers=num_layers, width=width, num_heads=heads, num_kv_heads=kv_heads, mlp_width=mlp_width, **other
    )


_MIXTRAL: dict[str, Any] = {"rope_theta": 1_000_000.0}

# Published sizes: Mixtral (Jiang et al., 2024, table 1) and the released configuration of the larger one. "small" is a
# GPT-2-sized one of ours.
PRESETS = {
    "tiny": _preset(2, 64, 8, 2, 64, vocab_size=128, seq_length=32, capacity_factor=1.5),
    "small": _preset(12, 768, 12, 4, 2048, seq_length=1024),  # 521 M
    "mixtral-8x7b": _preset(32, 4096, 32, 8, 14336, **_MIXTRAL),  # 46.7 B
    "mixtral-8x22b": _preset(56, 6144, 48, 8, 16384, vocab_size=32768, **_MIXTRAL),  # 141 B
}
