"""The exact optimum of a chain under a memory budget.

1. The largest workspace is enumerated: per threshold, options that need more are out and the rest of the budget is
   for what adds up. Together with the variants of tied parameters these are the *cases*.
2. Lagrangian relaxation of all cases at once gives lower bounds and good feasible plans; most cases end here.
3. What remains is closed exactly, best bound first, by labels (`labels.close_gap`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from galvatron_jax.search.chain import Chain, Solution, evaluate
from galvatron_jax.search.labels import close_gap
from galvatron_jax.search.relaxation import Cases, Paths, shortest_paths

TOLERANCE = 1e-12
"""Relative difference of seconds that counts as none: rounding of sums in another order."""
_MAX_STEPS = 60
_AT_FIRST = 600
"""Cases that are closed together first, times layers: short chains have few labels, and many cases."""
_TOGETHER = 20_000
"""Labels of cases that are closed together, about: more would gain nothing, and each may spare the next some."""


@dataclass(frozen=True)
class Outcome:
    """What solving a chain gave."""

    solution: Solution | None
    """The best that fits and beats the bound given; None when there is none."""
    proven: bool
    """Whether nothing better exists; False when time ran out."""
    labels: int = 0
    """Labels that closing the gap took."""


@dataclass
class _State:
    """The best so far."""

    chain: Chain
    upper_s: float
    best: Solution | None = None

    def offer(self, options: tuple[int, ...]) -> None:
        found = evaluate(self.chain, options)
        if found.seconds < self.upper_s:
            self.upper_s, self.best = found.seconds, found

    def offer_paths(self, paths: Paths, fits: np.ndarray) -> None:
        seconds = np.where(fits, paths.seconds, np.inf)
        if len(seconds) and seconds.min() < self.upper_s:
            self.offer(tuple(paths.options[int(np.argmin(seconds))]))

    def open(self, bound_s: np.ndarray) -> np.ndarray:
        return np.isfinite(bound_s) & (bound_s < self.upper_s * (1 - TOLERANCE))


@dataclass(frozen=True, eq=False)
class Relaxed:
    """A chain after relaxation: a good solution, and the cases in which there may be a better one."""

    chain: Chain
    solution: Solution | None
    """The best found that fits and beats the bound given."""
    cases: Cases
    limit_bytes: np.ndarray
    """Per case, for resident bytes. int64[cases]"""
    bound_s: np.ndarray
    """Per case, no solution is faster. float64[cases]"""
    multiplier: np.ndarray
    """Per case, the seconds per byte that gave the bound. float64[cases]"""

    @property
    def least_s(self) -> float:
        """No solution that is not known yet is faster."""
        return float(self.bound_s.min(initial=math.inf))


def solve(chain: Chain, *, budget_bytes: int, upper_s: float = math.inf, deadline: float | None = None) -> Outcome:
    """The fastest choice within a budget that is faster than `upper_s`.

    Args:
        chain: the problem.
        budget_bytes: for resident bytes and the largest workspace together.
        upper_s: only faster solutions count.
        deadline: of `time.monotonic()`, after which labels are no longer grown.
    """
    relaxed = relax(chain, budget_bytes=budget_bytes, upper_s=upper_s)
    known = relaxed.solution.seconds if relaxed.solution is not None else upper_s
    closed = close(relaxed, upper_s=known, deadline=deadline)
    return Outcome(closed.solution or relaxed.solution, closed.proven, closed.labels)


def relax(chain: Chain, *, budget_bytes: int, upper_s: float = math.inf) -> Relaxed:
    """Bounds from below, and a good solution, for all cases of a chain; arguments as `solve`."""
    state = _State(chain, upper_s)
    cases = _cases(chain)
    limit = budget_bytes - cases.workspace_bytes
    fast = shortest_paths(chain, cases, multiplier=0.0)
    state.offer_paths(fast, fast.resident_bytes <= limit)
    index = np.flatnonzero(state.open(fast.seconds) & (fast.resident_bytes > limit))
    cases, limit, fast = cases.take(index), limit[index], fast.take(index)
    small = shortest_paths(chain, cases, multiplier=1.0, seconds_weight=0.0)
    index = np.flatnonzero(np.isfinite(small.cost) & (small.resident_bytes <= limit))
    cases, limit, fast, small = cases.take(index), limit[index], fast.take(index), small.take(index)
    state.offer_paths(small, small.resident_bytes <= limit)
    bound, multiplier = _ascend(state, cases, limit, fast, small)
    index = np.flatnonzero(state.open(bound))
    return Relaxed(chain, state.best, cases.take(index), limit[index], bound[index], multiplier[index])


def close(relaxed: Relaxed, *, upper_s: float, deadline: float | None = None) -> Outcome:
    """The fastest solution of a relaxed chain that is faster than `upper_s`, the most promising case first."""
    state = _State(relaxed.chain, upper_s)
    proven, labels, together = True, 0, max(1, _AT_FIRST // len(relaxed.chain.layers))
    order = np.argsort(relaxed.bound_s, kind="stable")
    while len(order):
        order = order[state.open(relaxed.bound_s[order])]
        if not len(order):
            break
        if deadline is not None and time.monotonic() > deadline:
            proven = False
            break
        here, order = order[:together], order[together:]
        closed = close_gap(
            relaxed.chain,
            relaxed.cases.take(here),
            limit_bytes=relaxed.limit_bytes[here],
            multiplier=relaxed.multiplier[here],
            upper_s=state.upper_s * (1 - TOLERANCE),
            deadline=deadline,
        )
        labels += closed.labels
        proven &= closed.complete
        if closed.options is not None:
            state.offer(closed.options)
        together = max(1, min(4 * together, _TOGETHER * len(here) // max(closed.labels, 1)))
    return Outcome(state.best, proven, labels)


def fastest_seconds(chain: Chain) -> float:
    """Seconds of the fastest choice with unlimited memory: a lower bound for every budget."""
    return float(shortest_paths(chain, _unlimited(chain), multiplier=0.0).seconds.min())


def smallest(chain: Chain) -> Solution:
    """The choice that needs least memory."""
    cases = _cases(chain)
    paths = shortest_paths(chain, cases, multiplier=1.0, seconds_weight=0.0)
    bytes_needed = np.where(np.isfinite(paths.cost), paths.resident_bytes + cases.workspace_bytes, np.inf)
    return evaluate(chain, tuple(paths.options[int(np.argmin(bytes_needed))]))


def _cases(chain: Chain) -> Cases:
    """Every variant with every workspace that may be the largest."""
    distinct = {id(layer): layer for layer in chain.layers}.values()
    floor = max(int(layer.workspace_bytes.min()) for layer in distinct)
    sizes = np.unique(np.concatenate([layer.workspace_bytes for layer in distinct]))
    sizes = sizes[sizes >= floor]
    variants = np.arange(chain.num_variants)
    return Cases(np.repeat(variants, len(sizes)), np.tile(sizes, len(variants)))


def _unlimited(chain: Chain) -> Cases:
    variants = np.arange(chain.num_variants)
    return Cases(variants, np.full(len(variants), np.iinfo(np.int64).max))


def _ascend(state: _State, cases: Cases, limit: np.ndarray, fast: Paths, small: Paths) -> tuple[np.ndarray, np.ndarray]:
    """Lower bound and best multiplier per case, by Handler and Zang's secants.

    `fast` does not fit and `small` does: the multiplier that prices both alike is tried, the path found replaces
    one of them, until it finds nothing cheaper.
    """
    bound, multiplier = fast.seconds.copy(), np.zeros(len(cases))
    index = np.arange(len(cases))
    for _ in range(_MAX_STEPS):
        index = index[state.open(bound[index])]
        if not len(index):
            break
        left, right = fast.take(index), small.take(index)
        price = (right.seconds - left.seconds) / (left.resident_bytes - right.resident_bytes)
        price = np.maximum(price, 0.0)
        found = shortest_paths(state.chain, cases.take(index), multiplier=price)
        dual = found.cost - price * limit[index]
        better = dual > bound[index]
        bound[index] = np.where(better, dual, bound[index])
        multiplier[index] = np.where(better, price, multiplier[index])
        fits = found.resident_bytes <= limit[index]
        state.offer_paths(found, fits)
        _mix(state, left, right, limit[index])
        known = left.seconds + price * left.resident_bytes
        moving = found.cost < known * (1 - TOLERANCE)
        _replace(fast, index, found, moving & ~fits)
        _replace(small, index, found, moving & fits)
        index = index[moving]
    return bound, multiplier


def _replace(paths: Paths, index: np.ndarray, found: Paths, where: np.ndarray) -> None:
    target = index[where]
    paths.options[target] = found.options[where]
    paths.cost[target] = found.cost[where]
    paths.seconds[target] = found.seconds[where]
    paths.resident_bytes[target] = found.resident_bytes[where]


def _mix(state: _State, left: Paths, right: Paths, limit: np.ndarray) -> None:
    """Offers the paths that start as one and end as the other: most of a run of like layers can stay fast."""
    for one, other in ((left, right), (right, left)):
        seconds, resident = _crossings(state.chain, one.options, other.options)
        seconds = np.where(resident <= limit[:, None], seconds, np.inf)
        case, cut = np.unravel_index(int(np.argmin(seconds)), seconds.shape)
        if seconds[case, cut] < state.upper_s:
            state.offer(tuple(one.options[case, :cut]) + tuple(other.options[case, cut:]))


def _crossings(chain: Chain, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and resident bytes of `one[:cut] + other[cut:]` for every cut. [cases, layers + 1]."""
    walks = chain.walks
    head_s, head_bytes = walks.running(one)
    tail_s, tail_bytes = walks.running(other)
    seconds = head_s + tail_s[:, -1:] - tail_s
    seconds[:, 1:-1] += walks.moving(one, other)
    seconds[:, 1:-1] -= walks.moving(other, other)
    return seconds, head_bytes + tail_bytes[:, -1:] - tail_bytes
