"""The chain solver against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.search.chain import Chain, Options
from galvatron_jax.search.layers import fastest_seconds, smallest, solve
from galvatron_jax.search.oracle import brute_force
from galvatron_jax.spec.strategy import LayerStrategy


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Up to five layers of up to three kinds, two boundary classes, up to two variants of tied parameters."""
    seed = draw(st.integers(0, 2**32 - 1))
    variants = draw(st.integers(1, 2))
    kinds = [
        draw_options(np.random.default_rng(seed + index), draw(st.integers(1, 5)), variants)
        for index in range(draw(st.integers(1, 3)))
    ]
    order = draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=5))
    layers = tuple(kinds[index] for index in order)
    rng = np.random.default_rng(seed)
    moves = tuple(
        rng.choice([0.0, 1.0, 2.5], (before.num_classes, here.num_classes))
        for before, here in itertools.pairwise(layers)
    )
    return Chain(layers, moves)


def draw_options(rng: np.random.Generator, count: int, variants: int) -> Options:
    """Random options; small integers make ties and equal sums likely."""
    admitted = rng.random((variants, count)) < 0.7
    admitted[:, 0] = True
    return Options(
        strategies=(LayerStrategy(),) * count,
        seconds=rng.integers(1, 12, count).astype(float),
        resident_bytes=rng.integers(0, 40, count),
        workspace_bytes=rng.integers(0, 30, count),
        boundary=rng.integers(0, 2, count),
        num_classes=2,
        admitted=admitted,
    )


@settings(max_examples=300, deadline=None)
@given(chains(), st.integers(0, 200))
def test_the_solver_returns_the_brute_force_optimum(chain: Chain, budget: int) -> None:
    expected = brute_force(chain, budget_bytes=budget)
    found = solve(chain, budget_bytes=budget)
    assert found.proven
    assert (found.solution is None) == (expected is None)
    if expected is not None and found.solution is not None:
        assert found.solution.seconds == pytest.approx(expected.seconds, rel=1e-12)
        assert found.solution.bytes <= budget


@settings(max_examples=100, deadline=None)
@given(chains())
def test_the_smallest_choice_is_where_feasibility_begins(chain: Chain) -> None:
    need = smallest(chain).bytes
    assert solve(chain, budget_bytes=need).solution is not None
    assert solve(chain, budget_bytes=need - 1).solution is None


@settings(max_examples=100, deadline=None)
@given(chains(), st.lists(st.integers(0, 200), min_size=2, max_size=4))
def test_more_memory_is_never_slower(chain: Chain, budgets: list[int]) -> None:
    found = [solve(chain, budget_bytes=budget).solution for budget in sorted(budgets)]
    seconds = [solution.seconds if solution else math.inf for solution in found]
    assert seconds == sorted(seconds, reverse=True)
    assert min(seconds) >= fastest_seconds(chain) - 1e-12


def test_a_bound_that_cannot_be_beaten_gives_no_solution() -> None:
    options = draw_options(np.random.default_rng(0), 3, 1)
    chain = Chain((options,), ())
    best = solve(chain, budget_bytes=1000).solution
    assert best is not None
    assert solve(chain, budget_bytes=1000, upper_s=best.seconds).solution is None


def test_eighty_like_layers_with_forty_options_are_solved_exactly() -> None:
    rng = np.random.default_rng(1)
    seconds = rng.uniform(1.0, 3.0, 40)
    resident = (4e9 / seconds * rng.uniform(0.8, 1.2, 40)).astype(np.int64)
    options = Options(
        strategies=(LayerStrategy(),) * 40,
        seconds=seconds,
        resident_bytes=resident,
        workspace_bytes=rng.integers(0, 4, 40) * 10**8,
        boundary=np.arange(40) % 6,
        num_classes=6,
        admitted=np.ones((1, 40), bool),
    )
    move = np.where(np.eye(6, dtype=bool), 0.0, rng.uniform(0.05, 0.2, (6, 6)))
    chain = Chain((options,) * 80, (move,) * 79)
    least = smallest(chain).bytes
    for share in (1.01, 1.2, 1.5):
        found = solve(chain, budget_bytes=int(share * least))
        assert found.proven
        assert found.solution is not None
        assert found.labels < 200_000
