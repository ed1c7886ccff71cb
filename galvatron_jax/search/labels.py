"""Closing the gap between a lower bound and the best known plan, exactly, by labels.

A label is a choice for the first layers: its seconds, its bytes and the boundary class it ends in. Per layer and class
only Pareto-optimal labels live on, and of those only the ones whose completion could still fit and beat the best plan
known, by the relaxation's cost-to-go. With the relaxation's multiplier that leaves few (Beasley & Christofides,
"An algorithm for the resource constrained shortest path problem", 1989).
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
    """A choice faster than the bound given, the fastest there is if `complete`."""
    complete: bool
    labels: int


@dataclass(frozen=True, eq=False)
class _Tails:
    """The best completions from every (layer, class) under one objective."""

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
    label: np.ndarray
    """Boundary class."""
    parent: np.ndarray
    """Index into the front before."""
    option: np.ndarray

    def take(self, index: np.ndarray) -> _Front:
        return _Front(
            self.seconds[index], self.resident[index], self.label[index], self.parent[index], self.option[index]
        )


@dataclass
class _Best:
    upper_s: float
    layer: int = -1
    index: int = -1
    tails: _Tails | None = None


def close_gap(
    chain: Chain,
    case: Cases,
    *,
    limit_bytes: int,
    multiplier: float,
    upper_s: float,
    deadline: float | None = None,
) -> Closed:
    """The fastest choice of one case that is faster than `upper_s`.

    Args:
        chain: the problem.
        case: a single one.
        limit_bytes: for resident bytes.
        multiplier: seconds per byte; the closer to the dual optimum, the fewer labels.
        upper_s: seconds to beat.
        deadline: of `time.monotonic()`.
    """
    objectives = ((1.0, multiplier), (1.0, 0.0), (0.0, 1.0))
    tails = [_tails(chain, case, seconds_weight=weight, price=price) for weight, price in objectives]
    members = {id(layer): _Members.of(layer, case) for layer in {id(each): each for each in chain.layers}.values()}
    best, fronts, complete, total = _Best(upper_s), [], True, 0
    for index, layer in enumerate(chain.layers):
        moves, before = chain.moves[index - 1] if index else None, fronts[-1] if fronts else None
        front = _extend(members[id(layer)], moves, before)
        front = _prune(front, tails, index, limit_bytes, multiplier, best.upper_s)
        front = front.take(pareto_index(front.seconds, front.resident, front.label))
        if len(front.seconds) > _MAX_FRONT:
            keep = np.argpartition(front.seconds + multiplier * front.resident, _MAX_FRONT)[:_MAX_FRONT]
            front, complete = front.take(keep), False
        fronts.append(front)
        total += len(front.seconds)
        _offer(front, tails, index, limit_bytes, best)
        if not len(front.seconds):
            break
        if deadline is not None and time.monotonic() > deadline:
            complete = False
            break
    return Closed(_choice(chain, fronts, best), complete, total)


def _tails(chain: Chain, case: Cases, *, seconds_weight: float, price: float) -> _Tails:
    count = len(chain.layers)
    last = np.zeros(chain.layers[-1].num_classes)
    cost, seconds, resident = [last] * count, [last] * count, [last.astype(np.int64)] * count
    option = [last.astype(np.int64)] * count
    best: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for index in range(count - 2, -1, -1):
        layer, moves = chain.layers[index + 1], chain.moves[index]
        if id(layer) not in best:
            own = seconds_weight * layer.seconds + price * layer.resident_bytes
            table = best_per_class(layer, np.where(allowed_options(layer, case), own[None], np.inf))
            best[id(layer)] = table[0][0], table[1][0]
        own, choice = best[id(layer)]
        arrival = seconds_weight * moves + (own + cost[index + 1])[None]
        target = np.argmin(arrival, axis=1)
        picked = choice[target]
        rows = np.arange(len(target))
        cost[index] = arrival[rows, target]
        seconds[index] = moves[rows, target] + layer.seconds[picked] + seconds[index + 1][target]
        resident[index] = layer.resident_bytes[picked] + resident[index + 1][target]
        option[index] = picked
    return _Tails(cost, seconds, resident, option)


@dataclass(frozen=True, eq=False)
class _Members:
    """The options of a layer by the class that they end in."""

    option: np.ndarray
    """Class after class."""
    seconds: np.ndarray
    resident: np.ndarray
    classes: np.ndarray
    """Classes with options, ascending."""
    start: np.ndarray
    """Per class with options, where these begin."""
    count: np.ndarray

    @classmethod
    def of(cls, layer: Options, case: Cases) -> _Members:
        allowed = np.flatnonzero(allowed_options(layer, case)[0])
        option = allowed[np.argsort(layer.boundary[allowed], kind="stable")]
        classes, start, count = np.unique(layer.boundary[option], return_index=True, return_counts=True)
        return cls(option, layer.seconds[option], layer.resident_bytes[option], classes, start, count)


def _extend(members: _Members, moves: np.ndarray | None, front: _Front | None) -> _Front:
    """Every option of a layer behind every label that is worth extending to the option's class."""
    if front is None or moves is None:
        label = members.classes.repeat(members.count)
        return _Front(members.seconds, members.resident, label, np.full(len(label), -1), members.option)
    arrival = (front.seconds[:, None] + moves[front.label][:, members.classes]).T
    shape = arrival.shape
    group = np.broadcast_to(np.arange(shape[0])[:, None], shape).ravel()
    resident = np.broadcast_to(front.resident, shape).ravel()
    arrival = arrival.ravel()
    alive = pareto_index(arrival, resident, group)
    here = group[alive]
    count = members.count[here]
    # Each label that goes on, once for every option of the class it goes on to.
    pair = np.arange(len(alive)).repeat(count)
    option = np.arange(len(pair)) - (np.cumsum(count) - count - members.start[here])[pair]
    source = alive[pair]
    return _Front(
        arrival[source] + members.seconds[option],
        resident[source] + members.resident[option],
        members.classes[here[pair]],
        source % shape[1],
        members.option[option],
    )


def _prune(front: _Front, tails: list[_Tails], index: int, limit: int, multiplier: float, upper_s: float) -> _Front:
    """Drops labels that no completion makes both fit and fast enough."""
    priced, fast, small = (tail.cost[index][front.label] for tail in tails)
    alive = front.resident + small <= limit
    alive &= front.seconds + fast < upper_s
    alive &= front.seconds + priced + multiplier * (front.resident - limit) < upper_s
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


def _offer(front: _Front, tails: list[_Tails], index: int, limit: int, best: _Best) -> None:
    """Completes every label the way each objective would, and keeps the fastest that fits."""
    for tail in tails:
        seconds = front.seconds + tail.seconds[index][front.label]
        fits = (front.resident + tail.resident[index][front.label] <= limit) & np.isfinite(
            tail.cost[index][front.label]
        )
        seconds = np.where(fits, seconds, np.inf)
        if len(seconds) and seconds.min() < best.upper_s:
            best.upper_s, best.layer, best.index, best.tails = float(seconds.min()), index, int(seconds.argmin()), tail


def _choice(chain: Chain, fronts: list[_Front], best: _Best) -> tuple[int, ...] | None:
    if best.tails is None:
        return None
    head, at = [], best.index
    for front in reversed(fronts[: best.layer + 1]):
        head.append(int(front.option[at]))
        at = int(front.parent[at])
    options = head[::-1]
    for index in range(best.layer, len(chain.layers) - 1):
        label = chain.layers[index].boundary[options[-1]]
        options.append(int(best.tails.option[index][label]))
    return tuple(options)
