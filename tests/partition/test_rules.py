"""Every primitive's sharding rule against the unsharded primitive, on random shapes and layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from galvatron_jax.trace.flat import flatten
from galvatron_jax.trace.rules import ELEMENTWISE, SHARDING_RULES

from .harness import planned
from .primitives import MAKERS, UNREACHED, Sample

pytestmark = pytest.mark.standard_promotion

QUICK = settings(  # Without shrinking, which takes minutes.
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)
THOROUGH = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

ROUNDING = 2e-5
"""Of a result, relative to its largest element: sums in another order, summands of three times the size."""
CURVED = {"digamma", "lgamma", "erf_inv", "bitcast_convert_type", "nextafter", "reduce_precision"}
"""Derivatives that JAX has not, or that blow rounding up."""


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def check(draw: Callable, function: Callable[..., Any], operands: Sequence[np.ndarray]) -> None:
    """Runs a function on random shards and compares every device's results with the function's own."""
    plan = draw(planned(function, operands))
    wanted = jax.tree.leaves(jax.jit(function)(*operands))
    for found, whole in zip(plan.run(operands), wanted, strict=True):
        for mine in found:
            assert mine.dtype == whole.dtype
            if np.issubdtype(whole.dtype, np.inexact):
                size = max(1.0, float(np.max(np.abs(whole), initial=0.0)))
                np.testing.assert_allclose(mine, whole, rtol=ROUNDING, atol=ROUNDING * size)
            else:
                np.testing.assert_array_equal(mine, whole)


def composite(sample: Sample) -> tuple[Callable[..., Any], list[np.ndarray]]:
    """The function between others, with its gradient: results, and gradients with respect to what is floating."""
    floating = [i for i, x in enumerate(sample.operands) if np.issubdtype(x.dtype, np.floating)]

    def function(*operands: Any) -> Any:
        def inner(*active: Any) -> Any:
            arguments = list(operands)
            for i, x in zip(floating, active, strict=True):
                arguments[i] = jnp.tanh(x) + jnp.sum(x) / max(1, x.size)
            outputs = jax.tree.leaves(sample.function(*arguments))
            return [jnp.tanh(y * 0.05) + y for y in outputs if jnp.issubdtype(y.dtype, jnp.floating)]

        outputs, pullback = jax.vjp(inner, *(operands[i] for i in floating))
        return outputs, pullback([jnp.tanh(y) + 1 for y in outputs])

    return function, list(sample.operands)


def _forward(name: str, data: st.DataObject) -> None:
    sample = data.draw(st.composite(MAKERS[name])())
    flat = flatten(jax.make_jaxpr(sample.function)(*sample.operands))
    primitives = {op.primitive.name for op in flat.operations}
    assume(name.split(" ")[0] in primitives or name in UNREACHED)  # A transposition may be none.
    check(data.draw, sample.function, sample.operands)


def _gradient(name: str, data: st.DataObject) -> None:
    sample = data.draw(st.composite(MAKERS[name])())
    if any(np.issubdtype(x.dtype, np.floating) for x in sample.operands):
        function, operands = composite(sample)
        check(data.draw, function, operands)


UNDIFFERENTIABLE = CURVED | {
    "eq_to", "le_to", "lt_to", "reduce_xor", "rng_bit_generator", "select_and_gather_add", "approx_top_k", "argmax",
    "argmin", "reduce_window_min", "select_and_scatter_add",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MAKERS))
@QUICK
@given(data=st.data())
def test_a_rule_computes_what_the_primitive_does(name: str, data: st.DataObject) -> None:
    _forward(name, data)


SIMPLE = ELEMENTWISE - {"mul", "select_n", "tanh", "add_any"}
"""Elementwise primitives, whose composites are much alike."""


@pytest.mark.parametrize("name", sorted(set(MAKERS) - UNDIFFERENTIABLE - SIMPLE))
@QUICK
@given(data=st.data())
def test_a_composite_with_gradient_computes_what_one_device_does(name: str, data: st.DataObject) -> None:
    _gradient(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MAKERS))
@THOROUGH
@given(data=st.data())
def test_a_rule_computes_what_the_primitive_does_on_many_shapes(name: str, data: st.DataObject) -> None:
    _forward(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MAKERS) - UNDIFFERENTIABLE))
@THOROUGH
@given(data=st.data())
def test_a_composite_with_gradient_computes_what_one_device_does_on_many_shapes(name: str, data: st.DataObject) -> None:
    _gradient(name, data)


BUILT_IN = frozenset(SHARDING_RULES)
"""Before any test: the documentation's examples register rules of their own."""


def test_every_rule_is_tested() -> None:
    assert BUILT_IN - set(MAKERS) - set(UNREACHED) == set()
