"""Pipelines solved cut by cut: the stages' minima, the bounds of cuts, and the best options of one cut."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.cut import CutSolver
from galvatron_jax.search.cuts import CutFinder
from galvatron_jax.search.minima import StageMinima, Weight
from galvatron_jax.search.partition import PipelineSolver
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, evaluate, sum_stage
from tests.search.pipelines import random_pipeline

SEEDS = st.integers(0, 2**32 - 1)
SOME = settings(max_examples=150, deadline=None, derandomize=True, database=None)
WEIGHTS = (Weight(1.0, 1.0, 0.0), Weight(0.3, 2.0, 0.1), Weight(0.0, 1.0, 3.0), Weight(5.0, 0.5, 1.0))


def one_chunk(seed: int) -> tuple[Pipeline, float]:
    """A random pipeline with one stage per group, and bytes for its options."""
    while True:
        problem, budget = random_pipeline(seed, unlike_repeats=seed % 2 == 1)
        if problem.num_chunks == 1 and budget >= problem.fixed_bytes:
            return problem, budget - problem.fixed_bytes
        seed += 1


def choices(problem: Pipeline, start: int, stop: int) -> itertools.product:
    return itertools.product(*(range(len(problem.options(layer, start))) for layer in range(start, stop)))


def cuts_of(problem: Pipeline) -> list[tuple[int, ...]]:
    inner = itertools.combinations(range(1, len(problem.layers)), problem.num_stages - 1)
    return [(0, *starts) for starts in inner]


def best_of_cut(problem: Pipeline, budget: float, starts: tuple[int, ...]) -> PipelineSolution | None:
    every = itertools.pairwise((*starts, len(problem.layers)))
    fitting = []
    for stage, ends in enumerate(every):
        sums = [(sum_stage(problem, stage, *ends, options), options) for options in choices(problem, *ends)]
        fitting.append([one for total, one in sums if total.resident_bytes + total.passing_bytes <= budget])
    found = [evaluate(problem, starts, tuple(itertools.chain(*one))) for one in itertools.product(*fitting)]
    return min(found, key=lambda plan: plan.seconds, default=None)


@SOME
@given(SEEDS)
def test_the_least_of_a_stage_is_that_of_all_its_choices(seed: int) -> None:
    problem, budget = one_chunk(seed)
    minima, rng = StageMinima(problem, budget), np.random.default_rng(seed)
    starts = cuts_of(problem)[int(rng.integers(len(cuts_of(problem))))]
    for stage, (start, stop) in enumerate(itertools.pairwise((*starts, len(problem.layers)))):
        sums = [sum_stage(problem, stage, start, stop, options) for options in choices(problem, start, stop)]
        sums = [total for total in sums if total.resident_bytes + total.passing_bytes <= budget]
        for weight in WEIGHTS:
            worth = [
                weight.forward * s.forward_s + weight.backward * s.backward_s + weight.once * s.once_s for s in sums
            ]
            least = minima.least(stage, start, stop, weight).seconds
            assert least == pytest.approx(min(worth, default=math.inf), rel=1e-9)
            below = minima.least(stage, start, stop, weight, below=0.5 * least).seconds
            assert below >= 0.5 * least


@SOME
@given(SEEDS)
def test_the_least_of_a_stage_does_not_depend_on_what_was_asked_before(seed: int) -> None:
    problem, budget = one_chunk(seed)
    starts = cuts_of(problem)[seed % len(cuts_of(problem))]
    for stage, ends in enumerate(itertools.pairwise((*starts, len(problem.layers)))):
        for weight in WEIGHTS:
            least = StageMinima(problem, budget).least(stage, *ends, weight).seconds
            asked = StageMinima(problem, budget)
            for part, exact in ((0.999, False), (1.001, False), (0.999, True)):
                found = asked.least(stage, *ends, weight, below=part * least, exact=exact).seconds
                assert found <= least * (1 + 1e-9) or (part < 1 and found == math.inf)
            assert asked.least(stage, *ends, weight).seconds == pytest.approx(least, rel=1e-9)


@SOME
@given(SEEDS)
def test_cuts_that_are_left_out_hold_nothing_better_and_the_others_take_no_less_than_they_say(seed: int) -> None:
    problem, budget = one_chunk(seed)
    bounds = Bounds.of(problem, budget)
    best = {starts: best_of_cut(problem, budget, starts) for starts in cuts_of(problem)}
    seconds = {starts: math.inf if one is None else one.seconds for starts, one in best.items()}
    fastest = min(seconds.values())
    for aim in (fastest * 1.02, fastest * 1.5, math.inf):
        found = CutFinder(problem, bounds, StageMinima(problem, budget), aim).find(aim)
        assert found is not None
        known = dict(zip(map(tuple, found.starts.tolist()), found.bound_s.tolist(), strict=True))
        assert list(known.values()) == sorted(known.values())
        for starts, took in seconds.items():
            assert starts in known or took >= aim * (1 - 1e-9)
            assert starts not in known or known[starts] <= took * (1 + 1e-9)


@SOME
@given(SEEDS)
def test_the_best_options_of_a_cut_are_found_or_bounded(seed: int) -> None:
    problem, budget = one_chunk(seed)
    bounds, rng = Bounds.of(problem, budget), np.random.default_rng(seed)
    if not math.isfinite(bounds.seconds()):
        return
    starts = cuts_of(problem)[int(rng.integers(len(cuts_of(problem))))]
    best = best_of_cut(problem, budget, starts)
    if best is None:
        return
    for slack in (1.001, 1.3, math.inf):
        solver = CutSolver(problem, bounds, StageMinima(problem, budget), starts, best.seconds * slack)
        solver.run()
        assert solver.best is not None
        assert solver.bound_s == math.inf
        assert solver.best.seconds == pytest.approx(best.seconds, rel=1e-9)
        assert max(solver.best.bytes) <= budget
    beaten = CutSolver(problem, bounds, StageMinima(problem, budget), starts, best.seconds)
    beaten.run()
    assert beaten.best is None
    assert beaten.bound_s == math.inf


def test_without_time_what_is_left_open_is_no_slower_than_the_best() -> None:
    left_open = 0
    for seed in range(60):
        problem, budget = one_chunk(seed)
        solver = PipelineSolver.of(problem, budget_bytes=int(budget) + problem.fixed_bytes)
        if solver is None:
            continue
        best, bound = solver.exact(math.inf)
        assert bound == math.inf
        late = PipelineSolver.of(
            problem, budget_bytes=int(budget) + problem.fixed_bytes, deadline=time.monotonic() - 1.0
        )
        assert late is not None
        found, bound = late.exact(math.inf)
        if best is not None and found is None:
            left_open += 1
            assert bound <= best.seconds * (1 + 1e-9)
    assert left_open > 20
