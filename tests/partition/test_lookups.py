"""Tables of embeddings over ZeRO's axes: looked up and added to where they are stored, where that moves fewer bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from galvatron_jax.models import registry
from galvatron_jax.partition.layer_plan import LayerPlan, PhasePlan
from galvatron_jax.partition.layers import plan_layer, plan_series
from galvatron_jax.runtime.selfcheck import self_check
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel
from galvatron_jax.trace.model import Traced, trace

MESH = {"a": 2, "b": 2, "c": 2}
AXES = ("a", "b", "c")
LENGTH, WIDTH = 32, 64
"""Of the tiny Llama, in elements of 4 bytes."""

pytestmark = pytest.mark.standard_promotion


def traced(vocabulary: int, **changes: str) -> Traced:
    family = registry.family("llama")
    config = registry.model_config("llama", "tiny", vocab_size=vocabulary, **changes)
    model = nnx.eval_shape(lambda: family.model(config, rngs=nnx.Rngs(0)))
    return trace(model, family.loss_fn, family.example_batch(config, 8))


def planned(model: Traced, strategy: LayerStrategy, microbatch: int = 8, layer: int = 0) -> LayerPlan:
    kind = model.spec.kinds[model.spec.layers[layer].kind]
    return plan_layer(kind, strategy, mesh=MESH, microbatch=microbatch, model_microbatch=8)


def sent(phase: PhasePlan) -> list[tuple[str, int]]:
    return [(c.kind.value, c.bytes) for c in phase.collectives]


def test_few_tokens_are_looked_up_where_rows_are_stored() -> None:
    tokens = 8 * LENGTH
    plan = planned(traced(8 * tokens), LayerStrategy(dp=AXES, zero=3))
    rows = tokens * WIDTH * 4
    assert sent(plan.forward) == [("all-gather", tokens * 4), ("reduce-scatter", rows)]
    assert ("all-gather", rows) in sent(plan.backward)
    assert all(kind == "all-gather" for kind, _ in sent(plan.backward))
    (table,) = plan.parameters
    assert table.accumulator_bytes == 8 * tokens * WIDTH * 4 // 8
    assert table.sync == ()


def test_many_tokens_are_looked_up_in_the_whole_table() -> None:
    vocabulary = 2 * LENGTH
    plan = planned(traced(vocabulary), LayerStrategy(dp=AXES, zero=3))
    table = vocabulary * WIDTH * 4
    assert sent(plan.forward) == [("all-gather", table)]
    assert sent(plan.backward) == [("reduce-scatter", table)]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_whole_tables_are_looked_up_in_place(zero: int) -> None:
    """Up to ZeRO 2 devices have whole tables; from 2 on gradients are scattered in each micro-batch."""
    plan = planned(traced(2048), LayerStrategy(dp=AXES, zero=zero))
    assert sent(plan.forward) == []
    assert bool(plan.backward.collectives) == (zero == 2)
    assert all(c.kind is CollectiveKind.ALL_GATHER for c in plan.backward.collectives)


STRATEGIES = [
    LayerStrategy(dp=AXES, zero=2),
    LayerStrategy(dp=AXES, zero=3),
    LayerStrategy(dp=AXES, zero=3, remat=Remat.FULL),
    LayerStrategy(dp=("a", "b"), tp=("c",), zero=3),
    LayerStrategy(dp=("a",), tp=("b", "c"), sp=("b", "c"), sp_kind=SequenceParallel.MEGATRON, zero=3),
    LayerStrategy(dp=("a",), sp=("b", "c"), sp_kind=SequenceParallel.ULYSSES, zero=3, remat=Remat.FULL),
    LayerStrategy(dp=("a",), sp=("b",), tp=("c",), sp_kind=SequenceParallel.ULYSSES, zero=2),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=LayerStrategy.short)
def test_what_is_looked_up_in_shards_is_what_one_device_looks_up(strategy: LayerStrategy) -> None:
    model = traced(4096)
    found = self_check(model, model.spec.layers[0].kind, strategy, mesh=MESH)
    assert {"scatter-add", "gather"} <= {check.primitive for check in found}
    assert max(check.error for check in found) < 1e-4


def test_sums_of_another_type_than_the_table_are_made_in_shards() -> None:
    """Rows are added up in bfloat16, the table's gradient is in float32: it is converted where it is."""
    model = traced(4096, dtype="bfloat16", param_dtype="float32")
    strategy = LayerStrategy(dp=AXES, zero=3)
    plan = planned(model, strategy)
    assert {c.dtype for phase in (plan.forward, plan.backward) for c in phase.collectives} == {"bfloat16", "int32"}
    found = self_check(model, model.spec.layers[0].kind, strategy, mesh=MESH)
    assert max(check.error for check in found) < 0.02


@pytest.mark.parametrize("strategy", STRATEGIES, ids=LayerStrategy.short)
def test_series_change_ways_where_plans_do(strategy: LayerStrategy) -> None:
    model, sizes = traced(2048), tuple(range(8, 136, 8))
    kind = model.spec.kinds[model.spec.layers[0].kind]
    found = plan_series(kind, strategy, mesh=MESH, microbatches=sizes, model_microbatch=8)
    assert tuple(size for series in found for size in series.microbatches) == sizes
    ways = set()
    for series in found:
        for size in series.microbatches:
            one, many = planned(model, strategy, size), series.at(size)
            assert sent(many.forward) == sent(one.forward)
            assert sent(many.backward) == sent(one.backward)
            ways.add(tuple(tuple(kind for kind, _ in sent(phase)) for phase in (one.forward, one.backward)))
    assert len(ways) > 1


class Bag(nnx.Module):
    """Looks tokens up and holds their sum against a table, all in one layer."""

    def __init__(self, vocabulary: int, *, tied: bool, rngs: nnx.Rngs):
        self.tied = tied
        self.embed = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jnp.tanh(self.embed(tokens).sum(axis=1))
        return self.embed.attend(x) if self.tied else self.head(x)


def _bag_loss(model: Bag, batch: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean(jnp.square(model(batch["tokens"])))


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_are_read_whole_elsewhere_are_gathered(tied: bool) -> None:
    batch = {"tokens": jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)}
    model = trace(nnx.eval_shape(lambda: Bag(2048, tied=tied, rngs=nnx.Rngs(0))), _bag_loss, batch)
    (layer,) = model.spec.layers
    plan = planned(model, LayerStrategy(dp=AXES, zero=3))
    table, rows = ("all-gather", 2048 * WIDTH * 4), ("reduce-scatter", 8 * LENGTH * WIDTH * 4)
    # Untied, the head's weight is as large.
    assert sent(plan.forward).count(table) == 1
    assert (rows in sent(plan.forward)) is not tied
    found = self_check(model, layer.kind, LayerStrategy(dp=AXES, zero=3), mesh=MESH)
    assert max(check.error for check in found) < 1e-4
