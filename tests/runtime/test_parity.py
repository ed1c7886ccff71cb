"""Every kind of plan gives what one device gives: the spine of the tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galvatron_jax.runtime.step import State, Step
from galvatron_jax.trace.functional import named_leaves
from tests.models import MODELS

from .matrix import PLANS, Case, parameters
from .reference import OPTIMIZERS, Trajectory, batches, either, initial, reference, relative_difference, to_numpy

TOLERANCE = 1e-5
"""Of the norm of a difference, relative to the norm of the reference, per leaf, in fp32."""


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def differences(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Relative differences of the leaves that differ by more than the tolerance."""
    assert set(found) == set(wanted)
    errors = {}
    for path, reference_leaf in wanted.items():
        leaf = found[path]
        assert leaf.shape == reference_leaf.shape
        assert leaf.dtype == reference_leaf.dtype
        if not np.issubdtype(leaf.dtype, np.floating):
            errors[path] = 0.0 if np.array_equal(leaf, reference_leaf) else np.inf
            continue
        errors[path] = relative_difference(leaf, reference_leaf)
    return {path: error for path, error in errors.items() if not error <= TOLERANCE}


def place(step: Step, parameters: dict, model_state: dict) -> State:
    """A state made on one device, spread as the plan wants it (cheaper than compiling `Step.init`)."""
    params = step.storage.pack(parameters)
    state = {
        "params": params,
        "opt_state": step.optimizer_program.init(params),
        "model_state": model_state,
        "step": jnp.int32(0),
    }
    return jax.device_put(state, jax.tree.map(lambda s: s.sharding, step.state_shapes))


def train(step: Step, begin: State, case: Case, optimizer: str) -> Trajectory:
    """What the plan gives for what the reference does."""
    state = jax.tree.map(jnp.copy, begin)  # The step donates its argument.
    chosen = jax.device_put(np.int32(list(OPTIMIZERS).index(optimizer)), state["opt_state"].chosen.sharding)
    state["opt_state"] = state["opt_state"]._replace(chosen=chosen)
    losses, first = [], None
    for batch in batches(case.model, case.num_microbatches):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if first is None:
            first = to_numpy(named_leaves(step.to_tree(state)["opt_state"].gradients))
    assert int(state["step"]) == len(losses)
    return Trajectory(losses, first, to_numpy(step.parameters(state)), to_numpy(state["model_state"]))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("case", parameters())
def test_a_plan_trains_as_one_device_does(case: Case) -> None:
    step = case.build(either(*OPTIMIZERS.values()))
    begin = place(step, *initial(case.model))
    for optimizer in OPTIMIZERS:
        wanted = reference(case.model, optimizer, case.num_microbatches)
        found = train(step, begin, case, optimizer)
        np.testing.assert_allclose(found.losses, wanted.losses, rtol=TOLERANCE, err_msg=f"loss under {optimizer}")
        assert differences(found.gradients, wanted.gradients) == {}, "gradients"
        assert differences(found.model_state, wanted.model_state) == {}, f"state under {optimizer}"
        assert differences(found.parameters, wanted.parameters) == {}, f"parameters under {optimizer}"


@pytest.mark.parametrize("case", [Case("gpt2_tied_dropout", "zeros"), Case("batchnorm_net", "tp4-zero3")], ids=str)
def test_a_state_born_sharded_is_the_one_born_on_one_device(case: Case) -> None:
    step = case.build(optax.sgd(0.1))
    state = step.init(0)
    wanted = initial(case.model)
    assert differences(to_numpy(step.parameters(state)), to_numpy(wanted[0])) == {}
    assert differences(to_numpy(state["model_state"]), to_numpy(wanted[1])) == {}
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda s: s.sharding, step.state_shapes)


@pytest.mark.standard_promotion
def test_an_order_of_dims_between_loops_changes_no_step() -> None:
    case = Case("nnx_scan_gpt", "tp2-everywhere")
    step = case.build(either(*OPTIMIZERS.values()))
    assert "LayoutConstraint" not in step.lowered.as_text(), "on CPUs, orders are the compiler's"
    ordered = dataclasses.replace(step, executor=dataclasses.replace(step.executor, ordered=True))
    assert "LayoutConstraint" in ordered.lowered.as_text()
    begin = place(ordered, *initial(case.model))
    wanted = reference(case.model, "adamw", 1)
    found = train(ordered, begin, case, "adamw")
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=TOLERANCE)
    assert differences(found.parameters, wanted.parameters) == {}


def test_every_model_has_three_unlike_plans() -> None:
    assert set(PLANS) == set(MODELS)
    assert all(len(cycles) >= 3 for cycles in PLANS.values())
