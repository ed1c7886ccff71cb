"""A primitive that the rules do not know: it falls back, is reported, and can be taught."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend import core as jex
from jax.interpreters import mlir

from galvatron_jax.partition.layers import plan_layer
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.trace.model import Traced, trace
from galvatron_jax.trace.rules import SHARDING_RULES, elementwise_rule, register_rule
from tests.runtime.matrix import CYCLES, MICROBATCH, plan_of

mystery_p = jex.Primitive("mystery")
mystery_p.def_impl(lambda x: x * x)
mystery_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(mystery_p, mlir.lower_fun(lambda x: x * x, multiple_results=False))


@jax.custom_jvp
def mystery(x: jax.Array) -> jax.Array:
    """A square, by a primitive that nobody knows."""
    return mystery_p.bind(x)


@mystery.defjvp
def _mystery_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x,), (t,) = primals, tangents
    return mystery(x), 2 * x * t


class Mysterious(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 64, rngs=rngs)
        self.down = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(mystery(self.up(x)))


def loss_fn(model: Mysterious, batch: dict) -> jax.Array:
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((MICROBATCH, 16), dtype=np.float32) for name in ("x", "y")}


def traced() -> Traced:
    return trace(Mysterious(nnx.Rngs(0)), loss_fn, batch())


@pytest.fixture
def rules() -> Iterator[dict[str, Any]]:
    """The rules, as they were when the test is over."""
    before = dict(SHARDING_RULES)
    yield SHARDING_RULES
    SHARDING_RULES.clear()
    SHARDING_RULES.update(before)


def check_gradients(model: Traced, cycle: str) -> None:
    step = build_step(model, plan_of(model, CYCLES[cycle]), optax.sgd(0.1))
    state = step.init(0)
    parameters, model_state = model.functional.init(0)

    def loss(parameters: dict) -> jax.Array:
        return model.functional.apply(parameters, model_state, batch()).loss

    wanted = jax.grad(loss)(parameters)
    gradients, _, _ = jax.jit(step.gradients)(state["params"], state["model_state"], step.place(batch()))
    found = step.storage.unpack(gradients, list(parameters))
    for path, gradient in wanted.items():
        np.testing.assert_allclose(found[path], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cycle", ["dp8", "tp8", "tp4", "zero3"])
def test_an_unknown_primitive_runs_whole(cycle: str) -> None:
    check_gradients(traced(), cycle)


def test_an_unknown_primitive_is_reported() -> None:
    assert any("mystery" in note for note in traced().spec.notes)


@pytest.mark.parametrize("cycle", ["dp8", "tp4"])
def test_a_registered_rule_shards_it(rules: dict[str, Any], cycle: str) -> None:
    def gathered() -> int:
        spec = traced().spec
        strategy = LayerStrategy(tp=("a", "b", "c"))
        plan = plan_layer(
            spec.kinds[0], strategy, mesh=dict.fromkeys("abc", 2), microbatch=MICROBATCH, model_microbatch=MICROBATCH
        )  # fmt: skip
        return sum(c.kind.value == "all-gather" for c in plan.forward.collectives)

    assert gathered() == 1
    register_rule("mystery", elementwise_rule)
    model = traced()
    assert not any("mystery" in note for note in model.spec.notes)
    assert gathered() == 0
    check_gradients(model, cycle)
