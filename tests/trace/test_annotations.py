"""The user's own sharding annotations win over what the tracer infers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from galvatron_jax.spec.program import FactorRole
from galvatron_jax.trace.model import trace

WIDTH, HIDDEN = 16, 32


class AnnotatedMLP(nnx.Module):
    """Two products whose inner dim carries a name, or none."""

    def __init__(self, name: str | None, rngs: nnx.Rngs):
        init = nnx.initializers.normal()
        self.up = nnx.Linear(WIDTH, HIDDEN, kernel_init=nnx.with_partitioning(init, (None, name)), rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, kernel_init=nnx.with_partitioning(init, (name, None)), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


class LinenMLP(nn.Module):
    """The same in Linen, with logical names."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal()
        h = nn.Dense(HIDDEN, kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")))(x)
        return nn.Dense(WIDTH, kernel_init=nn.with_logical_partitioning(init, ("mlp", "embed")))(nn.relu(h))


def squared(model: Any, batch: dict[str, Any]) -> Any:
    return jnp.mean(model(batch["x"]) ** 2)


def hidden_sizes(model: Any) -> set[int]:
    batch = {"x": np.zeros((8, WIDTH), np.float32)}
    spec = trace(model, squared, batch).spec
    return {f.size for kind in spec.kinds for f in kind.program.factors if f.role is FactorRole.HIDDEN}


def test_a_named_dim_may_be_tensor_parallel_and_an_unnamed_one_not() -> None:
    with nnx.use_eager_sharding(False):
        named = nnx.eval_shape(lambda: AnnotatedMLP("model", nnx.Rngs(0)))
        unnamed = nnx.eval_shape(lambda: AnnotatedMLP(None, nnx.Rngs(0)))
    assert HIDDEN in hidden_sizes(named)
    assert HIDDEN not in hidden_sizes(unnamed)


def test_logical_names_follow_the_rules_in_force() -> None:
    assert HIDDEN in hidden_sizes(LinenMLP())
    with nn.logical_axis_rules([("mlp", None), ("embed", None)]):
        assert HIDDEN not in hidden_sizes(LinenMLP())
    with nn.logical_axis_rules([("mlp", "model"), ("embed", None)]):
        assert HIDDEN in hidden_sizes(LinenMLP())
