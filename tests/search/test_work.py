"""What a step computes at least, against schedules played with random parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.cost.pipeline import Pipelining
from galvatron_jax.cost.schedules import makespan, recomputes, tick_kinds
from galvatron_jax.search.work import Work
from galvatron_jax.spec.plan import MeshAxis, Schedule

SEEDS = st.integers(0, 2**32 - 1)
SCHEDULES = (Schedule.ONE_F_ONE_B_STASH, Schedule.ONE_F_ONE_B, Schedule.GPIPE, Schedule.INTERLEAVED)


def pipelining(schedule: Schedule, degree: int) -> Pipelining:
    chunks = 2 if schedule is Schedule.INTERLEAVED else 1
    return Pipelining(schedule, (MeshAxis(name="p", size=degree, level="intra"),), chunks)


def played(one: Pipelining, count: int, forward_s: float, backward_s: float, parts: np.ndarray) -> float:
    """Seconds of a step whose stages do these parts of the work."""
    kinds = tick_kinds(one.schedule, num_stages=one.degree, num_microbatches=count, num_chunks=one.num_chunks)
    again = forward_s if recomputes(one.schedule) else 0.0
    return float(makespan(kinds, forward_s * parts, (backward_s + again) * parts))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(SCHEDULES), st.sampled_from([2, 3, 4, 8, 20]), st.integers(1, 70), SEEDS)
def test_no_parts_take_less_than_the_least_work(schedule: Schedule, degree: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, forward_s, backward_s = pipelining(schedule, degree), rng.uniform(0.1, 1), rng.uniform(0.1, 2)
    work = Work(forward_s, backward_s, count)
    for spread in (0.01, 0.3, 3.0):
        parts = np.exp(rng.normal(0, spread, degree * one.num_chunks))
        parts /= parts.sum()
        seconds = played(one, count, forward_s, backward_s, parts)
        assert work.least_s(one) <= seconds
        assert work.undercuts(one, seconds * (1 + 1e-9))


@pytest.mark.parametrize("count", [17, 48, 200])
def test_stages_alike_reach_the_least_work_of_a_full_pipeline(count: int) -> None:
    one = pipelining(Schedule.ONE_F_ONE_B_STASH, 8)
    assert Work(1.0, 2.0, count).least_s(one) == pytest.approx(
        played(one, count, 1.0, 2.0, np.full(8, 1 / 8)), rel=1e-5
    )
    assert Work(1.0, 2.0, count).even_s(8) == pytest.approx(3.0 / 8 * (count + 7))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(SEEDS)
def test_one_forward_one_backward_beats_gpipe_whatever_the_stages(seed: int) -> None:
    rng = np.random.default_rng(seed)
    degree, count = int(rng.integers(2, 9)), int(rng.integers(1, 40))
    forward, backward = rng.uniform(0, 3, (2, degree))
    stash, gpipe = (
        makespan(tick_kinds(schedule, num_stages=degree, num_microbatches=count), forward, backward)
        for schedule in (Schedule.ONE_F_ONE_B_STASH, Schedule.GPIPE)
    )
    assert stash <= gpipe * (1 + 1e-12)
