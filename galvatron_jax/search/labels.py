"""Closing the gap between a lower bound and the best known plan, exactly, by labels.

A label is a choice for the first layers: its seconds, its bytes and the boundary class it ends in. Per layer and class
only Pareto-optimal labels live on, and of those only the ones whose completion could still fit and beat the best plan
known, by the relaxation's cost-to-go. With the relaxation's multiplier that leaves few (Beasley & Christofides,
"An algorithm for the resource constrained shortest path problem", 1989): so few that several cases are grown at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from galvatron_jax.search.chain import Chain, Options
from galvatron_jax.search.relaxation import Cases, allowed_options, best_per_class

_MAX_FRONT = 1_000_000
"""Labels kept per layer (some 50 bytes each): beyond it the result is no longer proven."""
_ROUNDING = 1e-13


@dataclass(frozen=True)
class Closed:
    """What the labels found."""

    options: tuple[int, ...] | None
    """A choice faster than the bound given, the fastest of all cases if `complete`."""
    complete: bool
    labels: int


@dataclass(frozen=True, eq=False)
class _Tails:
    """The best completions from every layer, case and class under one objective. [cases, classes] each."""

    cost: list[np.ndarray]
    seconds: list[np.ndarray]
    resident: list[np.ndarray]
    option: list[np.ndarray]
    """Option of the next layer."""


@dataclass(frozen=True, eq=False)
class _Front:
    """The labels after one layer."""

    seconds: np.ndarray
    resident: np.ndarray
    case: np.ndarray
    label: np.ndarray
    """Boundary class."""
    parent: np.ndarray
    """Index into the front before."""
    option: np.ndarray

    def take(self, index: np.ndarray) -> _Front:
        return _Front(
            self.seconds[index],
            self.resident[index],
            self.case[index],
            self.label[index],
            self.parent[index],
            self.option[index],
        )


@dataclass
class _Best:
    upper_s: float
    layer: int = -1
    index: int = -1
    tails: _Tails | None = None


@dataclass(frozen=True, eq=False)
class _Question:
    """The cases at hand."""

    chain: Chain
    cases: Cases
    limit: np.ndarray
    """float64[cases]"""
    multiplier: np.ndarray
    """float64[cases]"""
    tails: tuple[_Tails, ...]
    """By priced seconds, by seconds, and by bytes."""


def close_gap(
    chain: Chain,
    cases: Cases,
    *,
    limit_bytes: np.ndarray,
    multiplier: np.ndarray,
    upper_s: float,
    deadline: float | None = None,
) -> Closed:
    """The fastest choice of some cases that is faster than `upper_s`.

    Args:
        chain: the problem.
        cases: those looked at together.
        limit_bytes: for resident bytes, per case. int64[cases]
        multiplier: seconds per byte, per case; the closer to the dual optimum, the fewer labels. float64[cases]
        upper_s: seconds to beat.
        deadline: of `time.monotonic()`.
    """
    every, nothing = np.ones(len(cases)), np.zeros(len(cases))
    objectives = ((1.0, multiplier), (1.0, nothing), (0.0, every))
    tails = tuple(_tails(chain, cases, seconds_weight=weight, price=price) for weight, price in objectives)
    asked = _Question(chain, cases, limit_bytes, multiplier, tails)
    members = {id(layer): _Members.of(layer, cases) for layer in {id(each): each for each in chain.layers}.values()}
    best, fronts, complete, total = _Best(upper_s), [], True, 0
    for index, layer in enumerate(chain.layers):
        moves, before = chain.moves[index - 1] if index else None, fronts[-1] if fronts else None
        front = _prune(asked, _extend(members[id(layer)], moves, before), index, best.upper_s)
        group = front.case * layer.num_classes + front.label
        front = front.take(pareto_index(front.seconds, front.resident, group))
        if len(front.seconds) > _MAX_FRONT:
            priced = front.seconds + multiplier[front.case] * (front.resident - limit_bytes[front.case])
            front, complete = front.take(np.argpartition(priced, _MAX_FRONT)[:_MAX_FRONT]), False
        fronts.append(front)
        total += len(front.seconds)
        _offer(asked, front, index, best)
        if not len(front.seconds):
            break
        if deadline is not None and time.monotonic() > deadline:
            complete = False
            break
    return Closed(_choice(chain, fronts, best), complete, total)


def _tails(chain: Chain, cases: Cases, *, seconds_weight: float, price: np.ndarray) -> _Tails:
    count = len(chain.layers)
    last = np.zeros((len(cases), chain.layers[-1].num_classes))
    cost, seconds, resident = [last] * count, [last] * count, [last.astype(np.int64)] * count
    option = [last.astype(np.int64)] * count
    best: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    rows = np.arange(len(cases))[:, None]
    for index in range(count - 2, -1, -1):
        layer, moves = chain.layers[index + 1], chain.moves[index]
        if id(layer) not in best:
            own = seconds_weight * layer.seconds + price[:, None] * layer.resident_bytes
            best[id(layer)] = best_per_class(layer, np.where(allowed_options(layer, cases), own, np.inf))
        own, choice = best[id(layer)]
        arrival = seconds_weight * moves + (own + cost[index + 1])[:, None]
        target = np.argmin(arrival, axis=2)
        picked = choice[rows, target]
        cost[index] = np.take_along_axis(arrival, target[..., None], 2)[..., 0]
        seconds[index] = moves[np.arange(len(moves)), target] + layer.seconds[picked] + seconds[index + 1][rows, target]
        resident[index] = layer.resident_bytes[picked] + resident[index + 1][rows, target]
        option[index] = picked
    return _Tails(cost, seconds, resident, option)


@dataclass(frozen=True, eq=False)
class _Members:
    """The options of a layer that may be of use, by case and by the class that they end in."""

    option: np.ndarray
    """Case after case, class after class."""
    seconds: np.ndarray
    resident: np.ndarray
    group: np.ndarray
    """Case and class."""
    start: np.ndarray
    """Where the options of a case and class begin. int64[cases * classes]"""
    count: np.ndarray
    """And how many there are."""
    num_classes: int

    @classmethod
    def of(cls, layer: Options, cases: Cases) -> _Members:
        case, option = np.nonzero(allowed_options(layer, cases))
        group = case * layer.num_classes + layer.boundary[option]
        # Of those that end in one class, only what no other beats.
        kept = pareto_index(layer.seconds[option], layer.resident_bytes[option], group)
        option, group = option[kept], group[kept]
        count = np.bincount(group, minlength=len(cases) * layer.num_classes)
        start = np.cumsum(count) - count
        return cls(option, layer.seconds[option], layer.resident_bytes[option], group, start, count, layer.num_classes)


def _extend(members: _Members, moves: np.ndarray | None, front: _Front | None) -> _Front:
    """Every option of a layer behind every label that is worth extending to the option's class."""
    classes = members.num_classes
    if front is None or moves is None:
        nothing = np.full(len(members.option), -1)
        case, label = np.divmod(members.group, classes)
        return _Front(members.seconds, members.resident, case, label, nothing, members.option)
    group = (front.case[None] * classes + np.arange(classes)[:, None]).ravel()
    arrival, resident = (front.seconds + moves[front.label].T).ravel(), np.tile(front.resident, classes)
    useful = np.flatnonzero(members.count[group])
    alive = useful[pareto_index(arrival[useful], resident[useful], group[useful])]
    here = group[alive]
    count = members.count[here]
    # Each label that goes on, once for every option of the class it goes on to.
    pair = np.arange(len(alive)).repeat(count)
    option = np.arange(len(pair)) - (np.cumsum(count) - count - members.start[here])[pair]
    source = alive[pair]
    case, label = np.divmod(here[pair], classes)
    return _Front(
        arrival[source] + members.seconds[option],
        resident[source] + members.resident[option],
        case,
        label,
        source % len(front.seconds),
        members.option[option],
    )


def _prune(asked: _Question, front: _Front, index: int, upper_s: float) -> _Front:
    """Drops labels that no completion makes both fit and fast enough."""
    priced, fast, small = (tail.cost[index][front.case, front.label] for tail in asked.tails)
    limit = asked.limit[front.case]
    alive = front.resident + small <= limit
    alive &= front.seconds + fast < upper_s
    alive &= front.seconds + priced + asked.multiplier[front.case] * (front.resident - limit) < upper_s
    return front.take(np.flatnonzero(alive))


def pareto_index(seconds: np.ndarray, resident: np.ndarray, group: np.ndarray) -> np.ndarray:
    """What nothing in the same group beats in both seconds and bytes; in order of group and bytes."""
    count = len(seconds)
    order = np.lexsort((seconds, resident, group))
    ordered, group = seconds[order], group[order]
    ranking = np.argsort(ordered, kind="stable")
    rank = np.empty(count, np.int64)
    rank[ranking] = np.arange(count)
    # Groups ascend: less `count` for each, the least rank so far is the one of the group at hand.
    least = np.minimum.accumulate(rank - group * count) + group * count
    keep = np.ones(count, bool)
    fastest = ordered[ranking[least[:-1]]]
    keep[1:] = (ordered[1:] < fastest * (1 - _ROUNDING)) | (group[1:] != group[:-1])
    return order[keep]


def _offer(asked: _Question, front: _Front, index: int, best: _Best) -> None:
    """Completes every label the way each objective would, and keeps the fastest that fits."""
    where = front.case, front.label
    limit = asked.limit[front.case]
    for tail in asked.tails:
        seconds = front.seconds + tail.seconds[index][where]
        fits = (front.resident + tail.resident[index][where] <= limit) & np.isfinite(tail.cost[index][where])
        seconds = np.where(fits, seconds, np.inf)
        if len(seconds) and seconds.min() < best.upper_s:
            best.upper_s, best.layer, best.index, best.tails = float(seconds.min()), index, int(seconds.argmin()), tail


def _choice(chain: Chain, fronts: list[_Front], best: _Best) -> tuple[int, ...] | None:
    if best.tails is None:
        return None
    head, at, case = [], best.index, int(fronts[best.layer].case[best.index])
    for front in reversed(fronts[: best.layer + 1]):
        head.append(int(front.option[at]))
        at = int(front.parent[at])
    options = head[::-1]
    for index in range(best.layer, len(chain.layers) - 1):
        label = chain.layers[index].boundary[options[-1]]
        options.append(int(best.tails.option[index][case, label]))
    return tuple(options)
