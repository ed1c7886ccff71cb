"""Plans at many micro-batches as one are the plans at each of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from galvatron_jax.partition.layer_plan import LayerPlan
from galvatron_jax.partition.layers import plan_layer, plan_series
from galvatron_jax.search.space import Rule, SearchSpace
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from tests.runtime.matrix import MICROBATCH, traced

MESHES = ({"a": 2, "b": 2}, {"a": 3, "b": 2})
GLOBAL_BATCH = 48
EVERY = SearchSpace(disabled_rules=frozenset({Rule.ULYSSES_WITH_TP}))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5", "moe", "vit"])
def test_a_series_holds_the_plans_of_its_microbatches(family: str, mesh: dict[str, int]) -> None:
    axes = tuple(MeshAxis(name=name, size=size) for name, size in mesh.items())
    for kind in traced(family).spec.kinds:
        for strategy in EVERY.strategies(kind, mesh=axes, microbatch=GLOBAL_BATCH, pruned=Counter()):
            ways = 1
            for name in strategy.dp:
                ways *= mesh[name]
            sizes = tuple(size for size in range(1, GLOBAL_BATCH + 1) if GLOBAL_BATCH % size == 0 and size % ways == 0)
            found = plan_series(kind, strategy, mesh=mesh, microbatches=sizes, model_microbatch=MICROBATCH)
            assert tuple(size for series in found for size in series.microbatches) == sizes
            for series in found:
                for size in {series.microbatches[0], series.microbatches[len(series.microbatches) // 2]}:
                    planned = plan_layer(kind, strategy, mesh=mesh, microbatch=size, model_microbatch=MICROBATCH)
                    assert series.at(size) == _without_instructions(planned), (kind.name, strategy.short(), size)


def _without_instructions(plan: LayerPlan) -> LayerPlan:
    return replace(
        plan, forward=replace(plan.forward, instructions=()), backward=replace(plan.backward, instructions=())
    )


def test_a_range_is_split_where_choices_differ() -> None:
    """In a Swin block under Megatron-SP a product is sharded otherwise at small micro-batches than at large ones."""
    mesh, sizes = {"a": 2, "b": 2}, (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
    strategy = LayerStrategy(tp=("a", "b"), sp=("a", "b"), sp_kind=SequenceParallel.MEGATRON)
    split = 0
    for kind in traced("swin").spec.kinds:
        found = plan_series(kind, strategy, mesh=mesh, microbatches=sizes, model_microbatch=MICROBATCH)
        assert tuple(size for series in found for size in series.microbatches) == sizes
        split += len(found) > 1
        for series in found if len(found) > 1 else ():
            for size in series.microbatches:
                planned = plan_layer(kind, strategy, mesh=mesh, microbatch=size, model_microbatch=MICROBATCH)
                assert series.at(size) == _without_instructions(planned), size
    assert split
