"""Pricing layers in full on some axes only: nothing is found that is slower, as stand-ins bound what is left out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.pipeline import stage_wirings
from galvatron_jax.cost.planner import default_planner
from galvatron_jax.search import Rule, SearchResult, SearchSpace, search
from galvatron_jax.search.shortlist import Bound, BoundedLayer, Shortlist
from galvatron_jax.search.space import Axes, axes_of, meshes_for
from galvatron_jax.search.stand_ins import BoundingTables, OpenedTables
from galvatron_jax.search.tables import COLUMNS, Table, TableBuilder
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.strategy import Remat, SequenceParallel
from tests.runtime.matrix import PLANS, traced
from tests.search.fake import cluster, toy_model
from tests.search.questions import ADAM
from tests.search.test_engine import TornPlanner

SPACE = SearchSpace(num_microbatches=(1, 4), pipeline_degrees=None, disabled_rules=frozenset({Rule.TP_ACROSS_NODES}))
WHOLE = replace(SPACE, disabled_rules=SPACE.disabled_rules | {Rule.AXES_ON_DEMAND})
CLUSTER, BATCH = cluster_preset("h100x8"), 64
SAMPLE = ("gpt2", "llama", "t5", "moe", "batchnorm_net")


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


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_plan_is_faster_than_its_bound_and_the_axes_of_better_ones_are_wanted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = [random_layer(rng, kind) for kind in range(rng.integers(1, 4))]
    room = int(rng.integers(5, 40))
    bound = Bound.of(layers, room)
    plans = [plan for plan in every_plan(layers) if plan.bytes <= room]
    assert bound.unlimited_s <= bound.seconds * (1 + 1e-9)
    assert all(bound.seconds <= plan.seconds * (1 + 1e-9) for plan in plans)
    upper = float(rng.uniform(1, 1.5)) * min([plan.seconds for plan in plans], default=1.0)
    wanted = bound.wanted(upper)
    for plan in plans:
        if plan.seconds < upper * (1 - 1e-9):
            assert all(axes in wanted.get(kind, ()) for kind, axes in plan.stand_ins)


class Made(NamedTuple):
    """A plan of bounded layers."""

    seconds: float
    bytes: int
    stand_ins: frozenset[tuple[int, Axes]]


def random_layer(rng: np.random.Generator, kind: int) -> BoundedLayer:
    size = int(rng.integers(1, 5))
    stands_for = tuple([((f"{i}",), (), (), SequenceParallel.NONE) for i in range(rng.integers(0, size + 1))])
    workspace = rng.integers(0, 6, size)
    workspace[size - len(stands_for) :] = 0
    return BoundedLayer(
        kind, int(rng.integers(1, 3)), rng.random(size), rng.integers(0, 10, size), workspace, stands_for
    )


def every_plan(layers: list[BoundedLayer]) -> Iterator[Made]:
    each = [layer for layer in layers for _ in range(layer.number)]
    for options in itertools.product(*(range(len(layer.seconds)) for layer in each)):
        pairs = list(zip(each, options, strict=True))
        used = [(layer.kind, layer.stands_for[i - len(layer.seconds)]) for layer, i in pairs if i >= real(layer)]
        yield Made(
            sum(float(layer.seconds[i]) for layer, i in pairs),
            sum(int(layer.resident_bytes[i]) for layer, i in pairs) + max(int(x.workspace_bytes[i]) for x, i in pairs),
            frozenset(used),
        )


def real(layer: BoundedLayer) -> int:
    return len(layer.seconds) - len(layer.stands_for)


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


def both(model, where, *, memory: int, space: SearchSpace, **options) -> tuple[SearchResult, SearchResult]:
    """With the rule and without."""
    off = replace(space, disabled_rules=space.disabled_rules | {Rule.AXES_ON_DEMAND})
    about = {"optimizer": ADAM, "memory_bytes": memory, "runners_up": False} | options
    return search(model, where, space=space, **about), search(model, where, space=off, **about)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.45])
@pytest.mark.parametrize("degrees", [(1,), (2,), None])
@pytest.mark.parametrize("sequence", [8, 32])
def test_layers_that_must_repeat_their_work_are_bounded_too(sequence: int, degrees, share: float) -> None:
    """Which they may do once it is known that tied parameters are laid out alike in no other way."""
    model, planner = toy_model(1, tied=True, width=64, sequence=sequence), TornPlanner(work=20, activation=100)
    space = SearchSpace(
        tensor_degrees=(2,), pipeline_degrees=degrees, num_microbatches=(2, 4),
        disabled_rules=frozenset({Rule.TP_ACROSS_NODES, Rule.MICROBATCHES_ON_DEMAND}),
    )  # fmt: skip
    options = {"space": space, "global_batch": 4, "planner": planner}
    need = both(model, cluster(2, 2), memory=2**40, **options)[1].prediction.peak_bytes
    on, off = both(model, cluster(2, 2), memory=int(share * need), **options)
    assert on.prediction.time.step_s == pytest.approx(off.prediction.time.step_s, rel=1e-9)


@pytest.mark.parametrize("degrees", [(1,), (2,)])
@pytest.mark.parametrize("share", [1.1, 0.6])
def test_tied_layers_that_must_repeat_their_work_lose_nothing(share: float, degrees: tuple[int, ...]) -> None:
    spec = traced("bert").spec
    space = SearchSpace(num_microbatches=(1, 4), tensor_degrees=(2,), pipeline_degrees=degrees)
    need = both(spec, CLUSTER, memory=2**40, space=space, global_batch=BATCH)[1].prediction.peak_bytes
    on, off = both(spec, CLUSTER, memory=int(share * need), space=space, global_batch=BATCH)
    assert on.prediction.time.step_s == pytest.approx(off.prediction.time.step_s, rel=1e-9)


@pytest.mark.parametrize("model", ["gpt2", "moe"])
def test_what_unlimited_memory_would_give_is_known_all_the_same(model: str) -> None:
    space = replace(SPACE, pipeline_degrees=(1,))
    on, off = both(traced(model).spec, CLUSTER, memory=2**40, space=space, global_batch=BATCH)
    assert on.statistics.unlimited_s == pytest.approx(on.statistics.step_s, rel=1e-9)
    assert on.statistics.unlimited_s == pytest.approx(off.statistics.unlimited_s, rel=1e-9)


def test_a_faster_option_than_the_plain_ones_opens_all_axes() -> None:
    """ZeRO 2 of a small head over tensor axes; unless they are opened, nobody knows."""
    costs, batching = costs_of("llama", staged=False), Batching(BATCH, 1, ())
    head, noticed = len(costs.model.kinds) - 1, []
    for axes in [None, *OpenedTables(costs, SPACE).closed(head, batching)]:
        tables = OpenedTables(costs, SPACE)
        tables.open(head, [] if axes is None else [axes])
        priced = tables.table(tables.slots[-1], batching)
        noticed.append(tables.surprises(head, priced.strategies, seconds(priced, 1)))
        next(Shortlist(tables, BATCH, 2**40).promising((1,)))
        assert bool(tables.closed(head, batching)) is not noticed[-1]
    assert any(noticed)
    assert not noticed[0]
