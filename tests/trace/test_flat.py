"""Flat programs: products and their transposes fold."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from galvatron_jax.trace.flat import evaluate, flatten

FOLDS = {
    "weight gradient": lambda x, w: jax.vjp(lambda w: jnp.einsum("bsd,dh->bsh", x, w), w)[1](jnp.ones((2, 3, 5)))[0],
    "plain": lambda x, w: (x[0] @ w).T,
    "batched": lambda x, w: jnp.swapaxes(x @ jnp.broadcast_to(w, (2, 4, 5)), 1, 2),
    "two precisions": lambda x, w: jnp.dot(x[0], w, precision=("high", "highest")).T,
}
STAYS = {
    "read twice": lambda x, w: (lambda y: y.T + jnp.sum(y))(x[0] @ w),
    "handed out": lambda x, w: (lambda y: (y, y.T))(x[0] @ w),
    "other order": lambda x, w: jnp.transpose(jnp.einsum("bsd,dh->bsh", x, w), (1, 0, 2)),
}


def _flat(function: Callable) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    operands = [rng.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (4, 5))]
    flat = flatten(jax.make_jaxpr(function)(*operands))
    wanted = [np.asarray(x) for x in jax.tree.leaves(function(*operands))]
    return [op.primitive.name for op in flat.operations], evaluate(flat, operands), wanted


@pytest.mark.parametrize("name", FOLDS)
def test_a_product_and_its_transpose_are_one_product(name: str) -> None:
    primitives, found, wanted = _flat(FOLDS[name])
    assert "transpose" not in primitives
    for mine, whole in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STAYS)
def test_a_product_that_others_read_keeps_its_transpose(name: str) -> None:
    primitives, found, wanted = _flat(STAYS[name])
    assert "transpose" in primitives
    for mine, whole in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-5, atol=1e-5)


def test_operands_of_a_folded_product_swap_their_precisions() -> None:
    x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
    flat = flatten(jax.make_jaxpr(lambda x, w: jnp.dot(x, w, precision=("high", "highest")).T)(x, w))
    (product,) = flat.operations
    assert product.operands == flat.inputs[::-1]
    assert product.params["precision"] == (lax.Precision.HIGHEST, lax.Precision.HIGH)
