"""What a plan is predicted to hold between steps is, to the byte, what the compiled step takes as arguments."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.planner import default_planner
from galvatron_jax.cost.step import plan_memory, price_plan
from galvatron_jax.runtime.step import Step, build_step
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.trace.model import trace
from tests.runtime.matrix import CYCLES, MICROBATCH, PLANS, Case, plan_of, traced
from tests.runtime.pipelines import MIXES, PipelineCase

from .budgets import BUDGETS, MODEL, OPTIMIZER, chosen

SAMPLE = {
    "gpt2-tp4-zero3", "gpt2_tied_dropout-zeros-m4", "llama_tp_over_kv-tp8", "unet-zero3-full", "batchnorm_net-zeros-m4",
    "nnx_scan_gpt-tp4-zero3", "linen_vit-zeros",
}  # fmt: skip
"""What runs without `slow`."""

CASES = [Case(model, cycle) for model, cycles in PLANS.items() for cycle in cycles[:3]] + [
    Case("gpt2_tied_dropout", "zeros", 4),
    Case("batchnorm_net", "zeros", 4),
    Case("t5", "zeros", 4),
]

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(1e-3, mu_dtype=jnp.bfloat16),
    "schedule": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 100), weight_decay=0.1)
    ),
}


def predicted_bytes(step: Step) -> int:
    """The plan's arguments on each device, as the cost model has them."""
    model = step.traced.spec
    memory = optimizer_memory(step.optimizer, model)
    plan, cluster = step.plan, cluster_preset("h100x8")
    costs = CostModel.build(
        model, cluster=cluster, mesh=plan.mesh, profile=None, optimizer=memory, planner=default_planner()
    )
    batching = Batching(plan.global_batch, plan.num_microbatches, plan.batch_axes)
    return plan_memory(costs, plan.strategies, batching).argument_bytes


def compiled_bytes(step: Step) -> int:
    """The same, as XLA has them."""
    return step.compiled.memory_analysis().argument_size_in_bytes


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=() if str(c) in SAMPLE else (pytest.mark.slow,)) for c in CASES]
)
def test_the_arguments_of_a_plan_are_those_of_the_compiled_step(case: Case) -> None:
    step = case.build(optax.adamw(1e-3))
    assert predicted_bytes(step) == compiled_bytes(step)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_arguments_are_exact_for_other_optimizers(name: str) -> None:
    step = Case("plain_mlp", "zeros").build(OPTIMIZERS[name])
    assert predicted_bytes(step) == compiled_bytes(step)


STAGED = {"swin": optax.adamw(1e-3), "llama": optax.lion(1e-3, mu_dtype=jnp.bfloat16)}
"""Optimizer by model; one has slots of another dtype than the parameters."""


@pytest.mark.standard_promotion
@pytest.mark.parametrize("mix", MIXES[2])
@pytest.mark.parametrize("model", STAGED)
def test_the_arguments_of_stages_are_the_flat_arrays_of_the_longest(model: str, mix: str) -> None:
    step = PipelineCase(model, 2, Schedule.ONE_F_ONE_B, mix).build(STAGED[model])
    spec = step.traced.spec
    found = price_plan(
        spec, step.plan, cluster=cluster_preset("h100x8"), optimizer=optimizer_memory(step.optimizer, spec)
    )
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((step.state_shapes, step.batch_shapes))
    )
    assert {memory.argument_bytes for memory in found.memory} == {held}


class WithSpares(nnx.Module):
    """Has a parameter, a variable and random keys that the loss never reads."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.used = nnx.Linear(16, 16, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=rngs)
        self.spare = nnx.Linear(24, 8, rngs=rngs)
        self.history = nnx.Variable(jnp.zeros((3, 5)))
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.used(x).astype(jnp.float32)


@pytest.mark.standard_promotion
def test_what_the_loss_does_not_read_is_counted_too() -> None:
    batch = {"x": np.ones((MICROBATCH, 16), np.float32), "unread": np.ones((MICROBATCH, 7), np.float32)}
    model = trace(WithSpares(rngs=nnx.Rngs(0)), lambda m, b: m(b["x"]).mean(), batch, name="spares")
    plan = plan_of(model, CYCLES["zeros"])
    step = build_step(model, plan, optax.adam(1e-3))
    assert predicted_bytes(step) == compiled_bytes(step)
    assert compiled_bytes(step) > 3 * 4 * (24 * 8 + 8) + 4 * 3 * 5


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "budget", [pytest.param(b, marks=() if b == BUDGETS[3] else (pytest.mark.slow,)) for b in BUDGETS]
)
def test_the_arguments_of_plans_that_the_search_chooses_are_exact(budget: int) -> None:
    plan = chosen(budget).plan
    model = traced(MODEL, plan.global_batch // plan.num_microbatches)
    step = build_step(model, plan, OPTIMIZER)
    assert plan.prediction is not None
    assert plan.prediction.memory[0].argument_bytes == compiled_bytes(step)
