"""The pipeline solver against brute force, and its seconds against the schedule's own table."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from galvatron_jax.cost.schedules import make_table, simulate
from galvatron_jax.search.balance import balanced
from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.oracle import brute_force_pipeline
from galvatron_jax.search.partition import PipelineSolver, solve_pipeline
from galvatron_jax.search.pipeline import Pipeline, StageOptions, Tie, evaluate, together
from tests.search.pipelines import SCHEDULES, random_pipeline, random_plan

SEEDS = st.integers(0, 2**32 - 1)


def check_against_brute_force(problem: Pipeline, budget: int) -> None:
    """The solver finds what trying all finds, says so, and what it finds is what it says."""
    expected = brute_force_pipeline(problem, budget_bytes=budget)
    found = solve_pipeline(problem, budget_bytes=budget)
    assert found.proven
    assert (found.solution is None) == (expected is None)
    if found.solution is None or expected is None:
        return
    assert found.solution.seconds == pytest.approx(expected.seconds, rel=1e-9)
    assert found.solution == evaluate(problem, found.solution.starts, found.solution.options)
    assert max(found.solution.bytes) + problem.fixed_bytes <= budget


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_the_solver_returns_the_brute_force_optimum(seed: int) -> None:
    check_against_brute_force(*random_pipeline(seed))


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_the_solver_returns_the_brute_force_optimum_of_more_layers_and_options(seed: int) -> None:
    check_against_brute_force(*random_pipeline(seed, layers=7, options=4))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_layers_that_share_parameters_may_have_other_options_there(seed: int) -> None:
    check_against_brute_force(*random_pipeline(seed, unlike_repeats=True))


def test_the_draws_hold_every_schedule_degree_and_feature() -> None:
    problems = [random_pipeline(seed)[0] for seed in range(300)]
    assert {problem.schedule for problem in problems} == set(SCHEDULES)
    assert {problem.degree for problem in problems} == {2, 3, 4}
    assert {problem.num_chunks for problem in problems} == {1, 2, 3}
    for feature in ("ties", "held", "fixed_bytes"):
        assert 50 < sum(bool(getattr(problem, feature)) for problem in problems) < 300
    mixed = [len({id(layer) for layer in problem.layers}) > 1 for problem in problems]
    assert sum(mixed) > 150


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_a_bound_that_the_optimum_does_not_beat_gives_no_solution(seed: int) -> None:
    problem, budget = random_pipeline(seed)
    best = solve_pipeline(problem, budget_bytes=budget).solution
    if best is None:
        return
    assert solve_pipeline(problem, budget_bytes=budget, upper_s=best.seconds).solution is None
    again = solve_pipeline(problem, budget_bytes=budget, upper_s=best.seconds * 1.001).solution
    assert again is not None
    assert again.seconds == pytest.approx(best.seconds, rel=1e-9)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_feasibility_ends_one_byte_below_the_smallest_plan(seed: int) -> None:
    problem, _ = random_pipeline(seed, layers=5)
    need = least_bytes(problem)
    found = solve_pipeline(problem, budget_bytes=need)
    assert found.solution is not None
    assert max(found.solution.bytes) + problem.fixed_bytes <= need
    less = solve_pipeline(problem, budget_bytes=need - 1)
    assert less.solution is None
    assert less.proven


def least_bytes(problem: Pipeline) -> int:
    """The smallest budget for which brute force finds a plan."""
    low, high = 0, 10_000
    while low < high:
        middle = (low + high) // 2
        if brute_force_pipeline(problem, budget_bytes=middle) is None:
            low = middle + 1
        else:
            high = middle
    return low


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_no_plan_is_faster_than_its_bounds(seed: int) -> None:
    problem, budget = random_pipeline(seed)
    bounds = Bounds.of(problem, budget - problem.fixed_bytes)
    best = brute_force_pipeline(problem, budget_bytes=budget)
    some = evaluate(problem, *random_plan(np.random.default_rng(seed), problem))
    fitting = [] if max(some.bytes) + problem.fixed_bytes > budget else [some]
    for plan in fitting if best is None else [best, *fitting]:
        above = plan.seconds * (1 + 1e-9)
        assert bounds.seconds() <= above
        for stage, (start, stop) in enumerate(itertools.pairwise((*plan.starts, len(problem.layers)))):
            done = plan.stages[stage]
            busy = done.backward_s + (done.forward_s if stage < problem.num_stages - 1 or not problem.recomputes else 0)
            assert bounds.busy[stage, start, stop] <= busy * (1 + 1e-9)
            assert bounds.stage_seconds(stage, start, stop) <= above
            assert busy <= bounds.longest_stage(above) * (1 + 1e-6)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_no_plan_is_faster_than_its_stages_weighed(seed: int) -> None:
    problem, budget = random_pipeline(seed)
    best = brute_force_pipeline(problem, budget_bytes=budget)
    if best is None:
        return
    bounds = Bounds.of(problem, budget - problem.fixed_bytes)
    for above in (1 + 1e-9, 1.2, math.inf):
        assert balanced(problem, bounds, upper_s=best.seconds * above).seconds <= best.seconds * (1 + 1e-9)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_a_draft_fits_and_is_what_it_says(seed: int) -> None:
    problem, budget = random_pipeline(seed, layers=8)
    solver = PipelineSolver.of(problem, budget_bytes=budget)
    if solver is None:
        return
    solver.bound(math.inf)
    found = solver.draft()
    if found is None:
        return
    assert max(found.bytes) + problem.fixed_bytes <= budget
    assert found == evaluate(problem, found.starts, found.options)
    better = solver.improve(found)
    assert better.seconds <= found.seconds
    assert max(better.bytes) + problem.fixed_bytes <= budget


def test_fewer_layers_than_stages_have_no_solution() -> None:
    problem, _ = random_pipeline(0)
    few = problem.num_stages - 1
    short = replace(
        problem,
        layers=problem.layers[:few],
        repeats=(None,) * few,
        moves=problem.moves[: few - 1],
        cuts=problem.cuts[:few],
        held=(),
        ties=(),
    )
    found = solve_pipeline(short, budget_bytes=10**6)
    assert found.solution is None
    assert found.proven


# ---------------------------------------------------------------------------------------------- honesty


def dyadic(problem: Pipeline, rng: np.random.Generator) -> Pipeline:
    """The problem with seconds in whole multiples of 2**-20, whose sums have no rounding in any order."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.round(values * 2.0**20) / 2.0**20

    def options(found: StageOptions) -> StageOptions:
        names = ("forward_s", "backward_s", "once_s", "enter_s", "leave_s")
        return replace(found, **{name: rounded(getattr(found, name)) for name in names})

    made = {id(found): options(found) for found in {*problem.layers, *problem.repeats} if found is not None}
    return replace(
        problem,
        num_microbatches=int(rng.integers(1, 40)),
        layers=tuple(made[id(found)] for found in problem.layers),
        repeats=tuple(None if found is None else made[id(found)] for found in problem.repeats),
        moves=tuple(rounded(moves) for moves in problem.moves),
        cuts=tuple(
            replace(cut, forward_s=float(rounded(cut.forward_s)), backward_s=float(rounded(cut.backward_s)))
            for cut in problem.cuts
        ),
        ties=tuple(replace(tie, exchange_s=float(rounded(tie.exchange_s))) for tie in problem.ties),
    )


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_seconds_are_those_of_the_table_played_tick_by_tick(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = dyadic(random_pipeline(seed, layers=12)[0], rng)
    solution = evaluate(problem, *random_plan(rng, problem))
    table = make_table(
        problem.schedule,
        num_stages=problem.degree,
        num_microbatches=problem.num_microbatches,
        num_chunks=problem.num_chunks,
    )
    forward = [stage.forward_s for stage in solution.stages]
    backward = [stage.backward_s for stage in solution.stages]
    assume(len(set(backward)) > 1)  # Stages are unequal, but for a few that happen to be of one layer kind.
    groups = [solution.stages[group :: problem.degree] for group in range(problem.degree)]
    once = max(math.fsum(stage.once_s for stage in group) for group in groups)
    assert solution.seconds == simulate(table, forward, backward).total_s + once


def variants_of(problem: Pipeline, rng: np.random.Generator) -> list[Pipeline]:
    """Problems in which layers that share parameters have some of their options only, and exchanges another price."""
    users = {user for tie in problem.ties for user in tie.users}
    found = []
    for number in range(3):
        part = {
            id(options): without(options, int(rng.integers(len(options))))
            for user in users
            for options in (problem.layers[user], problem.repeats[user])
            if options is not None
        }
        pick = [part if layer in users else {} for layer in range(len(problem.layers))]
        found.append(
            replace(
                problem,
                layers=tuple(pick[i].get(id(own), own) for i, own in enumerate(problem.layers)),
                repeats=tuple(
                    None if own is None else pick[i].get(id(own), own) for i, own in enumerate(problem.repeats)
                ),
                ties=tuple(Tie(tie.users, tie.exchange_s * (1 + number)) for tie in problem.ties),
            )
        )
    return found


def without(options: StageOptions, option: int) -> StageOptions:
    """All options but one, or the only one."""
    if len(options) == 1:
        return options
    kept = np.delete(np.arange(len(options)), option)
    columns = ("forward_s", "backward_s", "once_s", "static_bytes", "residual_bytes", "workspace_bytes", "boundary")
    strategies = tuple(options.strategies[index] for index in kept)
    return replace(options, strategies=strategies, **{name: getattr(options, name)[kept] for name in columns})


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_no_variant_has_a_faster_plan_than_all_of_them_together(seed: int) -> None:
    problem, budget = random_pipeline(seed)
    if not problem.ties:
        problem = replace(problem, ties=(Tie((0, len(problem.layers) - 1), 1.0),))
    variants = variants_of(problem, np.random.default_rng(seed))
    relaxed = together(variants)
    of_all = brute_force_pipeline(relaxed, budget_bytes=budget)
    for variant in variants:
        alone = brute_force_pipeline(variant, budget_bytes=budget)
        if alone is not None:
            assert of_all is not None
            assert of_all.seconds <= alone.seconds * (1 + 1e-12)
    # Layers without ties stay the same objects, which is how solvers know layers alike.
    free = set(range(len(problem.layers))) - {user for tie in problem.ties for user in tie.users}
    assert all(relaxed.layers[layer] is problem.layers[layer] for layer in free)
    assert together(variants[:1]) is variants[0]
