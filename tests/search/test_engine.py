"""The search over a toy model whose planner can be checked by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.cost import CostModel, price_plan
from galvatron_jax.cost.model import Batching
from galvatron_jax.cost.step import predict
from galvatron_jax.errors import InfeasibleError, InputError, PlanMismatchError
from galvatron_jax.search import OptimizerMemory, Rule, SearchResult, SearchSpace, search
from galvatron_jax.search.infeasible import NothingFitsError
from galvatron_jax.search.space import HEURISTICS, batch_axes_for, meshes_for
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.strategy import Remat, SequenceParallel
from tests.search.fake import FakePlanner, cluster, toy_model

ADAM = OptimizerMemory(("float32", "float32"), 4)
AMPLE = 2**40


def find(model: ModelSpec, where: ClusterSpec, *, memory: int = AMPLE, batch: int = 8, **options) -> SearchResult:
    options = {"planner": FakePlanner(), "runners_up": False} | options
    return search(model, where, global_batch=batch, memory_bytes=memory, optimizer=ADAM, **options)


def brute_force_seconds(
    model: ModelSpec, where: ClusterSpec, space: SearchSpace, planner: FakePlanner, *, batch: int, memory: int
) -> float | None:
    """The fastest of all plans, each priced as a whole."""
    seconds = []
    for mesh in meshes_for(where):
        costs = CostModel.build(model, cluster=where, mesh=mesh, profile=None, optimizer=ADAM, planner=planner)
        for count in space.microbatch_counts(batch):
            choices = [
                space.strategies(
                    model.kinds[layer.kind],
                    mesh=mesh,
                    microbatch=batch // count,
                    pruned=Counter(),
                )
                for layer in model.layers
            ]
            for axes in batch_axes_for(mesh, batch // count):
                for strategies in itertools.product(*choices):
                    try:
                        found = predict(costs, strategies, Batching(batch, count, axes), memory_bytes=memory)
                    except PlanMismatchError:
                        continue
                    if found.memory[0].total_bytes <= memory:
                        seconds.append(found.time.step_s)
    return min(seconds, default=None)


@settings(max_examples=8, deadline=None)
@given(
    tied=st.booleans(),
    skip=st.booleans(),
    work=st.sampled_from([0.1, 1.0, 30.0]),
    width=st.sampled_from([16, 256]),
    memory=st.integers(20_000, 3_000_000),
    remat=st.sampled_from([(Remat.NONE, Remat.FULL), (Remat.NONE,)]),
)
def test_the_search_returns_the_fastest_of_all_plans(tied, skip, work, width, memory, remat) -> None:
    model, where = toy_model(1, tied=tied, skip=skip, microbatch=4, width=width), cluster(1, 2)
    space = SearchSpace(zero=(0, 2, 3), remat=remat, num_microbatches=(1, 2))
    planner = FakePlanner(work)
    expected = brute_force_seconds(model, where, space, planner, batch=4, memory=memory)
    try:
        found = find(model, where, memory=memory, batch=4, space=space, planner=planner)
    except InfeasibleError:
        assert expected is None
        return
    assert expected is not None
    assert found.statistics.proven
    assert found.prediction.time.step_s == pytest.approx(expected, rel=1e-12)
    assert found.prediction.memory[0].total_bytes <= memory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("memory", [300_000, 1_000_000, AMPLE])
def test_the_prediction_is_exactly_the_price_of_the_plan(tied: bool, memory: int) -> None:
    model, where, planner = toy_model(4, tied=tied, skip=True), cluster(2, 4), FakePlanner()
    plan = find(model, where, memory=memory).plan
    again = price_plan(model, plan, cluster=where, optimizer=ADAM, memory_bytes=memory, planner=planner)
    assert again == plan.prediction


def test_tighter_budgets_move_from_data_parallelism_through_zero_and_remat_to_infeasible() -> None:
    model, where = toy_model(4, width=128, hidden=128, sequence=64), cluster(1, 4)
    # With an optimizer update that takes no time, sharding it gains none.
    device = where.device.model_copy(update={"memory_bandwidth_bytes_per_s": 1e15})
    where = where.model_copy(update={"device": device})
    space = SearchSpace(tp=False, sequence=(), num_microbatches=(1,))
    seen, memory, seconds = [], 8_000_000, 0.0
    while True:
        try:
            result = find(model, where, memory=memory, batch=8, space=space, planner=FakePlanner(work=0.02))
        except InfeasibleError:
            break
        assert result.prediction.time.step_s >= seconds
        seconds = result.prediction.time.step_s
        seen.append(result.plan.strategies)
        memory = result.prediction.memory[0].total_bytes - 1
    first, last = seen[0], seen[-1]
    assert all(s.zero == 0 and s.remat is Remat.NONE for s in first)
    assert all(s.zero == 3 and s.remat is Remat.FULL for s in last)
    zero_starts = next(i for i, plan in enumerate(seen) if any(s.zero for s in plan))
    remat_starts = next(i for i, plan in enumerate(seen) if any(s.remat is not Remat.NONE for s in plan))
    assert 0 < zero_starts < len(seen)
    assert 0 < remat_starts < len(seen)


def test_an_infeasible_problem_names_the_nearest_plan_and_what_would_fit() -> None:
    model, where = toy_model(4), cluster(1, 4)
    with pytest.raises(NothingFitsError) as caught:
        find(model, where, memory=60_000)
    error, text = caught.value, str(caught.value)
    assert error.need_bytes > 60_000
    assert "No plan of 'toy' with a global batch of 8 fits in 58.59 KiB per device on 4 × toy" in text
    assert "too much" in text
    assert "Largest part: " in text
    assert "What would fit: a budget of 1 MiB per device" in text
    assert find(model, where, memory=error.need_bytes).plan.strategies == error.nearest.strategies
    with pytest.raises(NothingFitsError):
        find(model, where, memory=error.need_bytes - 1)


def test_an_infeasible_problem_says_how_many_devices_would_fit() -> None:
    model, where = toy_model(8, width=256, hidden=256), cluster(1, 2)
    with pytest.raises(NothingFitsError, match=r"such devices \(") as caught:
        find(model, where, memory=1_800_000, batch=32)
    assert "or 4 such devices" in str(caught.value) or "or 8 such devices" in str(caught.value)


def test_more_of_anything_is_never_slower() -> None:
    model = toy_model(3, tied=True)
    budgets = (200_000, 300_000, 600_000, AMPLE)
    seconds = [find(model, cluster(1, 4), memory=memory).prediction.time.step_s for memory in budgets]
    assert seconds == sorted(seconds, reverse=True)
    narrow = find(model, cluster(1, 4), memory=300_000, space=SearchSpace(sequence=())).prediction.time.step_s
    assert seconds[1] <= narrow * (1 + 1e-12)


@pytest.mark.parametrize("rule", sorted((set(Rule) - HEURISTICS - {Rule.ONE_PROGRAM}) | {Rule.AXES_ON_DEMAND}))
@pytest.mark.parametrize("memory", [150_000, 400_000, AMPLE])
def test_a_lossless_rule_switched_off_changes_no_optimum(rule: Rule, memory: int) -> None:
    model, where = toy_model(3, skip=True), cluster(2, 2)
    space = SearchSpace(disabled_rules=frozenset({rule}))
    fast = find(model, where, memory=memory).prediction.time.step_s
    assert find(model, where, memory=memory, space=space).prediction.time.step_s == pytest.approx(fast, rel=1e-12)


def test_six_and_twelve_devices_are_searched_in_every_order_of_their_primes() -> None:
    assert [[axis.size for axis in mesh] for mesh in meshes_for(cluster(1, 6))] == [[3, 2], [2, 3]]
    assert len(meshes_for(cluster(2, 12))) == 3
    result = find(toy_model(2, microbatch=12, hidden=96), cluster(1, 6), batch=12)
    assert result.plan.num_devices == 6


def test_one_device_needs_no_mesh() -> None:
    result = find(toy_model(2), cluster(1, 1))
    assert result.plan.mesh == ()
    assert result.plan.prediction is not None
    assert result.plan.prediction.time.communication_s == 0


def test_a_layer_that_nothing_splits_leaves_axes_idle() -> None:
    result = find(toy_model(1, hidden=63, sequence=31, microbatch=2), cluster(1, 4), batch=2)
    assert all(len(strategy.dp) <= 1 and not strategy.tp for strategy in result.plan.strategies)


def test_wrong_microbatches_are_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match="global batch of 8 cannot be cut into \\[3\\]"):
        find(toy_model(1), cluster(1, 2), space=SearchSpace(num_microbatches=(3,)))


def test_the_explanation_names_plan_parts_and_runners_up() -> None:
    result = find(toy_model(4), cluster(1, 4), memory=300_000, runners_up=True)
    text = result.explain()
    assert "Plan of toy for 4 devices of toys" in text
    assert "bound by " + result.bound_by in text
    assert "Predicted memory" in text
    assert "the optimum of the cost model" in text
    assert result.runners_up
    for other in result.runners_up:
        assert other.family in text
        assert other.reason(result.prediction) in text
        if other.fits:
            assert other.prediction.time.step_s >= result.prediction.time.step_s * (1 - 1e-12)


def test_ulysses_and_tp_share_a_layer_when_the_heuristic_is_off() -> None:
    space = SearchSpace(disabled_rules=frozenset({Rule.ULYSSES_WITH_TP}))
    mesh = meshes_for(cluster(1, 4))[0]
    kind = toy_model(1).kinds[1]
    both = [
        s
        for s in space.strategies(kind, mesh=mesh, microbatch=8, pruned=Counter())
        if s.tp and s.sp_kind is SequenceParallel.ULYSSES
    ]
    assert both


def test_time_that_has_run_out_gives_an_unproven_plan() -> None:
    result = find(toy_model(6), cluster(1, 8), memory=250_000, time_limit_s=0.0)
    assert not result.statistics.proven
    assert "not proven" in result.explain()


def test_plans_read_off_a_line_cost_what_planning_gives() -> None:
    model, where = toy_model(4, microbatch=64), cluster(1, 4)
    exact = SearchSpace(disabled_rules=frozenset({Rule.AFFINE_IN_MICROBATCH}))
    fewer = find(model, where, memory=600_000, batch=64)
    every = find(model, where, memory=600_000, batch=64, space=exact)
    assert fewer.plan == every.plan
    assert fewer.statistics.planned_layers < every.statistics.planned_layers


@dataclasses.dataclass(frozen=True)
class BentPlanner(FakePlanner):
    """Takes more work than any line says at one micro-batch."""

    def plan_layer(self, kind, strategy, *, mesh, microbatch, model_microbatch):
        plan = super().plan_layer(kind, strategy, mesh=mesh, microbatch=microbatch, model_microbatch=model_microbatch)
        return dataclasses.replace(plan, residual_bytes=2 * plan.residual_bytes) if microbatch == 16 else plan


def test_a_line_that_misled_is_found_out_and_everything_is_planned() -> None:
    model, where, planner = toy_model(4, microbatch=64), cluster(1, 4), BentPlanner()
    exact = SearchSpace(disabled_rules=frozenset({Rule.AFFINE_IN_MICROBATCH}))
    for memory in (500_000, 700_000, 900_000):
        plan = find(model, where, memory=memory, batch=64, planner=planner).plan
        assert plan.prediction is not None
        assert plan.prediction.memory[0].total_bytes <= memory
        again = price_plan(model, plan, cluster=where, optimizer=ADAM, memory_bytes=memory, planner=planner)
        assert again == plan.prediction
        best = find(model, where, memory=memory, batch=64, planner=planner, space=exact).prediction
        assert best.time.step_s <= plan.prediction.time.step_s * (1 + 1e-12)


def test_more_microbatches_are_not_tried_once_the_fastest_plan_fits() -> None:
    ample, tight = (find(toy_model(4), cluster(1, 4), memory=memory).statistics for memory in (AMPLE, 200_000))
    assert dict(ample.pruned)["microbatches-on-demand"] == 3
    assert "microbatches-on-demand" not in dict(tight.pruned) or ample.problems < tight.problems


@dataclasses.dataclass(frozen=True)
class TornPlanner(FakePlanner):
    """Shares the head's parameter out over its other dim, so that a tied one is never laid out alike by both."""

    def plan_layer(self, kind, strategy, *, mesh, microbatch, model_microbatch):
        plan = super().plan_layer(kind, strategy, mesh=mesh, microbatch=microbatch, model_microbatch=model_microbatch)
        if kind.name != "head" or not strategy.tp:
            return plan
        turned = [
            dataclasses.replace(parameter, storage=parameter.storage[::-1], optimizer=parameter.optimizer[::-1])
            for parameter in plan.parameters
        ]
        return dataclasses.replace(plan, parameters=tuple(turned))


@pytest.mark.parametrize("degrees", [None, (2,)])
def test_layers_whose_tied_parameter_tensor_parallelism_would_tear_repeat_their_work(degrees) -> None:
    model, where, planner = toy_model(3, tied=True), cluster(1, 4), TornPlanner()
    space = SearchSpace(tensor_degrees=(4,), pipeline_degrees=degrees or (1,))
    plan = find(model, where, planner=planner, space=space).plan
    assert [bool(strategy.tp) for strategy in plan.strategies] == [False, *(degrees is None,) * 3, False]
    assert plan.prediction == price_plan(
        model, plan, cluster=where, optimizer=ADAM, memory_bytes=AMPLE, planner=planner
    )
