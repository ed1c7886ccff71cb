"""The executor `annotate` gives what the executor `local` and one device give, from the same state."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax.errors import PlanMismatchError
from galvatron_jax.runtime.step import AnnotateStep, build_step
from galvatron_jax.spec.plan import Plan, Stage
from galvatron_jax.trace.functional import named_leaves
from galvatron_jax.trace.model import trace

from .matrix import CYCLES, Case, plan_of, traced
from .reference import OPTIMIZERS, batches, either, initial, reference, to_numpy
from .test_parity import TOLERANCE, differences, place, train

FAST = (Case("gpt2", "megatron-ulysses-dp"), Case("llama", "zero3-full"), Case("t5", "megatron-ulysses-dp"))
SLOW = (
    Case("swin", "tp4-zero3"),
    Case("moe", "remats"),
    Case("gpt2_tied_dropout", "zeros", 4),
    Case("nnx_scan_gpt", "zeros", 4),
    Case("batchnorm_net", "zeros", 4),
    Case("llama_tp_over_kv", "tp8"),
    Case("mamba", "tp4-zero3"),
)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def annotated(plan: Plan) -> Plan:
    """The same plan for the other executor."""
    return plan.model_copy(update={"executor": "annotate"})


@pytest.mark.standard_promotion
@pytest.mark.parametrize("case", [*map(str, FAST), *(pytest.param(str(case), marks=pytest.mark.slow) for case in SLOW)])
def test_the_annotate_executor_trains_as_one_device_does(case: str) -> None:
    chosen = next(c for c in (*FAST, *SLOW) if str(c) == case)
    step = build_step(traced(chosen.model), annotated(chosen.plan()), either(*OPTIMIZERS.values()))
    assert isinstance(step, AnnotateStep)
    begin = place(step, *initial(chosen.model))
    wanted = reference(chosen.model, "adamw", chosen.num_microbatches)
    found = train(step, begin, chosen, "adamw")
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=TOLERANCE)
    assert not differences(found.gradients, wanted.gradients)
    assert not differences(found.parameters, wanted.parameters)


@pytest.mark.standard_promotion
def test_both_executors_agree_and_share_their_state() -> None:
    case = Case("gpt2", "zeros")
    local = case.build(OPTIMIZERS["adamw"])
    other = build_step(traced(case.model), annotated(case.plan()), OPTIMIZERS["adamw"])
    assert local.state_shapes == other.state_shapes
    begin = place(local, *initial(case.model))
    first, second, _ = batches(case.model, 1)
    one, _ = local(jax.tree.map(jnp.copy, begin), first)
    two, _ = other(jax.tree.map(jnp.copy, begin), first)
    there, after_one = other(other.from_tree(local.to_tree(one)), second)
    back, after_two = local(two, second)
    np.testing.assert_allclose(after_one["loss"], after_two["loss"], rtol=TOLERANCE)
    assert not differences(*(to_numpy(named_leaves(s.parameters(x))) for s, x in ((other, there), (local, back))))


def test_several_stages_are_refused() -> None:
    plan = annotated(Case("gpt2", "dp8").plan())
    groups = plan.stages[0].groups
    halves = tuple(Stage(groups=part) for part in (groups[:1], groups[1:]))
    plan = plan.model_copy(update={"stages": halves})
    with pytest.raises(PlanMismatchError, match="annotate"):
        build_step(traced("gpt2"), plan, OPTIMIZERS["sgd"])


class Mixing(nnx.Module):
    """A block with an operation that has no sharding rule."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        lower = 2 * jnp.eye(16) + jnp.tri(16)
        return x + jax.lax.linalg.triangular_solve(lower, self.linear(x), left_side=False, lower=True)


class Mixer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([Mixing(rngs) for _ in range(3)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.standard_promotion
def test_operations_without_a_rule_run_in_both() -> None:
    def loss_fn(model: Mixer, batch: dict) -> jax.Array:
        return jnp.mean(model(batch["x"]) ** 2)

    def make(_: int | None) -> Mixer:
        return Mixer(nnx.Rngs(0))

    batch = {"x": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)}
    model = trace(nnx.eval_shape(lambda: make(0)), loss_fn, batch, make=make, name="mixer")
    assert any(not op.known for kind in model.spec.kinds for op in kind.program.operations)
    plan = plan_of(model, CYCLES["tp4-zero3"])
    values, optimizer = [], optax.sgd(0.1)
    for chosen in (plan, annotated(plan)):
        step = build_step(model, chosen, optimizer)
        state, metrics = step(step.init(0), batch)
        values.append((metrics["loss"], to_numpy(step.parameters(state))))
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=TOLERANCE)
    assert not differences(values[1][1], values[0][1])


@pytest.mark.standard_promotion
def test_data_parallelism_gathers_nothing() -> None:
    step = build_step(traced("gpt2"), annotated(Case("gpt2", "dp8").plan()), OPTIMIZERS["adamw"])
    text = step.compiled.as_text()
    assert " all-reduce(" in text
    assert " all-gather(" not in text
