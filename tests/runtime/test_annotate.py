"""The executor `annotate` gives what the executor `local` and one device give, from the same state."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from galvatron_jax.errors import PlanMismatchError
from galvatron_jax.runtime.step import AnnotateStep, build_step
from galvatron_jax.spec.plan import Plan, Stage
from galvatron_jax.trace.functional import named_leaves

from .matrix import Case, traced
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
    one, _ = local(jax.tree.map(jax.numpy.copy, begin), first)
    two, _ = other(jax.tree.map(jax.numpy.copy, begin), first)
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
