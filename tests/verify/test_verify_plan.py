"""Plans compiled by XLA's GPU compiler, beside what was predicted."""

from __future__ import annotations

from typing import Any

import optax
import pytest
from flax import nnx

from galvatron_jax.api import auto_shard
from galvatron_jax.api.verification import verify_plan
from galvatron_jax.errors import PlanMismatchError
from galvatron_jax.models import gpt2
from galvatron_jax.report.text import render
from galvatron_jax.report.verifications import verification_report, verified_table
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from galvatron_jax.verify.verification import Verification

from .compiler import needs_compiler

pytestmark = pytest.mark.standard_promotion

CONFIG = gpt2.GPT2Config(vocab_size=512, seq_length=64, width=128, num_layers=2, num_heads=8, mlp_width=256)
LAYERS = 4
"""Embedding, two blocks, head."""
BATCH = 16
FLOPS = 6 * BATCH * 64 * (2 * (4 * 128 * 128 + 2 * 128 * 256) + 128 * 512) + 12 * 2 * BATCH * 64 * 64 * 128
"""Of matrix products: 6 per parameter and token, and attention's 12 per layer, pair of tokens and feature."""


def stage(start: int, stop: int, strategy: LayerStrategy) -> Stage:
    return Stage(groups=(LayerGroup(start=start, stop=stop, strategy=strategy),))


def plan(strategy: LayerStrategy, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "model": "gpt2",
        "mesh": tuple(MeshAxis(name=name, size=2) for name in "abc"),
        "global_batch": BATCH,
        "num_microbatches": 2,
        "stages": (stage(0, LAYERS, strategy),),
        "batch_axes": strategy.dp,
    }
    return Plan(**(fields | changes))


def verify(given: Plan, **options: Any) -> Verification:
    model = auto_shard(gpt2.GPT2)(CONFIG, rngs=nnx.Rngs(0))
    batch = gpt2.example_batch(CONFIG, BATCH)
    return verify_plan(model, gpt2.loss_fn, optax.adamw(1e-3), batch, plan=given, target="h100x8", **options)


MEGATRON = LayerStrategy(dp=("a",), tp=("b", "c"), sp=("b", "c"), sp_kind=SequenceParallel.MEGATRON, zero=1)


@needs_compiler
def test_a_plan_is_compiled_beside_its_prediction() -> None:
    found = verify(plan(MEGATRON))
    assert found.fits
    assert found.memory.argument_bytes == found.prediction.largest.argument_bytes
    assert found.memory.peak_bytes > found.memory.argument_bytes
    by_group = {(check.operation, check.axes): check for check in found.collectives}
    gathers = by_group["all-gather", ("b", "c")]
    assert gathers.members == 4
    assert gathers.as_predicted
    assert gathers.compiled.bytes > 0
    assert by_group["reduce-scatter", ("b", "c")].as_predicted
    span = found.replay
    assert span.flops == pytest.approx(FLOPS / 8, rel=0.02)
    assert span.compute_s + span.exposed_s == pytest.approx(span.seconds)
    assert span.communication_s > 0
    text = render([*verification_report(found), verified_table([found])])
    for expected in ("8 × NVIDIA H100", "reduce-scatter", "fits", "step, replayed", "of that exposed"):
        assert expected in text


@needs_compiler
def test_a_peak_over_the_budget_does_not_fit() -> None:
    found = verify(plan(LayerStrategy(dp=("a", "b", "c")), num_microbatches=1), memory_per_device="1MiB")
    assert not found.fits
    assert "DOES NOT FIT" in render(verification_report(found))


@needs_compiler
@pytest.mark.slow
def test_the_turns_of_a_pipeline_are_replayed_by_its_schedule() -> None:
    """All groups of devices run at once, so that a step takes less than all stages' work in a row."""
    strategy = LayerStrategy(dp=("b", "c"))
    given = plan(
        strategy,
        stages=(stage(0, 2, strategy), stage(2, LAYERS, strategy)),
        pipeline_axes=("a",),
        schedule=Schedule.ONE_F_ONE_B_STASH,
        num_microbatches=4,
    )
    found = verify(given)
    alone = FLOPS / 8
    # The head makes the second stage's the larger share.
    assert alone < found.replay.flops < 2.2 * alone
    assert {check.operation for check in found.collectives} >= {"collective-permute", "all-reduce"}
    assert all(check.as_predicted for check in found.collectives if check.operation == "collective-permute")


@needs_compiler
def test_a_plan_for_other_devices_or_another_batch_is_refused() -> None:
    fewer = plan(LayerStrategy(dp=("a", "b")), mesh=tuple(MeshAxis(name=name, size=2) for name in "ab"))
    with pytest.raises(PlanMismatchError, match="devices"):
        verify(fewer)
    with pytest.raises(PlanMismatchError, match="32 examples per step"):
        verify(plan(MEGATRON, global_batch=32))
