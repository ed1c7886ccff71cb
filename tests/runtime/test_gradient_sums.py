"""Gradients summed over devices in a narrower type than their own: what is sent, and what comes out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import jax
import numpy as np
import optax
import pytest

from galvatron_jax.errors import PlanMismatchError
from galvatron_jax.runtime.collectives import lowered_collectives, predicted_collectives, traced_collectives
from galvatron_jax.runtime.program import StepProgram
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.trace.functional import named_leaves

from .matrix import Case, traced
from .pipelines import PipelineCase
from .reference import OPTIMIZERS, batches, either, reference, relative_difference, to_numpy
from .test_parity import TOLERANCE
from .test_pipelines import tree

SGD = optax.sgd(0.1)
ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
"""Of one number, relative."""
ROUNDINGS = 4
"""Of a gradient at most: of its summands, and of sums over one axis and another."""
ZEROS = Case("gpt2", "zeros", 4)
PIPELINE = PipelineCase("gpt2_tied_dropout", 2, Schedule.ONE_F_ONE_B, "every-kind")
CASES = [
    Case("gpt2", "dp8"),
    ZEROS,
    Case("llama", "megatron-ulysses-dp"),
    Case("gpt2_large_vocabulary", "zero3-ulysses"),
    PIPELINE,
    PipelineCase("llama", 2, Schedule.ONE_F_ONE_B_STASH, "alike"),
]
"""Every ZeRO stage, with loops over layers and without."""


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def build(
    case: Case | PipelineCase, dtype: str | None, optimizer: optax.GradientTransformation = SGD, executor: str = "local"
) -> StepProgram:
    changes = {"gradient_sum_dtype": dtype, "executor": executor}
    return build_step(traced(case.model), case.plan().model_copy(update=changes), optimizer)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_that_are_summed_take_half_the_bytes(case: Case | PipelineCase) -> None:
    step = build(case, "bfloat16")
    narrow, wide = predicted_collectives(step), predicted_collectives(build(case, None))
    assert traced_collectives(step) == narrow
    assert lowered_collectives(step) == predicted_collectives(step, once=True)
    gone, halved = wide - narrow, Counter()
    for one, count in gone.items():
        halved[dataclasses.replace(one, bytes=one.bytes // 2, dtype="bfloat16")] += count
    assert sum(halved.values()) > 8
    assert narrow - wide == halved


def test_stages_add_up_in_it_too_what_they_share() -> None:
    """GPT-2's embedding, which its head reads as well; metrics stay in float32, and so does the weight of the batch."""
    along = PIPELINE.plan().pipeline_axes
    large = [c for c in predicted_collectives(build(PIPELINE, "bfloat16")) if c.axes == along and c.bytes > 1024]
    assert {c.dtype for c in large if c.kind == "all-reduce"} == {"bfloat16"}


def first_gradients(case: Case | PipelineCase, dtype: str | None) -> dict[str, np.ndarray]:
    step = build(case, dtype, either(*OPTIMIZERS.values()))
    begin = step.from_tree(tree(case.model, either(*OPTIMIZERS.values())))
    state, _ = step(begin, batches(case.model, case.num_microbatches)[0])
    return to_numpy(named_leaves(step.to_tree(state)["opt_state"].gradients))


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("case", "dtype"), [(ZEROS, "bfloat16"), (ZEROS, "float16"), (PIPELINE, "bfloat16")], ids=str)
def test_gradients_are_those_of_one_device_but_for_rounding(case: Case | PipelineCase, dtype: str) -> None:
    wanted = reference(case.model, "sgd", case.num_microbatches).gradients
    found = first_gradients(case, dtype)
    assert {path: leaf.dtype for path, leaf in found.items()} == {path: leaf.dtype for path, leaf in wanted.items()}
    errors = {path: relative_difference(leaf, wanted[path]) for path, leaf in found.items()}
    assert max(errors.values()) < ROUNDINGS * ROUNDING[dtype], errors
    assert min(errors.values()) > TOLERANCE, errors


def test_their_own_type_changes_nothing() -> None:
    assert build(ZEROS, "float32").lowered.as_text() == build(ZEROS, None).lowered.as_text()


def test_what_cannot_be_summed_so_is_refused_before_anything_is_built() -> None:
    with pytest.raises(PlanMismatchError, match="'bfloat' is no type to sum gradients in. Did you mean 'bfloat16'"):
        build(ZEROS, "bfloat")
    with pytest.raises(PlanMismatchError, match="float64 is not narrower than the gradients, which are float32"):
        build(ZEROS, "float64")
    with pytest.raises(PlanMismatchError, match="`annotate` leaves it to XLA in which type gradients are summed"):
        build(ZEROS, "bfloat16", executor="annotate")
