"""When XLA's GPU compiler scatters gradients."""

from __future__ import annotations

from typing import Any

import jax
import optax
import pytest
from flax import nnx

import galvatron_jax.partition.layers as layers
from galvatron_jax.models import gpt2
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Stage
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.trace.model import trace
from galvatron_jax.verify.targets import target_devices

from .compiler import needs_compiler

pytestmark = [pytest.mark.standard_promotion, needs_compiler]
BATCH, LAYERS, WIDTH = 8, 4, 512


def temporary_bytes() -> int:
    """Of a step of blocks whose parameters take more than their activations, under ZeRO 3."""
    config = gpt2.GPT2Config(
        vocab_size=512, seq_length=64, width=WIDTH, num_layers=LAYERS, num_heads=8, mlp_width=4 * WIDTH
    )

    def make(seed: Any) -> nnx.Module:
        return gpt2.GPT2(config, rngs=nnx.Rngs(jax.random.key(seed)))

    model = nnx.eval_shape(lambda: make(0))
    traced = trace(model, gpt2.loss_fn, gpt2.example_batch(config, BATCH), make=make, name="gpt2")
    strategy = LayerStrategy(dp=("a", "b", "c"), zero=3)
    whole = LayerGroup(start=0, stop=len(traced.spec.layers), strategy=strategy)
    plan = Plan(
        model=traced.spec.name,
        mesh=tuple(MeshAxis(name=name, size=2) for name in "abc"),
        global_batch=BATCH,
        num_microbatches=1,
        stages=(Stage(groups=(whole,)),),
        batch_axes=strategy.dp,
    )
    step = build_step(traced, plan, optax.sgd(0.1), devices=target_devices("h100", 8))
    return step.compiled.memory_analysis().temp_size_in_bytes


def test_a_loop_holds_fewer_whole_gradients_where_some_are_scattered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = temporary_bytes()
    monkeypatch.setattr(layers, "scattered_late", frozenset)
    late = temporary_bytes()
    # Of 12 WIDTH^2 parameters in float32, the 8 WIDTH^2 of the MLP, carried and copied.
    assert late - found > 8 * WIDTH**2 * 4
