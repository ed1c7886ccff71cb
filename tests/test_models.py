"""The zoo is what the papers say, computes in the dtype asked for, and explains a wrong name."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from galvatron_jax.models import registry
from galvatron_jax.models.moe import route
from galvatron_jax.models.swin import from_windows, shift_mask, to_windows
from galvatron_jax.models.t5 import position_bucket
from tests.models import MODELS

# Parameters of the published models, with the head that the zoo gives them. The first of each family run always.
PUBLISHED = {
    "gpt2": {"small": 124.4e6, "medium": 354.8e6, "large": 774.0e6, "xl": 1557.6e6},
    "llama": {
        "llama2-7b": 6.74e9,
        "tinyllama-1b": 1.10e9,
        "llama2-13b": 13.02e9,
        "llama2-70b": 68.98e9,
        "llama3-8b": 8.03e9,
        "llama3-70b": 70.55e9,
    },
    "bert": {"large": 335e6, "base": 110e6, "huge-32": 672e6, "huge-48": 987e6},
    "vit": {"base": 86e6, "large": 304e6, "huge-32": 632e6, "huge-48": 947e6},
    "swin": {"swin-t": 28.3e6, "base": 87.8e6, "huge-32": 701e6, "huge-48": 1016e6},
    "t5": {"base": 222.9e6, "small": 60.5e6, "base-v1.1": 247.6e6, "large-32": 502e6, "large-48": 737e6},
    "moe": {"mixtral-8x7b": 46.7e9, "mixtral-8x22b": 140.6e9},
}
ALWAYS = {("llama", "llama2-70b")} | {(family, next(iter(sizes))) for family, sizes in PUBLISHED.items()}
PUBLISHED_CASES = [
    pytest.param(family, size, count, marks=() if (family, size) in ALWAYS else pytest.mark.slow, id=f"{family}-{size}")
    for family, sizes in PUBLISHED.items()
    for size, count in sizes.items()
]


def scalar_loss(loss_fn, model, batch):
    out = loss_fn(model, batch)
    return out[0] if isinstance(out, tuple) else out


def loss_and_gradients(case, batch):
    """Of an NNX module, or of a Linen one bound to its parameters."""
    if case.flavour == "nnx":
        model = case.make()(nnx.Rngs(0))
        return nnx.jit(nnx.value_and_grad(lambda model, batch: scalar_loss(case.loss_fn, model, batch)))(model, batch)
    module = case.make()
    variables = jax.jit(module.init)(jax.random.key(0), batch[case.init_key])

    def loss(variables):
        return scalar_loss(case.loss_fn, module.bind(variables), batch)

    return jax.jit(jax.value_and_grad(loss))(variables)


def abstract_model(family, preset="tiny", **overrides):
    config = registry.model_config(family, preset, **overrides)
    return config, nnx.eval_shape(lambda: registry.family(family).model(config, rngs=nnx.Rngs(0)))


def loss_jaxpr(family, **overrides):
    config, model = abstract_model(family, **overrides)
    found = registry.family(family)
    graph, state = nnx.split(model)
    return jax.make_jaxpr(lambda state, batch: scalar_loss(found.loss_fn, nnx.merge(graph, state), batch))(
        state, found.example_batch(config, 2)
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_float32_loss_and_a_gradient_in_every_parameter(name):
    case = MODELS[name]
    loss, gradients = loss_and_gradients(case, case.batch(4, seed=1))
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    assert np.isfinite(loss)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
        assert np.linalg.norm(leaf) > 1e-5, f"{jax.tree_util.keystr(path)} has no gradient"


@pytest.mark.parametrize("family", registry.families())
def test_a_new_model_guesses_uniformly(family):
    model = registry.build(family, "tiny", rngs=nnx.Rngs(0))
    found = registry.family(family)
    batch = found.random_batch(found.presets["tiny"], 8)
    loss = nnx.jit(lambda model, batch: scalar_loss(found.loss_fn, model, batch))(model, batch)
    # T5's tied embedding of unit variance favours the token that came in, as the original's.
    assert float(loss) == pytest.approx(math.log(128), abs=1.2 if family == "t5" else 0.2)


@pytest.mark.parametrize("family", registry.families())
def test_random_batches_have_the_shapes_of_the_example_and_follow_the_seed(family):
    found = registry.family(family)
    for config in (found.presets["tiny"], registry.model_config(family, "tiny", dtype="bfloat16")):
        first, again, other = (found.random_batch(config, 3, seed=seed) for seed in (0, 0, 1))
        example = found.example_batch(config, 3)
        assert {key: (leaf.shape, leaf.dtype) for key, leaf in example.items()} == {
            key: (leaf.shape, leaf.dtype) for key, leaf in first.items()
        }
        assert all(np.array_equal(first[key], again[key]) for key in first)
        assert any(not np.array_equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("family", "preset", "published"), PUBLISHED_CASES)
def test_a_preset_has_the_published_number_of_parameters(family, preset, published):
    _, model = abstract_model(family, preset)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == pytest.approx(published, rel=0.02)


def test_every_published_size_is_checked():
    ours = {"moe": {"small"}}
    for family in registry.families():
        assert set(registry.presets(family)) == {"tiny", *PUBLISHED[family]} | ours.get(family, set())


@pytest.mark.parametrize("family", registry.families())
def test_products_run_in_the_compute_dtype_and_parameters_keep_theirs(family):
    text = str(loss_jaxpr(family, dtype="bfloat16"))
    products = re.findall(r":(\w+)\[[^\]]*\] = (?:dot_general|conv_general_dilated)\[", text)
    layers = registry.model_config(family, "tiny")
    routers = layers.num_layers if family == "moe" else 0
    assert products.count("f32") == routers  # routing stays in float32
    assert products.count("bf16") == len(products) - routers > 0
    assert re.search(r":f32\[[^\]]*\] = exp", text), "the softmax is not in float32"
    for param_dtype in ("float32", "bfloat16"):
        _, model = abstract_model(family, dtype="bfloat16", param_dtype=param_dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {param_dtype}


@pytest.mark.parametrize("family", registry.families())
def test_blocks_of_a_stack_are_one_program(family):
    _, model = abstract_model(family)
    stacks = [value for path, value in nnx.iter_graph(model) if isinstance(value, nnx.List) and path[-1] == "blocks"]
    assert stacks
    for stack in stacks:
        kinds = {(type(block), str(jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(block)))) for block in stack}
        definitions = {str(nnx.graphdef(block)) for block in stack}
        assert len(kinds) == len(definitions) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_token_does_not_see_those_after_it(family):
    model = registry.build(family, "tiny", rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(128, size=(1, 32), dtype=np.int32)
    changed = tokens.copy()
    changed[0, 20:] = 7
    first = (jnp.asarray(tokens),) if family == "t5" else ()
    before, after = model(*first, jnp.asarray(tokens)), model(*first, jnp.asarray(changed))
    np.testing.assert_allclose(before[:, :20], after[:, :20], atol=1e-5)
    assert not np.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


def test_bert_does_not_attend_to_padding():
    model = registry.build("bert", "tiny", rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(128, size=(1, 32), dtype=np.int32)
    present = np.arange(32)[None] < 20
    changed = np.where(present, tokens, np.int32(7))
    before, after = (model(jnp.asarray(batch), present=jnp.asarray(present)) for batch in (tokens, changed))
    np.testing.assert_allclose(before[:, :20], after[:, :20], atol=1e-5)


def test_berts_weight_is_the_number_of_masked_positions():
    found = registry.family("bert")
    batch = found.random_batch(found.presets["tiny"], 4)
    _, aux = found.loss_fn(registry.build("bert", "tiny", rngs=nnx.Rngs(0)), batch)
    assert float(aux["weight"]) == batch["mask"].sum() > 0


def test_dropout_is_random_in_training_and_absent_in_evaluation():
    model = registry.build("gpt2", {"preset": "tiny", "dropout": 0.5}, rngs=nnx.Rngs(0))
    tokens = jnp.zeros((1, 32), jnp.int32)
    assert not np.allclose(model(tokens), model(tokens))
    model.eval()
    np.testing.assert_array_equal(model(tokens), model(tokens))


def test_windows_are_undone_and_shifted_windows_see_only_their_own_region():
    x = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 4, 3)
    windows = to_windows(x, 2)
    np.testing.assert_array_equal(windows[0, 0], x[0, :2, :2].reshape(4, 3))
    np.testing.assert_array_equal(from_windows(windows, 4, 4), x)
    mask = shift_mask(4, 2, 1)
    assert mask[0].all()  # the window that the shift leaves whole
    np.testing.assert_array_equal(mask[-1], np.eye(4, dtype=bool))  # its four corners come from four places


def test_t5_buckets_are_exact_when_near_and_shared_when_far():
    distance = jnp.array([0, 1, -1, -7, 7, -127, 127, -1000, 1000])
    both = position_bucket(distance, bidirectional=True, num_buckets=32, max_distance=128)
    np.testing.assert_array_equal(both, [0, 17, 1, 7, 23, 15, 31, 15, 31])
    past = position_bucket(distance, bidirectional=False, num_buckets=32, max_distance=128)
    np.testing.assert_array_equal(past, [0, 0, 1, 7, 0, 31, 0, 31, 0])


def test_tokens_within_capacity_go_to_their_likeliest_experts():
    probabilities = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 16, 4)))
    combine, balance = route(probabilities, experts_per_token=2, capacity=16)
    gates, choices = jax.lax.top_k(probabilities, 2)
    expected = (
        jnp.zeros_like(probabilities)
        .at[jnp.arange(2)[:, None, None], jnp.arange(16)[None, :, None], choices]
        .set(gates / gates.sum(axis=-1, keepdims=True))
    )
    np.testing.assert_allclose(combine.sum(axis=-1), expected, rtol=1e-5)
    assert ((combine > 0).sum(axis=1) <= 1).all(), "two tokens share a slot"
    assert balance.shape == (2,)


def test_tokens_beyond_an_experts_capacity_are_dropped_in_order():
    probabilities = jnp.broadcast_to(jnp.array([0.7, 0.2, 0.1]), (1, 8, 3))
    combine, balance = route(probabilities, experts_per_token=1, capacity=5)
    np.testing.assert_array_equal(combine[0, :, 0].sum(axis=-1), [1, 1, 1, 1, 1, 0, 0, 0])
    assert float(balance[0]) == pytest.approx(3 * 0.7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: registry.family("lama"), r"No family 'lama' in the zoo. Did you mean 'llama'\? There are: bert, gpt2"),
        (lambda: registry.presets("xyz"), r"No family 'xyz' in the zoo. There are: "),
        (lambda: registry.model_config("gpt2", "smal"), r"No preset 'smal' in family 'gpt2'. Did you mean 'small'"),
        (
            lambda: registry.model_config("gpt2", "tiny", num_layer=3),
            r"No field 'num_layer' in GPT2Config. Did you mean 'num_layers'",
        ),
        (
            lambda: registry.model_config("gpt2", "tiny", num_layers="3"),
            "num_layers='3' is text, but num_layers must be a whole number",
        ),
        (
            lambda: registry.model_config("gpt2", "tiny", num_layers=True, widht=3),
            r"num_layers=True is true or false, but .*\nNo field 'widht' .* Did you mean 'width'",
        ),
        (
            lambda: registry.model_config("gpt2", "tiny", dtype="bf16"),
            "dtype='bf16' is no floating-point type; choose one of: float64, float32, bfloat16",
        ),
        (
            lambda: registry.model_config("gpt2", "tiny", num_heads=7),
            "GPT2Config: width=64 is not divisible by num_heads=7",
        ),
        (
            lambda: registry.model_config("llama", "tiny", num_kv_heads=3),
            "LlamaConfig: num_heads=8 is not divisible by num_kv_heads=3",
        ),
        (lambda: registry.model_config("swin", "tiny", depths=(2, 3, 2, 2)), r"depths\[1\]=3 must be 2, 4, ..."),
        (lambda: registry.model_config("swin", "tiny", depths=(2, 2)), "need one entry a stage"),
        (lambda: registry.model_config("moe", "tiny", experts_per_token=9), "must be between 1 and num_experts=8"),
        (lambda: registry.model_config("vit", "tiny", pooling="max"), "pooling='max' is neither 'token' nor 'mean'"),
        (lambda: registry.build("gpt2", {"num_layers": 2}, rngs=nnx.Rngs(0)), "No preset named for family 'gpt2'"),
    ],
)
def test_a_wrong_name_or_value_says_what_is_wrong_and_what_there_is(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lists_and_whole_numbers_become_what_the_field_holds():
    assert registry.model_config("swin", "tiny", depths=[2, 2, 2, 2]).depths == (2, 2, 2, 2)
    assert registry.model_config("gpt2", "tiny", dropout=0).dropout == 0.0
