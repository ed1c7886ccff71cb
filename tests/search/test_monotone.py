"""What helps a pipeline, or a whole search, never makes its optimum worse; and rules that prune lose nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.errors import InfeasibleError
from galvatron_jax.search import Rule, SearchSpace
from galvatron_jax.search.partition import solve_pipeline
from galvatron_jax.search.pipeline import Pipeline, StageOptions
from galvatron_jax.search.question import Question
from galvatron_jax.search.space import HEURISTICS
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.strategy import Remat
from tests.search.fake import FakePlanner, cluster, toy_model
from tests.search.pipelines import random_pipeline
from tests.search.questions import question

SEEDS = st.integers(0, 2**32 - 1)
CHANGES = settings(max_examples=150, deadline=None, derandomize=True, database=None)
COLUMNS = (
    "forward_s",
    "backward_s",
    "once_s",
    "static_bytes",
    "residual_bytes",
    "workspace_bytes",
    "boundary",
)


def optimum(problem: Pipeline, budget: int) -> float:
    """Seconds of the fastest plan, proven; infinite where none fits."""
    found = solve_pipeline(problem, budget_bytes=budget)
    assert found.proven
    return math.inf if found.solution is None else found.solution.seconds


def with_options(problem: Pipeline, change: Callable[[StageOptions], StageOptions]) -> Pipeline:
    """The problem with every kind of layer changed once."""
    parts = [part for part in (*problem.layers, *problem.repeats) if part is not None]
    made = {key: change(part) for key, part in {id(part): part for part in parts}.items()}
    return replace(
        problem,
        layers=tuple(made[id(part)] for part in problem.layers),
        repeats=tuple(None if part is None else made[id(part)] for part in problem.repeats),
    )


def taken(options: StageOptions, index: np.ndarray) -> StageOptions:
    """Some of the options, or some twice."""
    columns = {name: getattr(options, name)[index] for name in COLUMNS}
    return replace(options, strategies=tuple(options.strategies[i] for i in index), **columns)


def smaller(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Each number by itself: as it is, a part of it, or nothing."""
    part = values * rng.choice([0.0, 0.5, 1.0], np.shape(values))
    return part.astype(np.asarray(values).dtype)


@CHANGES
@given(SEEDS)
def test_more_memory_is_never_slower(seed: int) -> None:
    problem, budget = random_pipeline(seed)
    seconds = [optimum(problem, int(budget * share)) for share in (0.6, 0.8, 0.95, 1.0, 1.1, 1.5, 10.0)]
    for less, more in itertools.pairwise(seconds):
        assert more <= less * (1 + 1e-9)


@CHANGES
@given(SEEDS)
def test_more_options_are_never_slower(seed: int) -> None:
    problem, budget = random_pipeline(seed, options=4)
    rng = np.random.default_rng(seed)
    kept = {size: np.sort(rng.choice(size, int(rng.integers(1, size + 1)), replace=False)) for size in range(1, 5)}
    fewer = with_options(problem, lambda options: taken(options, kept[len(options)]))
    assert optimum(problem, budget) <= optimum(fewer, budget) * (1 + 1e-9)


@CHANGES
@given(SEEDS)
def test_options_that_others_beat_change_nothing(seed: int) -> None:
    problem, budget = random_pipeline(seed)

    def doubled(options: StageOptions) -> StageOptions:
        count = len(options)
        twice = taken(options, np.tile(np.arange(count), 2))
        worse = np.repeat([0, 1], count)
        return replace(
            twice,
            forward_s=twice.forward_s * (1 + 0.1 * worse),
            once_s=twice.once_s + worse,
            residual_bytes=twice.residual_bytes + worse,
        )

    assert optimum(with_options(problem, doubled), budget) == pytest.approx(optimum(problem, budget), rel=1e-9)


@CHANGES
@given(SEEDS)
def test_faster_links_are_never_slower(seed: int) -> None:
    problem, budget = random_pipeline(seed)
    rng = np.random.default_rng(seed)
    # A kind of layer shares its edges with its repetitions.
    share = {classes: rng.choice([0.0, 0.5, 1.0], (2, classes, 2)) for classes in range(1, 4)}
    quicker = with_options(
        problem,
        lambda options: replace(
            options,
            enter_s=options.enter_s * share[options.num_classes][0],
            leave_s=options.leave_s * share[options.num_classes][1],
        ),
    )
    quicker = replace(
        quicker,
        moves=tuple(smaller(rng, moves) for moves in problem.moves),
        cuts=tuple(
            replace(cut, forward_s=cut.forward_s * rng.random(), backward_s=cut.backward_s * rng.random())
            for cut in problem.cuts
        ),
        ties=tuple(replace(tie, exchange_s=tie.exchange_s * rng.random()) for tie in problem.ties),
    )
    assert optimum(quicker, budget) <= optimum(problem, budget) * (1 + 1e-9)


@CHANGES
@given(SEEDS)
def test_less_to_compute_and_to_keep_is_never_slower(seed: int) -> None:
    problem, budget = random_pipeline(seed)
    rng = np.random.default_rng(seed)

    def lighter(options: StageOptions) -> StageOptions:
        return replace(options, **{name: smaller(rng, getattr(options, name)) for name in COLUMNS[:-1]})

    lighter_problem = replace(
        with_options(problem, lighter),
        cuts=tuple(replace(cut, bytes=cut.bytes // 2) for cut in problem.cuts),
        held=tuple(replace(held, bytes=held.bytes // 2) for held in problem.held),
        fixed_bytes=problem.fixed_bytes // 2,
    )
    assert optimum(lighter_problem, budget) <= optimum(problem, budget) * (1 + 1e-9)


# ---------------------------------------------------------------------------------------------- whole searches

SEARCHES = settings(max_examples=20, deadline=None, derandomize=True, database=None)
SPACE = SearchSpace(
    zero=(0, 3), remat=(Remat.NONE, Remat.FULL), sequence=(), num_microbatches=(1, 4), pipeline_degrees=None
)
QUESTIONS = st.builds(
    lambda blocks, tied, skip, width, devices, work, memory: question(
        model=toy_model(blocks, tied=tied, skip=skip, width=width),
        cluster=cluster(*devices),
        planner=FakePlanner(work),
        memory_bytes=memory,
        space=SPACE,
    ),
    blocks=st.integers(1, 3),
    tied=st.booleans(),
    skip=st.booleans(),
    width=st.sampled_from([16, 64, 256]),
    devices=st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 4)]),
    work=st.sampled_from([0.1, 1.0, 30.0]),
    memory=st.sampled_from([60_000, 120_000, 250_000, 500_000, 2_000_000]),
)


def least_s(asked: Question) -> float:
    """Seconds of the fastest plan, proven; infinite where none fits."""
    try:
        found = asked.answer(runners_up=False)
    except InfeasibleError:
        return math.inf
    assert found.statistics.proven
    return found.prediction.time.step_s


def faster(where: ClusterSpec, link: str, factor: float) -> ClusterSpec:
    """The cluster with one kind of link quicker."""
    old = getattr(where, link)
    changed = {
        "bandwidth_bytes_per_s": old.bandwidth_bytes_per_s * factor,
        "latency_s": old.latency_s / factor,
    }
    return where.model_copy(update={link: old.model_copy(update=changed)})


@SEARCHES
@given(QUESTIONS)
def test_a_search_with_more_memory_is_never_slower(asked: Question) -> None:
    assert asked.memory_bytes is not None
    budgets = [int(asked.memory_bytes * share) for share in (0.5, 0.9, 1, 1.1, 2, 100)]
    seconds = [least_s(replace(asked, memory_bytes=budget)) for budget in budgets]
    for less, more in itertools.pairwise(seconds):
        assert more <= less * (1 + 1e-9)
    assert math.isfinite(seconds[-1])


@SEARCHES
@given(QUESTIONS, st.sampled_from(["intra", "inter"]))
def test_a_search_with_faster_links_is_never_slower(asked: Question, link: str) -> None:
    quicker = replace(asked, cluster=faster(asked.cluster, link, 3.0))
    assert least_s(quicker) <= least_s(asked) * (1 + 1e-9)


@SEARCHES
@given(QUESTIONS)
def test_a_search_of_more_plans_is_never_slower(asked: Question) -> None:
    whole = least_s(asked)
    fewer = (
        {"pipeline_degrees": (1,)},
        {"pipeline_degrees": (2,)},
        {"schedules": (Schedule.ONE_F_ONE_B,)},
        {"schedules": (Schedule.GPIPE,)},
        {"num_microbatches": (4,)},
        {"zero": (0,)},
        {"remat": (Remat.NONE,)},
    )
    for change in fewer:
        assert whole <= least_s(replace(asked, space=replace(asked.space, **change))) * (1 + 1e-9)


@SEARCHES
@given(QUESTIONS)
def test_tensor_parallelism_is_never_slower_than_none(asked: Question) -> None:
    """Whatever its links cost: layers may repeat their work instead."""
    space = replace(asked.space, disabled_rules=frozenset({Rule.REPEATED_WORK}))
    without = least_s(replace(asked, space=replace(space, tp=False)))
    assert least_s(replace(asked, space=space)) <= without * (1 + 1e-9)


@SEARCHES
@given(QUESTIONS)
def test_more_devices_are_never_slower(asked: Question) -> None:
    """Whatever their links cost: some may stay unused."""
    asked = replace(asked, fewer_devices=True)
    seconds = [least_s(replace(asked, cluster=cluster(*size))) for size in ((1, 1), (1, 2), (1, 4), (2, 4))]
    for fewer, more in itertools.pairwise(seconds):
        assert more <= fewer * (1 + 1e-9)


@SEARCHES
@given(QUESTIONS)
def test_more_devices_are_never_slower_where_links_cost_next_to_nothing(asked: Question) -> None:
    """Though all of them are used."""
    seconds = [
        least_s(replace(asked, cluster=faster(cluster(1, devices), "intra", 1e9), memory_bytes=2**40))
        for devices in (1, 2, 4)
    ]
    for fewer, more in itertools.pairwise(seconds):
        assert more <= fewer * (1 + 1e-9)


@pytest.mark.parametrize("rule", sorted(Rule))
@settings(SEARCHES, max_examples=5)
@given(QUESTIONS)
def test_a_rule_switched_off_changes_no_optimum_unless_it_is_a_heuristic(rule: Rule, asked: Question) -> None:
    if rule is Rule.AXES_ON_DEMAND:
        # How many micro-batches are looked at would differ.
        disabled = asked.space.disabled_rules | {Rule.MICROBATCHES_ON_DEMAND}
        asked = replace(asked, space=replace(asked.space, zero=(0, 1, 3), disabled_rules=disabled))
    disabled = asked.space.disabled_rules | {rule}
    without = least_s(replace(asked, space=replace(asked.space, disabled_rules=disabled)))
    # The toy's layers are the fastest when plain.
    if rule in HEURISTICS - {Rule.AXES_ON_DEMAND} or rule is Rule.ONE_PROGRAM:
        assert without <= least_s(asked) * (1 + 1e-9)
    else:
        assert without == pytest.approx(least_s(asked), rel=1e-9)


@SEARCHES
@given(QUESTIONS)
def test_what_is_found_fits_as_one_program(asked: Question) -> None:
    """And takes no less than what fits group by group."""
    alone = replace(asked, space=replace(asked.space, disabled_rules=frozenset({Rule.ONE_PROGRAM})))
    for budget in [int(asked.budget_bytes * share) for share in (0.9, 1, 1.5, 100)]:
        try:
            found = replace(asked, memory_bytes=budget).answer(runners_up=False)
        except InfeasibleError:
            continue
        assert found.prediction.peak_bytes <= budget
        assert least_s(replace(alone, memory_bytes=budget)) <= found.prediction.time.step_s * (1 + 1e-9)
    assert found.prediction.time.step_s == pytest.approx(least_s(replace(alone, memory_bytes=budget)), rel=1e-9)
