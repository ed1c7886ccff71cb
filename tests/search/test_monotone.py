"""What helps a pipeline never makes its optimum worse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.search.partition import solve_pipeline
from galvatron_jax.search.pipeline import Pipeline, StageOptions
from tests.search.pipelines import random_pipeline

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
