import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.errors import InputError
from galvatron_jax.spec.mesh import mesh_shape, prime_axes, prime_factors


@given(st.integers(1, 10**6))
def test_prime_factors_multiply_to_the_number(number):
    factors = prime_factors(number)
    assert math.prod(factors) == number
    assert all(prime_factors(factor) == (factor,) for factor in factors)


@given(st.integers(1, 200), st.integers(1, 16))
def test_axes_are_prime_and_put_slow_links_first(num_nodes, devices_per_node):
    axes = prime_axes(num_nodes * devices_per_node, devices_per_node)
    levels = [axis.level for axis in axes]
    assert math.prod(axis.size for axis in axes if axis.level == "inter") == num_nodes
    assert math.prod(axis.size for axis in axes if axis.level == "intra") == devices_per_node
    assert levels == sorted(levels)
    assert len({axis.name for axis in axes}) == len(axes)
    assert all(prime_factors(axis.size) == (axis.size,) for axis in axes)


@pytest.mark.parametrize(
    ("num_devices", "devices_per_node", "shape"),
    [
        (1, 8, {}),
        (8, 8, {"a": 2, "b": 2, "c": 2}),
        (4, 8, {"a": 2, "b": 2}),
        (24, 24, {"a": 3, "b": 2, "c": 2, "d": 2}),
        (24, 8, {"a": 3, "b": 2, "c": 2, "d": 2}),
    ],
)
def test_the_mesh_of_some_devices(num_devices, devices_per_node, shape):
    assert mesh_shape(prime_axes(num_devices, devices_per_node)) == shape


def test_devices_that_do_not_fill_nodes_are_refused():
    with pytest.raises(InputError, match="12 devices do not fill nodes of 8; use 8 or 16"):
        prime_axes(12, 8)
    with pytest.raises(InputError, match="both must be at least 1"):
        prime_axes(0, 8)
