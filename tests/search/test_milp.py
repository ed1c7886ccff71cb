"""The solvers against a mixed-integer program, and that program against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.search.chain import Chain
from galvatron_jax.search.layers import solve
from galvatron_jax.search.milp import bracket, bracket_chain, solve_milp, solve_milp_chain
from galvatron_jax.search.oracle import brute_force, brute_force_pipeline
from galvatron_jax.search.partition import solve_pipeline
from galvatron_jax.search.pipeline import evaluate
from tests.search.middle import middle_chain, middle_pipeline
from tests.search.pipelines import random_pipeline
from tests.search.test_layers import chains

GAP = 1e-4
"""Relative, to which programs of middle size are solved."""
TIME_LIMIT_S = 300
QUICK = (0, 8, 9, 28)
"""Seeds of middle pipelines whose program takes HiGHS some seconds: all schedules, two to four stages."""
MIDDLE = sorted({*range(30)} - {16, 25})
"""Seeds of middle pipelines whose program HiGHS solves within a minute."""
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=100, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------------------------------------- small


@FEW
@given(SEEDS)
def test_the_program_has_the_brute_force_optimum(seed: int) -> None:
    problem, budget = random_pipeline(seed, unlike_repeats=seed % 2 == 1)
    expected = brute_force_pipeline(problem, budget_bytes=budget)
    found = solve_milp(problem, budget_bytes=budget, time_limit_s=TIME_LIMIT_S, gap=0.0)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.seconds == pytest.approx(expected.seconds, rel=1e-6)
        assert max(found.bytes) + problem.fixed_bytes <= budget
        assert found == evaluate(problem, found.starts, found.options)


@FEW
@given(chains(), st.integers(0, 200))
def test_the_program_of_a_chain_has_the_brute_force_optimum(chain: Chain, budget: int) -> None:
    expected = brute_force(chain, budget_bytes=budget)
    found = solve_milp_chain(chain, budget_bytes=budget, time_limit_s=TIME_LIMIT_S, gap=0.0)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.seconds == pytest.approx(expected.seconds, rel=1e-6)
        assert found.bytes <= budget


def test_what_does_not_fit_has_no_solution_and_no_finite_bound() -> None:
    problem, _ = random_pipeline(0)
    for budget in (problem.fixed_bytes - 1, problem.fixed_bytes + 1):
        found = bracket(problem, budget_bytes=budget, time_limit_s=TIME_LIMIT_S)
        assert found.solution is None
        assert found.bound_s == np.inf


def test_without_time_nothing_is_found_and_nothing_claimed() -> None:
    problem, budget = middle_pipeline(6)
    found = bracket(problem, budget_bytes=budget, time_limit_s=1e-3)
    assert found.solution is None
    known = solve_pipeline(problem, budget_bytes=budget).solution
    assert known is not None
    assert found.bound_s <= known.seconds


# ---------------------------------------------------------------------------------------------- middle


def check_pipeline(seed: int) -> None:
    """The solver's plan is proven, as fast as the program's optimum, and not faster than possible."""
    problem, budget = middle_pipeline(seed)
    assert len(problem.layers) >= 24
    assert all(len(layer) >= 20 for layer in problem.layers)
    outcome = solve_pipeline(problem, budget_bytes=budget)
    best = bracket(problem, budget_bytes=budget, time_limit_s=TIME_LIMIT_S, gap=GAP)
    found = outcome.solution
    assert outcome.proven
    assert found is not None
    assert best.solution is not None
    assert best.bound_s >= best.solution.seconds * (1 - 2 * GAP), "HiGHS ran out of time"
    assert found.seconds <= best.solution.seconds * (1 + GAP)
    assert found.seconds >= best.bound_s * (1 - 1e-6)


@pytest.mark.parametrize("seed", QUICK)
def test_a_middle_pipeline_is_as_fast_as_its_program(seed: int) -> None:
    check_pipeline(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*MIDDLE} - {*QUICK}))
def test_every_middle_pipeline_is_as_fast_as_its_program(seed: int) -> None:
    check_pipeline(seed)


def check_chain(seed: int) -> None:
    """The same for one stage, which is solved exactly."""
    chain, budget = middle_chain(seed)
    found = solve(chain, budget_bytes=budget)
    best = bracket_chain(chain, budget_bytes=budget, time_limit_s=TIME_LIMIT_S, gap=GAP)
    assert found.proven
    assert found.solution is not None
    assert best.solution is not None
    assert found.solution.seconds <= best.solution.seconds * (1 + 1e-9)
    assert found.solution.seconds >= best.bound_s * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_middle_chain_is_as_fast_as_its_program(seed: int) -> None:
    check_chain(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 25))
def test_every_middle_chain_is_as_fast_as_its_program(seed: int) -> None:
    check_chain(seed)
