"""The decorator: instances cost nothing, are called like any other, and are what the undecorated class makes."""

import pickle

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from galvatron_jax.api.decorator import auto_shard, is_abstract, materialize, options_of, recipe_of
from galvatron_jax.errors import InputError


class Plain(nnx.Module):
    """A docstring."""

    def __init__(self, width=4, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.linear(x))


@auto_shard
class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


@auto_shard(memory_per_device="20GiB", num_microbatches=2)
class Net(nnx.Module):
    def __init__(self, width, *, rngs):
        super().__init__()
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Subclass(Net):
    pass


@auto_shard
class Linen(flax.linen.Module):
    width: int = 4

    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(self.width)(x)


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def test_a_huge_model_costs_nothing():
    model = auto_shard(Plain)(1_000_000, rngs=nnx.Rngs(0))
    assert model.linear.kernel.get_value() == jax.ShapeDtypeStruct((1_000_000, 1_000_000), jnp.float32)
    assert "ShapeDtypeStruct" in repr(model)


def test_the_class_keeps_its_name_and_is_a_subclass():
    decorated = auto_shard(Plain)
    assert (decorated.__name__, decorated.__doc__, decorated.__module__) == ("Plain", "A docstring.", __name__)
    assert isinstance(decorated(rngs=nnx.Rngs(0)), Plain)
    assert not is_abstract(Plain(rngs=nnx.Rngs(0)))


def test_calling_gives_the_values_of_the_undecorated_class():
    x = jnp.ones((2, 4))
    model, plain = auto_shard(Plain)(rngs=nnx.Rngs(0, dropout=7)), Plain(rngs=nnx.Rngs(0, dropout=7))
    assert is_abstract(model)
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-6)
    assert not is_abstract(model)
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-6)  # the second call draws the second mask


def test_decorated_blocks_inside_decorated_models():
    model = Net(4, rngs=nnx.Rngs(0))
    assert is_abstract(model)
    assert isinstance(model.blocks[0], Block)
    assert model(jnp.ones((2, 4))).shape == (2, 4)
    assert not is_abstract(model.blocks[1])


def test_subclasses_are_lazy_too():
    model = Subclass(4, rngs=nnx.Rngs(0))
    assert type(model) is Subclass
    assert is_abstract(model)
    assert model(jnp.ones((2, 4))).shape == (2, 4)


def test_under_a_transformation_the_class_builds_as_undecorated():
    created = nnx.jit(lambda: Net(4, rngs=nnx.Rngs(0)))()
    assert not is_abstract(created)
    for got, want in zip(leaves(created), leaves(materialize(Net(4, rngs=nnx.Rngs(0)))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_recipe_builds_with_other_seeds():
    recipe = recipe_of(auto_shard(Plain)(rngs=nnx.Rngs(0)))
    for got, want in zip(leaves(nnx.jit(recipe.build)(3)), leaves(Plain(rngs=nnx.Rngs(3))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    several = recipe_of(auto_shard(Plain)(rngs=nnx.Rngs(params=0, dropout=1)))
    kernels = [nnx.jit(several.build)(seed).linear.kernel.get_value() for seed in (1, 2)]
    assert not np.array_equal(*kernels)


def test_the_callers_generators_do_not_advance():
    rngs = nnx.Rngs(0)
    auto_shard(Plain)(rngs=rngs)
    assert int(rngs.default.count.get_value()) == 0


def test_split_merge_and_pickle_work():
    model = Net(4, rngs=nnx.Rngs(0))
    assert nnx.split(model)[0] == nnx.split(model)[0]
    expected = model(jnp.ones((2, 4)))
    merged = nnx.merge(*nnx.split(model))
    for copy in (merged, pickle.loads(pickle.dumps(model)), nnx.clone(model)):
        np.testing.assert_array_equal(copy(jnp.ones((2, 4))), expected)


def test_linen_modules_are_what_they_were():
    model = Linen(width=3)
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
    assert variables["params"]["Dense_0"]["kernel"].shape == (4, 3)
    assert pickle.loads(pickle.dumps(model)) == model
    assert recipe_of(model) is None


def test_options_stay_with_the_instance():
    assert options_of(Net(4, rngs=nnx.Rngs(0))).memory_bytes == 20 * 1024**3
    assert options_of(Net(4, rngs=nnx.Rngs(0))).num_microbatches == 2
    assert options_of(Plain(rngs=nnx.Rngs(0))).memory_bytes is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_per_device": "20 gigs"}, "'20 gigs' is no size"),
        ({"memory_per_device": 0}, "must be positive"),
        ({"num_microbatches": 0}, "num_microbatches is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        auto_shard(**options)(Plain)


def test_only_flax_classes_can_be_decorated():
    with pytest.raises(InputError, match="neither"):
        auto_shard(int)
    with pytest.raises(InputError, match="neither"):
        auto_shard(lambda x: x)


def test_an_abstract_model_that_says_not_how_it_was_built_is_refused():
    with pytest.raises(InputError, match="auto_shard"):
        materialize(nnx.eval_shape(lambda: Plain(rngs=nnx.Rngs(0))))
