"""What a scatter into zeros makes is local where its rows are sharded: no device holds a whole vocabulary."""

from __future__ import annotations

import pytest

from galvatron_jax.partition.instructions import Apply
from galvatron_jax.partition.layers import plan_local
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from tests.runtime.matrix import MICROBATCH, traced

MESH = {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize("name", ["gpt2", "llama", "linen_llama"])
@pytest.mark.parametrize("layer", [0, -1], ids=["embedding", "head"])
def test_gradients_of_a_sharded_vocabulary_are_made_in_shards(name: str, layer: int) -> None:
    model = traced(name)
    kind = model.spec.layers[layer].kind
    strategy = LayerStrategy(dp=("a",), tp=("b", "c"))
    local = plan_local(model.spec.kinds[kind], strategy, mesh=MESH, microbatch=MICROBATCH, model_microbatch=MICROBATCH)
    flat = model.programs[kind].flat
    scatters = [
        (flat.avals[flat.operations[i.operation].results[0]].shape, i.shapes[0])
        for i in local.backward
        if isinstance(i, Apply) and flat.operations[i.operation].primitive.name == "scatter-add" and i.shifts
    ]
    assert scatters
    for whole, mine in scatters:
        assert any(4 * m == w for m, w in zip(mine, whole, strict=True)), (whole, mine)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_sharded_sequence_makes_its_own_part_of_the_logits_gradient(name: str) -> None:
    """Targets are whole along the sequence, and so is what they are picked by; what they are scattered into is not."""
    model = traced(name)
    kind = model.spec.layers[-1].kind
    strategy = LayerStrategy(dp=("a",), sp=("b", "c"), sp_kind=SequenceParallel.ULYSSES)
    local = plan_local(model.spec.kinds[kind], strategy, mesh=MESH, microbatch=MICROBATCH, model_microbatch=MICROBATCH)
    flat = model.programs[kind].flat
    scatters = [
        (flat.avals[flat.operations[i.operation].results[0]].shape, i.shapes[0])
        for i in local.backward
        if isinstance(i, Apply) and flat.operations[i.operation].primitive.name == "scatter-add"
    ]
    large = [(whole, mine) for whole, mine in scatters if len(whole) == 3]
    assert large
    for (batch, length, _), mine in large:
        assert mine[:2] == (batch // 2, length // 4)
