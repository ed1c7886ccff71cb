"""Pricing layers in full on some axes only: nothing is found that is slower, as stand-ins bound what is left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.pipeline import stage_wirings
from galvatron_jax.cost.planner import default_planner
from galvatron_jax.search import Rule, SearchSpace, search
from galvatron_jax.search.chain import Chain, Options
from galvatron_jax.search.layers import solve
from galvatron_jax.search.shortlist import Bound, BoundedLayer
from galvatron_jax.search.space import axes_of, meshes_for
from galvatron_jax.search.stand_ins import BoundingTables, OpenedTables
from galvatron_jax.search.tables import COLUMNS, Table, TableBuilder
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.strategy import LayerStrategy, Remat
from tests.runtime.matrix import PLANS, traced
from tests.search.questions import ADAM

SPACE = SearchSpace(num_microbatches=(1, 4), pipeline_degrees=None, disabled_rules=frozenset({Rule.TP_ACROSS_NODES}))
WHOLE = replace(SPACE, disabled_rules=SPACE.disabled_rules | {Rule.AXES_ON_DEMAND})
CLUSTER, BATCH = cluster_preset("h100x8"), 64
NOTHING = LayerStrategy()
SAMPLE = ("gpt2", "llama", "t5", "moe", "swin", "batchnorm_net")


def costs_of(model: str, *, staged: bool) -> CostModel:
    """On eight devices, or on four for one of two stages."""
    mesh = meshes_for(CLUSTER)[0]
    return CostModel.build(
        traced(model).spec, cluster=CLUSTER, mesh=mesh[1:] if staged else mesh, profile=None, optimizer=ADAM,
        planner=default_planner(), pipeline_axes=mesh[:1] if staged else (), microbatches=(16, 64),
    )  # fmt: skip


def named(models: tuple[str, ...]) -> list:
    return [pytest.param(model, marks=() if model in SAMPLE else (pytest.mark.slow,)) for model in models]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("model", named(tuple(PLANS)))
def test_no_option_much_undercuts_the_plain_ones_on_its_axes(model: str, count: int) -> None:
    """In seconds of a step; and none keeps less than all devices together.

    In models as small as these, links' latency and what is written to memory let a few be faster: ZeRO 2 scatters what
    tensor parallelism sums up anyway, and a policy that repeats may choose other layouts.
    """
    costs, batching = costs_of(model, staged=False), Batching(BATCH, count, ())
    opened, whole = OpenedTables(costs, SPACE), TableBuilder(costs, SPACE)
    for slot in dict.fromkeys(opened.slots):
        plain, closed = opened.table(slot, batching), opened.closed(slot.wiring.kind, batching)
        every = whole.table(whole.slot(slot.wiring, slot.handed_on), batching)
        least = opened.least(slot.wiring).memory
        fastest = {axes: seconds(plain, count)[options].min() for axes, options in closed.items()}
        for index, strategy in enumerate(every.strategies):
            if axes_of(strategy) in closed:
                assert seconds(every, count)[index] >= fastest[axes_of(strategy)] * 0.9, strategy
            assert every.static_bytes[index] >= least.static_bytes


@pytest.mark.parametrize("model", named(tuple(PLANS)))
def test_nothing_in_a_stage_undercuts_its_stand_in(model: str) -> None:
    """In what is kept and sent once, and but for trifles forward and backward together."""
    costs, batching = costs_of(model, staged=True), Batching(BATCH, 4, ())
    bounding, whole = BoundingTables(costs, SPACE), TableBuilder(costs, SPACE)
    for wiring, handed_on in {
        stage: slot.handed_on for slot in whole.slots for stage in stage_wirings(slot.wiring) if stage
    }.items():
        bounds, every = (tables.table(tables.slot(wiring, handed_on), batching) for tables in (bounding, whole))
        assert [each.inputs for each in bounds.examples] == [each.inputs for each in every.examples]
        mine, theirs = columns(bounds), columns(every)
        for index, strategy in enumerate(every.strategies):
            alike = [axes_of(each) == axes_of(strategy) for each in bounds.strategies]
            ties = [bounds.ties[way] in ({}, every.ties[every.stored[index]]) for way in bounds.stored]
            same = (bounds.boundary == every.boundary[index]) & alike & ties
            both = (bounds.forward_s + bounds.backward_s) * 0.9 <= every.forward_s[index] + every.backward_s[index]
            assert (same & both & (mine <= theirs[index] * (1 + 1e-9)).all(1)).any(), strategy


def seconds(table: Table, count: int) -> np.ndarray:
    return count * (table.forward_s + table.backward_s) + table.once_s


def columns(table: Table) -> np.ndarray:
    """What is not of one micro-batch's work. float64[options, columns]."""
    return np.column_stack([*(getattr(table, name) for name in COLUMNS[2:]), table.flat()])


@given(st.integers(0, 2**32 - 1))
def test_no_chain_is_faster_than_its_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(1, 5)).tolist()
    layers = [
        BoundedLayer(0, 1, rng.random(size), rng.integers(0, 10, size), rng.integers(0, 6, size), ()) for size in sizes
    ]
    budget = int(rng.integers(5, 40))
    options = [
        Options(
            (NOTHING,) * len(one.seconds), one.seconds, one.resident_bytes, one.workspace_bytes,
            np.zeros(len(one.seconds), int), 1, np.ones((1, len(one.seconds)), bool),
        )
        for one in layers
    ]  # fmt: skip
    chain = Chain(tuple(options), (np.zeros((1, 1)),) * (len(layers) - 1))
    found, bound = solve(chain, budget_bytes=budget).solution, Bound.of(layers, budget)
    fastest = np.inf if found is None else found.seconds
    assert bound.unlimited_s <= bound.seconds * (1 + 1e-9)
    assert bound.seconds <= fastest * (1 + 1e-9)


@pytest.mark.parametrize("model", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.4])
def test_fewer_plans_are_made_and_as_fast_a_one_is_found(model: str, share: float) -> None:
    spec = traced(model).spec
    need = search(
        spec, CLUSTER, global_batch=BATCH, optimizer=ADAM, space=WHOLE, runners_up=False
    ).prediction.peak_bytes
    every, fewer = (
        search(
            spec, CLUSTER, global_batch=BATCH, optimizer=ADAM, memory_bytes=int(share * need), space=space,
            runners_up=False,
        )
        for space in (WHOLE, SPACE)
    )  # fmt: skip
    assert fewer.prediction.time.step_s == pytest.approx(every.prediction.time.step_s, rel=1e-9)
    assert fewer.statistics.planned_layers < every.statistics.planned_layers
    assert Counter(dict(fewer.statistics.pruned))[Rule.AXES_ON_DEMAND] > 0
    assert Rule.AXES_ON_DEMAND not in dict(every.statistics.pruned)


def test_a_faster_option_than_the_plain_ones_is_noticed() -> None:
    tables, batching = OpenedTables(costs_of("llama", staged=False), SPACE), Batching(BATCH, 1, ())
    kind = tables.slots[1].wiring.kind
    every = TableBuilder.candidates(tables, kind, batching)
    plain = np.array([strategy.zero <= 1 and strategy.remat is Remat.NONE for strategy in every])
    taken = np.where(plain, 1.0, 1.2)
    assert not tables.surprises(kind, every, taken)
    last = int(np.flatnonzero(~plain)[-1])
    for seconds_s, noticed in ((0.9999, False), (0.99, True)):
        taken[last] = seconds_s
        assert tables.surprises(kind, every, taken) is noticed
