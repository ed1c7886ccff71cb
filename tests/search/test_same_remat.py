"""Rematerialisation policies that are the same for a layer are asked for once, and nothing is lost by it."""

from __future__ import annotations

import pytest

from galvatron_jax.search import OptimizerMemory, Rule, SearchResult, SearchSpace, search
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.strategy import Remat
from tests.runtime.matrix import traced

ADAM = OptimizerMemory(("same", "same"), 4)


def find(memory: int, **space) -> SearchResult:
    return search(
        traced("gpt2").spec, cluster_preset("h100x8"), global_batch=64, memory_bytes=memory, optimizer=ADAM,
        space=SearchSpace(num_microbatches=(1, 2, 4), **space), runners_up=False,
    )  # fmt: skip


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5])
def test_asking_once_finds_as_fast_a_plan_among_fewer(share: float) -> None:
    memory = int(share * find(2**40).prediction.peak_bytes)
    once = find(memory, disabled_rules=frozenset({Rule.AXES_ON_DEMAND}))
    every = find(memory, disabled_rules=frozenset({Rule.AXES_ON_DEMAND, Rule.SAME_REMAT}))
    assert once.prediction.time.step_s == pytest.approx(every.prediction.time.step_s, rel=1e-12)
    assert once.statistics.options < every.statistics.options
    assert dict(once.statistics.pruned)[Rule.SAME_REMAT] > 0
    assert Rule.SAME_REMAT not in dict(every.statistics.pruned)


def test_an_embedding_takes_the_only_policy_that_is_allowed() -> None:
    plan = find(2**40, remat=(Remat.FULL,)).plan
    assert {strategy.remat for strategy in plan.strategies} == {Remat.FULL}
