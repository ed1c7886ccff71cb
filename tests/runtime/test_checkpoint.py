"""Checkpoints come back bit for bit, in whatever layout the run that reads them has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from galvatron_jax.errors import InputError
from galvatron_jax.runtime.checkpoint import Checkpoints


@pytest.fixture
def mesh(devices):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_tree(mesh, spec, *, scale=1.0):
    weight = jax.device_put(jnp.arange(64.0).reshape(8, 8) * scale, NamedSharding(mesh, spec))
    parameters = {"weight": weight, "bias": jnp.full(3, scale)}
    return {
        "parameters": parameters,
        "optimizer": optax.adam(1e-3).init(parameters),
        "key": jax.random.key(int(scale)),
        "low": jnp.full(4, scale, jnp.bfloat16),
    }


def test_a_checkpoint_comes_back_in_the_layout_of_the_template(mesh, tmp_path):
    saved = make_tree(mesh, PartitionSpec("a", "b"), scale=3.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, saved)
    template = make_tree(mesh, PartitionSpec(None, ("a", "b")))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 7
        restored = checkpoints.restore(template)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert restored["parameters"]["weight"].sharding == template["parameters"]["weight"].sharding
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert got.dtype == want.dtype
        is_key = jnp.issubdtype(got.dtype, jax.dtypes.prng_key)
        got, want = (jax.random.key_data(x) if is_key else x for x in (got, want))
        assert np.array_equal(got, want)


def test_only_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.full(2, float(step))})
        checkpoints.wait()
        assert checkpoints.restore({"x": jnp.zeros(2)}, step=2)["x"].tolist() == [2.0, 2.0]
        with pytest.raises(InputError, match=r"No checkpoint of step 1 .*\[2, 3\]"):
            checkpoints.restore({"x": jnp.zeros(2)}, step=1)


def test_a_checkpoint_of_another_model_says_what_differs(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"weight": jnp.zeros((2, 3)), "old": jnp.zeros(1)})
        checkpoints.wait()
        with pytest.raises(InputError, match="another model or optimizer") as caught:
            checkpoints.restore({"weight": jnp.zeros((3, 2)), "weigth": jnp.zeros(1)})
    message = str(caught.value)
    assert "weight: saved as float32(2, 3), now float32(3, 2)" in message
    assert "weigth: not saved (saved: weight)" in message
    assert "old: saved, but not part of this run's state" in message


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(InputError, match="there are none"):
            checkpoints.restore({"x": jnp.zeros(2)})


def test_all_can_be_deleted(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        checkpoints.wait()
        checkpoints.delete_all()
        assert checkpoints.latest_step is None
