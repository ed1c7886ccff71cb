"""Optimizers on stored arrays give what they give on the model's own, whatever the plan."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galvatron_jax.errors import InputError
from galvatron_jax.runtime.optimizer_state import flat, nested
from galvatron_jax.runtime.step import Step, build_step
from galvatron_jax.spec.strategy import LayerStrategy

from .matrix import plan_of, traced

# optax itself relies on implicit promotion, for one in Adam's bias correction.
pytestmark = pytest.mark.standard_promotion

STEPS = 3

TP4 = LayerStrategy(dp=("a",), tp=("b", "c"))
ZERO1 = LayerStrategy(dp=("a", "b", "c"), zero=1)
PLANS: dict[str, tuple[LayerStrategy, ...]] = {
    "dp8": (LayerStrategy(dp=("a", "b", "c")),),
    "zero1": (ZERO1,),
    "zero3": (LayerStrategy(dp=("a", "b", "c"), zero=3),),
    "mix": (TP4, TP4, TP4, LayerStrategy(dp=("a", "b"), tp=("c",), zero=2), ZERO1, ZERO1),
}


def matrices(parameters: Any) -> Any:
    """Decay matrices only, told by their dims."""
    return jax.tree.map(lambda x: x.ndim > 1, parameters)


def kernels(parameters: Any) -> Any:
    """Decay kernels only, told by their names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", parameters)


def groups_of_two(parameters: Any) -> Any:
    """Norms apart, told by a folder's name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norms" if any("norm" in k.key for k in path) else "rest", parameters
    )


def first_block(parameters: Any) -> Any:
    """A mask that no stacked array can follow."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[1].key == "0", parameters)


def second_block(parameters: Any) -> Any:
    """Labels of which one has but some layers of a stacked array, without the first."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "second" if path[1].key == "1" else "rest", parameters)


def warmup(peak: float) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps=2, decay_steps=10)


STORED: dict[str, optax.GradientTransformation] = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adam_bfloat16_momentum": optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "adamw_masked_by_dims": optax.adamw(1e-2, weight_decay=0.1, mask=matrices),
    "adamw_masked_by_path": optax.adamw(1e-2, weight_decay=0.1, mask=kernels),
    "lion": optax.lion(1e-3),
    "clipped_adamw": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(warmup(1e-2))),
    "multi_transform": optax.multi_transform({"norms": optax.sgd(0.1), "rest": optax.adamw(1e-2)}, groups_of_two),
    "hyperparameters": optax.inject_hyperparams(optax.adamw)(learning_rate=warmup(1e-2)),
    "lamb": optax.lamb(1e-2, weight_decay=0.1),
    "lars": optax.lars(1e-2, weight_decay=0.1, momentum=0.9),
    "block_rms": optax.chain(optax.clip_by_block_rms(0.5), optax.sgd(0.1)),
}
"""Optimizers whose update is proved to be the same on stored arrays."""

OWN: dict[str, optax.GradientTransformation] = {
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=16, momentum=0.9),
    "frozen_blocks": optax.chain(optax.masked(optax.set_to_zero(), first_block), optax.adamw(1e-2)),
    "second_block_apart": optax.multi_transform({"second": optax.adam(1e-2), "rest": optax.sgd(0.1)}, second_block),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2).gradient_transformation(),
    "noisy": optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
}
"""Optimizers that must see the model's own arrays."""

OPTIMIZERS = STORED | OWN


@functools.cache
def parameters(model: str) -> dict[str, Any]:
    return random_like(model, 0)


def random_like(model: str, seed: int) -> dict[str, np.ndarray]:
    """One array per parameter; larger for some than for others, so that norms tell them apart."""
    draws = np.random.default_rng(seed)
    return {
        path: (draws.normal(size=s.shape) * draws.uniform(0.1, 2.0)).astype(s.dtype)
        for path, s in traced(model).functional.parameters.items()
    }


@functools.cache
def expected(model: str, optimizer: str) -> tuple[dict[str, Any], Any]:
    """Parameters and state of one device that runs optax on the model's own tree."""
    own = nested(parameters(model))
    state = OPTIMIZERS[optimizer].init(own)

    @jax.jit
    def update(gradients: Any, state: Any, own: Any) -> tuple[Any, Any]:
        updates, state = OPTIMIZERS[optimizer].update(gradients, state, own)
        return optax.apply_updates(own, updates), state

    for number in range(STEPS):
        own, state = update(nested(random_like(model, number + 1)), state, own)
    return flat(own), state


def step_of(model: str, plan: str, optimizer: optax.GradientTransformation) -> Step:
    return build_step(traced(model), plan_of(traced(model), PLANS[plan]), optimizer)


def start(step: Step, model: str) -> dict[str, Any]:
    """A state whose parameters are drawn; it has none of the model's own."""
    tree = {
        "params": parameters(model),
        "opt_state": step.optimizer.init(nested(parameters(model))),
        "model_state": {},
        "step": jnp.int32(0),
    }
    return jax.jit(lambda t: step.optimizer_program.from_tree(step, t), out_shardings=shardings(step))(tree)


def shardings(step: Step) -> dict[str, Any]:
    found = jax.tree.map(lambda s: s.sharding, step.state_shapes)
    return {**found, "model_state": {}}


def trained(step: Step, model: str) -> dict[str, Any]:
    """The state after updates with drawn gradients, through the step's own optimizer program."""
    state, program = start(step, model), step.optimizer_program
    sharded = {g.key: step.sharding(g.spec(optimizer=True)) for g in step.storage.groups}
    pack = jax.jit(step.storage.pack, out_shardings=sharded)

    @functools.partial(jax.jit, out_shardings=shardings(step))
    def update(gradients: Any, state: Any) -> Any:
        params, opt_state = program.update(step, gradients, state["opt_state"], state["params"])
        return {**state, "params": params, "opt_state": opt_state, "step": state["step"] + 1}

    for number in range(STEPS):
        # One program at a time: eight virtual devices share few threads, and collectives wait for each other.
        gradients = jax.block_until_ready(pack(random_like(model, number + 1)))
        state = jax.block_until_ready(update(gradients, state))
    return state


def assert_trees_close(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        x, y = (jax.random.key_data(z) if jax.dtypes.issubdtype(z.dtype, jax.dtypes.prng_key) else z for z in (x, y))
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=2e-5, atol=2e-6, err_msg=str(path)
        )


def cases() -> list:
    """Every optimizer on every plan: all but a sample is slow."""
    sample = {"clipped_adamw", "adamw_masked_by_dims", "lamb", "adafactor"}
    return [
        pytest.param(optimizer, plan, marks=() if plan == "mix" and optimizer in sample else (pytest.mark.slow,))
        for optimizer in OPTIMIZERS
        for plan in PLANS
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_that_treat_layers_alike_are_proved_to_run_on_stored_arrays(optimizer: str) -> None:
    assert step_of("gpt2", "mix", OPTIMIZERS[optimizer]).optimizer_program.stored == (optimizer in STORED)


@pytest.mark.parametrize(("optimizer", "plan"), cases())
def test_an_optimizer_gives_on_any_plan_what_it_gives_on_one_device(optimizer: str, plan: str) -> None:
    step = step_of("gpt2", plan, OPTIMIZERS[optimizer])
    tree = step.optimizer_program.to_tree(step, trained(step, "gpt2"))
    params, state = expected("gpt2", optimizer)
    assert_trees_close(tree["params"], params)
    assert_trees_close(tree["opt_state"], state)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["clipped_adamw", "lamb", "adafactor"])
def test_slices_of_one_parameter_are_one_parameter_to_the_optimizer(optimizer: str) -> None:
    step = step_of("nnx_scan_gpt", "mix", OPTIMIZERS[optimizer])
    tree = step.optimizer_program.to_tree(step, trained(step, "nnx_scan_gpt"))
    params, state = expected("nnx_scan_gpt", optimizer)
    assert_trees_close(tree["params"], params)
    assert_trees_close(tree["opt_state"], state)
    assert step.optimizer_program.stored == (optimizer in STORED)


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("gpt2", "multi_transform"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("gpt2", "adafactor"), ("nnx_scan_gpt", "adamw_masked_by_path"), ("nnx_scan_gpt", "adafactor")]
        ),
    ],
)
def test_a_state_saved_under_one_plan_loads_under_another_exactly(model: str, optimizer: str) -> None:
    steps = {name: step_of(model, name, OPTIMIZERS[optimizer]) for name in ("dp8", "mix", "zero3")}
    first = steps["dp8"].optimizer_program.to_tree(steps["dp8"], trained(steps["dp8"], model))
    tree = first
    for name in ("mix", "zero3", "dp8"):
        step = steps[name]
        load = jax.jit(lambda t, step=step: step.optimizer_program.from_tree(step, t), out_shardings=shardings(step))
        tree = step.optimizer_program.to_tree(step, load(jax.tree.map(np.asarray, tree)))
    assert jax.tree.structure(tree) == jax.tree.structure(first)
    assert jax.tree.structure(tree["opt_state"]) == jax.tree.structure(
        OPTIMIZERS[optimizer].init(nested(parameters(model)))
    )
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(first), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_state_on_stored_arrays_is_sharded_as_the_optimizer_wants_it() -> None:
    step = step_of("gpt2", "zero1", OPTIMIZERS["clipped_adamw"])
    slots, others = step.optimizer_program.layout.split(step.state_shapes["opt_state"])
    assert [set(slot) for slot in slots] == [{g.key for g in step.storage.groups}] * 2  # mu, nu
    for slot in slots:
        for group in step.storage.groups:
            assert slot[group.key].shape == group.stored_shape
            assert slot[group.key].sharding.spec == group.spec(optimizer=True)
    assert others
    assert all(leaf.sharding.is_fully_replicated for leaf in others.values())


def test_state_on_the_models_own_arrays_is_sharded_where_a_dim_can_say_it() -> None:
    step = step_of("gpt2", "zero1", OPTIMIZERS["multi_steps"])
    state = flat(step.state_shapes["opt_state"].inner_opt_state[0].mu)
    assert all(leaf.shape == parameters("gpt2")[path].shape for path, leaf in state.items())
    sharded = {path for path, leaf in state.items() if not leaf.sharding.is_fully_replicated}
    assert {path for path in state if path.endswith("kernel")} <= sharded


def test_labels_that_are_named_as_parameters_do_not_confuse_the_state() -> None:
    label = next(iter(nested(parameters("gpt2"))))
    optimizer = optax.multi_transform({label: optax.adam(1e-2)}, lambda p: jax.tree.map(lambda _: label, p))
    step = step_of("gpt2", "dp8", optimizer)
    assert step.optimizer_program.stored
    slots, others = step.optimizer_program.layout.split(step.state_shapes["opt_state"])
    assert len(slots) == 2
    assert len(others) == 1


def test_the_log_says_why_an_optimizer_needs_the_models_own_arrays(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="galvatron_jax"):
        assert not step_of("gpt2", "dp8", OPTIMIZERS["frozen_blocks"]).optimizer_program.stored
    assert "are not updated alike" in caplog.text


def test_an_optimizer_that_wants_more_than_gradients_is_refused_by_name() -> None:
    step = step_of("gpt2", "dp8", optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()))
    with pytest.raises(InputError, match="optimizer does not run.*value"):
        _ = step.optimizer_program


def test_an_optimizer_made_for_another_tree_is_refused() -> None:
    step = step_of("gpt2", "dp8", optax.masked(optax.sgd(0.1), {"other": True}))
    with pytest.raises(InputError, match="optimizer does not run on the model's parameters"):
        _ = step.optimizer_program


def test_nesting_is_undone_by_flattening_and_refuses_paths_through_leaves() -> None:
    leaves = {"a/0/kernel": 1, "a/1/kernel": 2, "b": 3}
    assert flat(nested(leaves)) == leaves
    for clash in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}):
        with pytest.raises(InputError, match="path of another"):
            nested(clash)
