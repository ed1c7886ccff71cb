"""States are born sharded: no device ever holds the whole model, and the values are those of one device."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax.models import gpt2
from galvatron_jax.runtime.step import Step, build_step
from galvatron_jax.trace.model import Traced, trace
from tests.runtime.matrix import CYCLES, MICROBATCH, Case, plan_of
from tests.runtime.reference import initial, to_numpy

WIDE = dataclasses.replace(
    gpt2.PRESETS["tiny"], width=256, num_heads=8, num_layers=6, vocab_size=1024, tie_embeddings=False
)


@functools.cache
def wide() -> Traced:
    """A GPT-2 of some megabytes, so that single arrays are small beside it."""

    def make(seed: int | None) -> nnx.Module:
        return gpt2.GPT2(WIDE, rngs=nnx.Rngs(jax.random.key(0 if seed is None else seed)))

    return trace(
        nnx.eval_shape(lambda: make(0)), gpt2.loss_fn, gpt2.random_batch(WIDE, MICROBATCH), make=make, name="wide"
    )


def compiled_init(step: Step) -> Any:
    shardings = jax.tree.map(lambda s: s.sharding, step.state_shapes)
    return jax.jit(functools.partial(step._init, 0), out_shardings=shardings).lower().compile()


def whole_bytes(state: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("cycle", ["tp8", "zero3-full", "tp4-zero3"])
def test_no_device_ever_holds_the_whole_model(cycle: str) -> None:
    step = build_step(wide(), plan_of(wide(), CYCLES[cycle]), optax.adamw(1e-3))
    memory = compiled_init(step).memory_analysis()
    parameters = whole_bytes(step.state_shapes["params"])
    # Adam's state makes three times the parameters.
    assert memory.output_size_in_bytes < 0.6 * parameters
    assert memory.temp_size_in_bytes < 0.35 * parameters


@pytest.mark.standard_promotion
@pytest.mark.parametrize("case", [Case("gpt2", "ulysses-with-tp"), Case("nnx_scan_gpt", "tp4-zero3")], ids=str)
def test_initial_values_are_those_of_one_device(case: Case) -> None:
    step = case.build(optax.sgd(0.1))
    found, (wanted, _) = to_numpy(step.parameters(step.init(0))), initial(case.model)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-7, err_msg=path)
