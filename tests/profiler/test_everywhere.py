"""What is timed is the work: all of it, once per repetition, on every device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galvatron_jax.errors import InputError
from galvatron_jax.profiler.devices import live_mesh
from galvatron_jax.profiler.everywhere import _place, compile_everywhere, time_everywhere
from galvatron_jax.profiler.timing import Sampling

QUICK = Sampling(window_s=0.005, budget_s=0.02, max_samples=3)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def mesh():
    return live_mesh()


def test_the_program_applies_the_function_on_every_device(mesh):
    arrays = [_place(struct(3, 4), mesh, 0)]
    made = compile_everywhere(lambda x: (x + 1, x.sum()), arrays, mesh=mesh)(jnp.int32(3), *arrays)
    local = np.asarray(arrays[0])
    assert local.shape == (8, 3, 4)
    np.testing.assert_allclose(made[0], local + 1)
    np.testing.assert_allclose(made[1], local.sum((1, 2)), rtol=1e-5)


def test_work_stays_inside_the_loop_and_inputs_are_not_copied(mesh):
    arrays = [_place(struct(32, 32), mesh, 0), _place(struct(32, 32), mesh, 1)]
    text = compile_everywhere(jnp.matmul, arrays, mesh=mesh).as_text()
    entry = text[text.index("ENTRY") :]
    assert " while(" in entry
    assert "dot" not in entry
    assert "copy(%param" not in text.replace("copy(%param.0)", "")
    assert " conditional(" in text


def test_no_output_is_dead_code(mesh):
    arrays = [_place(struct(16, 16), mesh, seed) for seed in range(2)]

    def two_products(x, y):
        return x @ y, y @ x, jnp.float32(0)

    text = compile_everywhere(two_products, arrays, mesh=mesh).as_text()
    assert text.count(" dot(") == 2


def test_inputs_are_not_donated(mesh):
    arrays = [_place(struct(16), mesh, 0)]
    program = compile_everywhere(lambda x: x * 2, arrays, mesh=mesh)
    for _ in range(2):
        program(jnp.int32(1), *arrays)
    assert not arrays[0].is_deleted()


def test_more_work_takes_more_time(mesh):
    def chain(length):
        def run(x):
            for _ in range(length):
                x = jnp.tanh(x @ x)
            return x

        return time_everywhere(run, [struct(96, 96)], mesh=mesh, sampling=QUICK).median_s

    assert chain(16) > 3 * chain(1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_inputs_of_any_dtype_are_made_up(mesh, dtype):
    array = _place(struct(5, 2, dtype=dtype), mesh, 0)
    assert array.dtype == dtype
    assert len(np.unique(np.asarray(array, np.float32))) > 1


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_random_keys_can_be_inputs_and_outputs(mesh, implementation):
    dtype = jax.random.key(0, impl=implementation).dtype

    def dropout(key, x):
        used, kept = jax.random.split(key)
        return kept, jnp.where(jax.random.bernoulli(used, 0.5, x.shape), x, 0.0)

    timing = time_everywhere(dropout, [struct(dtype=dtype), struct(8)], mesh=mesh, sampling=QUICK)
    assert timing.median_s > 0


def test_what_is_handed_through_is_no_work(mesh):
    arrays = [_place(struct(8), mesh, 0), _place(struct(9), mesh, 1)]
    made = compile_everywhere(lambda x, y: (y, x * 2, y), arrays, mesh=mesh)(jnp.int32(1), *arrays)
    assert [array.shape for array in made] == [(8, 8)]


def test_nothing_to_time_is_an_error(mesh):
    with pytest.raises(InputError, match="Nothing to time"):
        time_everywhere(lambda x: x, [struct(4)], mesh=mesh)
