"""A GPT-2 train step as an expert writes it with `jax.jit` and `NamedSharding`: the yardstick of `step_overhead.py`.

The maths is that of the zoo's GPT-2 (untied head, no dropout). Layers are stacked and scanned, the state is donated,
and XLA's partitioner (GSPMD) places the collectives from the shardings of parameters, batch and activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax.models.gpt2 import GPT2Config

P = PartitionSpec


@dataclass(frozen=True)
class Layout:
    """How one plan shards by hand: mesh, a `PartitionSpec` per parameter, and whether layers gather them (ZeRO-3)."""

    mesh: Mesh
    blocks: Mapping[str, PartitionSpec]
    """Of the stacked parameters; the first dim is the layer."""
    outer: Mapping[str, PartitionSpec]
    gathers: bool = False

    def put(self, x: Array, *axes: Any) -> Array:
        """Constrains an activation."""
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))


BLOCK = (
    "norm1_scale", "norm1_bias", "qkv", "qkv_bias", "out", "out_bias",
    "norm2_scale", "norm2_bias", "up", "up_bias", "down", "down_bias",
)  # fmt: skip
OUTER = ("tokens", "positions", "norm_scale", "norm_bias", "head")


def data_parallel(devices: list) -> Layout:
    """Everything repeated but the batch."""
    mesh = Mesh(np.array(devices).reshape(8, 1), ("data", "model"))
    return Layout(mesh, dict.fromkeys(BLOCK, P()), dict.fromkeys(OUTER, P()))


def tensor_parallel(devices: list) -> Layout:
    """Megatron's: heads, MLP and vocabulary over four devices, the batch over two."""
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "model"))
    blocks = dict.fromkeys(BLOCK, P()) | {
        "qkv": P(None, None, None, "model"),
        "qkv_bias": P(None, None, "model"),
        "out": P(None, "model"),
        "up": P(None, None, "model"),
        "up_bias": P(None, "model"),
        "down": P(None, "model"),
    }
    outer = dict.fromkeys(OUTER, P()) | {"tokens": P("model"), "head": P(None, "model")}
    return Layout(mesh, blocks, outer)


def zero3(devices: list) -> Layout:
    """Fully sharded data parallelism: matrices split over all devices, each layer's gathered when it is used."""
    mesh = Mesh(np.array(devices).reshape(8, 1), ("data", "model"))
    blocks = dict.fromkeys(BLOCK, P(None, "data")) | {
        "qkv": P(None, "data"),
        "qkv_bias": P(None, None, "data"),
        "out": P(None, None, None, "data"),
    }
    outer = dict.fromkeys(OUTER, P("data"))
    return Layout(mesh, blocks, outer, gathers=True)


# ---------------------------------------------------------------------------------------------------- the model


def norm(x: Array, scale: Array, bias: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, (x * x).mean(-1, keepdims=True) - mean * mean)
    return (x - mean) * (lax.rsqrt(variance + 1e-5) * scale) + bias


def attention(layout: Layout, p: Mapping[str, Array], x: Array) -> Array:
    query, key, value = jnp.moveaxis(jnp.einsum("bsd,dthk->bsthk", x, p["qkv"]) + p["qkv_bias"], 2, 0)
    query, key, value = (layout.put(part, "data", None, "model") for part in (query, key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    positions = jnp.arange(x.shape[1])
    causal = positions[:, None] >= positions[None, :]
    weights = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = layout.put(jnp.einsum("bhqk,bkhd->bqhd", weights, value), "data", None, "model")
    return jnp.einsum("bshk,hkd->bsd", mixed, p["out"]) + p["out_bias"]


def block(layout: Layout, x: Array, p: Mapping[str, Array]) -> Array:
    if layout.gathers:
        p = {name: layout.put(leaf) for name, leaf in p.items()}
    x = layout.put(x + attention(layout, p, norm(x, p["norm1_scale"], p["norm1_bias"])), "data")
    hidden = norm(x, p["norm2_scale"], p["norm2_bias"]) @ p["up"] + p["up_bias"]
    hidden = jax.nn.gelu(layout.put(hidden, "data", None, "model"), approximate=True)
    return layout.put(x + hidden @ p["down"] + p["down_bias"], "data")


def loss_fn(params: Mapping[str, Any], tokens: Array, *, layout: Layout) -> Array:
    outer = params["outer"]
    if layout.gathers:
        outer = {name: layout.put(leaf) for name, leaf in outer.items()}
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = layout.put(outer["tokens"][inputs] + outer["positions"][jnp.arange(inputs.shape[1])], "data")
    body: Callable = functools.partial(block, layout)
    if layout.gathers:
        # Gathered parameters are not kept for the backward pass but gathered again; all computed values are kept.
        body = jax.checkpoint(body, policy=lambda primitive, *_, **__: primitive.name != "sharding_constraint")
    x, _ = lax.scan(lambda x, p: (body(x, p), None), x, params["blocks"])
    logits = norm(x, outer["norm_scale"], outer["norm_bias"]) @ outer["head"]
    logits = layout.put(logits, "data", None, "model")
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


# ---------------------------------------------------------------------------------------------------- the step


def shardings(layout: Layout) -> dict[str, Any]:
    """Of the parameters."""
    return jax.tree.map(
        lambda spec: NamedSharding(layout.mesh, spec),
        {"blocks": dict(layout.blocks), "outer": dict(layout.outer)},
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def make_step(layout: Layout, optimizer: optax.GradientTransformation, params: Any) -> tuple[Callable, Any]:
    """The jitted step and its first state.

    Args:
        layout: the plan.
        optimizer: any optax optimizer.
        params: from `stack`.
    """
    params = jax.device_put(params, shardings(layout))
    opt_shardings = optax.tree_map_params(
        optimizer.init,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings(layout),
        transform_non_params=lambda _: NamedSharding(layout.mesh, P()),
    )
    state = (params, jax.jit(optimizer.init, out_shardings=opt_shardings)(params))
    state_shardings = (shardings(layout), opt_shardings)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, None))
    def step(state: Any, tokens: Array) -> tuple[Any, Array]:
        params, opt_state = state
        loss, gradients = jax.value_and_grad(functools.partial(loss_fn, layout=layout))(params, tokens)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step, state


def stack(config: GPT2Config, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The zoo's parameters, by path, in this model's shapes."""
    width, heads = config.width, config.num_heads
    head_dim = width // heads
    names = {
        "norm1_scale": ("attention_norm/scale", (width,)),
        "norm1_bias": ("attention_norm/bias", (width,)),
        "qkv": ("attention/qkv/kernel", (width, 3, heads, head_dim)),
        "qkv_bias": ("attention/qkv/bias", (3, heads, head_dim)),
        "out": ("attention/out/kernel", (heads, head_dim, width)),
        "out_bias": ("attention/out/bias", (width,)),
        "norm2_scale": ("mlp_norm/scale", (width,)),
        "norm2_bias": ("mlp_norm/bias", (width,)),
        "up": ("mlp/up/kernel", (width, config.mlp_width)),
        "up_bias": ("mlp/up/bias", (config.mlp_width,)),
        "down": ("mlp/down/kernel", (config.mlp_width, width)),
        "down_bias": ("mlp/down/bias", (width,)),
    }
    blocks = {
        name: np.stack([np.reshape(leaves[f"blocks/{i}/{path}"], shape) for i in range(config.num_layers)])
        for name, (path, shape) in names.items()
    }
    outer = {
        "tokens": leaves["token_embedding/embedding"],
        "positions": leaves["position_embedding/embedding"],
        "norm_scale": leaves["norm/scale"],
        "norm_bias": leaves["norm/bias"],
        "head": leaves["head/kernel"],
    }
    return {"blocks": blocks, "outer": {name: np.asarray(x) for name, x in outer.items()}}
