"""What XLA's GPU compiler has in memory while layers in a loop work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import galvatron_jax.partition.layers as layers
from galvatron_jax.models import gpt2, t5
from galvatron_jax.runtime.execution import Executor
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Stage
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.trace.model import trace
from galvatron_jax.verify.targets import target_devices

from .compiler import needs_compiler

pytestmark = [pytest.mark.standard_promotion, needs_compiler]
BATCH, WIDTH, HEADS = 8, 512, 8
GPT = gpt2.GPT2Config(
    vocab_size=512, seq_length=64, width=WIDTH, num_layers=4, num_heads=HEADS, mlp_width=4 * WIDTH
)  # fmt: skip
T5 = t5.T5Config(
    num_encoder_layers=2, num_decoder_layers=2, num_heads=HEADS, head_dim=96, dtype="bfloat16", param_dtype="bfloat16"
)  # fmt: skip


def memory(family: Any, model: Any, config: Any, strategy: LayerStrategy) -> Any:
    """Of a step of one micro-batch."""

    def make(seed: Any) -> nnx.Module:
        return model(config, rngs=nnx.Rngs(jax.random.key(seed)))

    shapes = nnx.eval_shape(lambda: make(0))
    traced = trace(shapes, family.loss_fn, family.example_batch(config, BATCH), make=make, name="model")
    whole = LayerGroup(start=0, stop=len(traced.spec.layers), strategy=strategy)
    plan = Plan(
        model="model",
        mesh=tuple(MeshAxis(name=name, size=2) for name in "abc"),
        global_batch=BATCH,
        num_microbatches=1,
        stages=(Stage(groups=(whole,)),),
        batch_axes=strategy.dp,
    )
    step = build_step(traced, plan, optax.adamw(1e-3), devices=target_devices("h100", 8))
    return step.compiled.memory_analysis()


def test_a_loop_holds_fewer_whole_gradients_where_some_are_scattered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = LayerStrategy(dp=("a", "b", "c"), zero=3)
    found = memory(gpt2, gpt2.GPT2, GPT, strategy).temp_size_in_bytes
    monkeypatch.setattr(layers, "scattered_late", frozenset)
    late = memory(gpt2, gpt2.GPT2, GPT, strategy).temp_size_in_bytes
    # Of 12 WIDTH^2 parameters in float32, the 8 WIDTH^2 of the MLP, carried and copied.
    assert late - found > 8 * WIDTH**2 * 4


def test_a_loop_does_not_hold_what_the_next_one_is_to_add_to(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = LayerStrategy(dp=("a", "b"), tp=("c",), zero=1)
    found = memory(t5, t5.T5, T5, strategy).peak_memory_in_bytes
    monkeypatch.setattr(Executor, "_zero_after", lambda self, waits: jnp.zeros(()))
    early = memory(t5, t5.T5, T5, strategy).peak_memory_in_bytes
    # As much as the gradient of the encoder's relative positions, of the heads that a device has.
    assert early - found > 0.99 * (HEADS // 2) * T5.encoder_length**2 * 4
