"""Repeated, blocking measurement of a call, summed up as a median with its spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from galvatron_jax.profiler.processes import agree
from galvatron_jax.spec.profile import Timing


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How long and how often to measure one point.

    A sample is the difference between a call that does the work `1 + count` times and one that does it once,
    divided by `count`: what a call costs besides the work (dispatch, fresh memory for its outputs) cancels. The
    longer call is made to last about `window_s`, so that the clock weighs little, and as many samples are taken
    as fit into `budget_s`.
    """

    window_s: float = 0.02
    """Length of the longer call aimed at."""
    budget_s: float = 0.25
    """Time for all samples of a point, compilation and warm-up excluded."""
    min_samples: int = 3
    max_samples: int = 25
    max_count: int = 1000
    """Most repetitions inside one call."""


DEFAULT_SAMPLING = Sampling()


def sample(run: Callable[[int], object], *, sampling: Sampling = DEFAULT_SAMPLING) -> Timing:
    """Times `run(count)`, which does the work `count` times and returns only when it is done.

    The first calls are warm-up and not counted. In a job of several processes each calls this at the same place;
    all take the same number of samples and return what process 0 measured, so they decide alike after it.

    Args:
        run: Blocks until the work has ended, or the figure is a lie.
        sampling: Effort.

    Returns:
        Seconds per repetition.
    """
    run(1)
    count = _choose_count(run, sampling)
    once, more = _clock(run, 1), _clock(run, 1 + count)
    wanted = math.ceil(sampling.budget_s / max(once + more, 1e-9))
    total = int(agree(min(max(wanted, sampling.min_samples), sampling.max_samples)))
    pairs = np.array([(once, more)] + [(_clock(run, 1), _clock(run, 1 + count)) for _ in range(total - 1)])
    seconds = (pairs[:, 1] - pairs[:, 0]) / count
    low, median, high = np.percentile(seconds, (25, 50, 75))
    if median <= 0:  # Noise is larger than the work: the whole call bounds it from above.
        median = np.median(pairs[:, 1]) / (1 + count)
    least = pairs[:, 1].min() / (1 + count)  # A difference of two leasts would be far off where one was disturbed.
    median, spread, least = agree(np.array([median, high - low, least]))
    return Timing(median_s=float(median), spread_s=float(spread), samples=total, least_s=float(least))


def _choose_count(run: Callable[[int], object], sampling: Sampling) -> int:
    """Repetitions that fill the window; the second estimate sees through the dispatch that inflates the first."""
    once = float(agree(_clock(run, 1)))
    if once > sampling.window_s:
        return 1
    count = 2
    for _ in range(2):
        elapsed = _clock(run, count)
        wanted = math.ceil(count * sampling.window_s / max(elapsed, 1e-9))
        count = int(agree(min(max(count, wanted), sampling.max_count)))
    return count


def _clock(run: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start
