"""Figures are medians of blocking calls, per repetition, whatever a call costs besides the work."""

import itertools
import time

import pytest

from galvatron_jax.profiler import timing
from galvatron_jax.profiler.timing import Sampling, sample


class Clock:
    """A clock that only the fake work advances."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def work(clock, *, each_s, call_s=0.0, noise=None):
    def run(count):
        clock.now += call_s + count * each_s + (next(noise) if noise else 0.0)

    return run


def test_the_figure_is_the_time_of_one_repetition_without_the_cost_of_a_call(clock):
    result = sample(work(clock, each_s=3e-3, call_s=0.7))
    assert result.median_s == pytest.approx(3e-3)
    assert result.spread_s == pytest.approx(0.0, abs=1e-9)


def test_short_work_is_repeated_until_a_sample_fills_the_window(clock):
    counts = []

    def run(count):
        counts.append(count)
        clock.now += 1e-5 * count

    sample(run, sampling=Sampling(window_s=0.01))
    assert max(counts) == pytest.approx(1000, rel=0.01)


def test_long_work_is_sampled_no_more_often_than_needed(clock):
    result = sample(work(clock, each_s=2.0), sampling=Sampling(budget_s=0.1, min_samples=3))
    assert result.samples == 3
    assert clock.now < 2.0 * 15


def test_the_number_of_samples_follows_the_budget(clock):
    result = sample(work(clock, each_s=0.01), sampling=Sampling(window_s=0.01, budget_s=0.4))
    assert 8 <= result.samples <= 12


def test_one_disturbed_sample_moves_the_spread_and_not_the_median(clock):
    disturbances = iter([0.0] * 8 + [5.0] + [0.0] * 100)
    result = sample(work(clock, each_s=0.01, noise=disturbances), sampling=Sampling(min_samples=8))
    assert result.median_s == pytest.approx(0.01)


def test_the_least_is_what_quick_samples_say(clock):
    disturbances = itertools.chain([0.0] * 6, itertools.cycle([0.0, 0.0, 5.0, 7.0]))
    result = sample(work(clock, each_s=0.01, call_s=1e-4, noise=disturbances), sampling=Sampling(min_samples=8))
    assert result.least_s == pytest.approx(0.01, rel=0.01)
    assert result.spread_s > 0.01


def test_a_figure_is_never_negative(clock):
    def run(count):
        clock.now += 0.05 if count == 1 else 0.04

    assert sample(run).median_s > 0


def test_sleeping_is_timed_as_long_as_it_lasts():
    result = sample(lambda count: time.sleep(0.004 * count), sampling=Sampling(budget_s=0.1))
    assert 0.0035 < result.median_s < 0.02
