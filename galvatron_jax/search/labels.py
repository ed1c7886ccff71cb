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
    best, fronts, complete, total = _Best(upper_s), [], True, 0
    for index, layer in enumerate(chain.layers):
        front = _extend(layer, case, chain.moves[index - 1] if index else None, fronts[-1] if fronts else None)
        front = _prune(front, tails, index, limit_bytes, multiplier, best.upper_s)
        front = _pareto(front)
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


def _extend(layer: Options, case: Cases, moves: np.ndarray | None, front: _Front | None) -> _Front:
    allowed = np.flatnonzero(allowed_options(layer, case)[0])
    if front is None or moves is None:
        root = np.full(len(allowed), -1)
        return _Front(layer.seconds[allowed], layer.resident_bytes[allowed], layer.boundary[allowed], root, allowed)
    pieces = []
    for label in np.unique(layer.boundary[allowed]):
        members = allowed[layer.boundary[allowed] == label]
        arrival = front.seconds + moves[front.label, label]
        alive = _pareto_index(arrival, front.resident)
        shape = (len(alive), len(members))
        pieces.append(
            _Front(
                (arrival[alive][:, None] + layer.seconds[members][None]).ravel(),
                (front.resident[alive][:, None] + layer.resident_bytes[members][None]).ravel(),
                np.full(shape[0] * shape[1], label),
                np.broadcast_to(alive[:, None], shape).ravel(),
                np.broadcast_to(members[None], shape).ravel(),
            )
        )
    return _join(pieces)


def _join(pieces: list[_Front]) -> _Front:
    return _Front(
        np.concatenate([piece.seconds for piece in pieces]),
        np.concatenate([piece.resident for piece in pieces]),
        np.concatenate([piece.label for piece in pieces]),
        np.concatenate([piece.parent for piece in pieces]),
        np.concatenate([piece.option for piece in pieces]),
    )


def _prune(front: _Front, tails: list[_Tails], index: int, limit: int, multiplier: float, upper_s: float) -> _Front:
    """Drops labels that no completion makes both fit and fast enough."""
    priced, fast, small = (tail.cost[index][front.label] for tail in tails)
    alive = front.resident + small <= limit
    alive &= front.seconds + fast < upper_s
    alive &= front.seconds + priced + multiplier * (front.resident - limit) < upper_s
    return front.take(np.flatnonzero(alive))


def _pareto(front: _Front) -> _Front:
    """Per class, drops labels that another one beats in both seconds and bytes."""
    kept = []
    for label in np.unique(front.label):
        members = np.flatnonzero(front.label == label)
        kept.append(members[_pareto_index(front.seconds[members], front.resident[members])])
    return front.take(np.concatenate(kept)) if kept else front


def _pareto_index(seconds: np.ndarray, resident: np.ndarray) -> np.ndarray:
    order = np.lexsort((seconds, resident))
    ordered = seconds[order]
    keep = np.ones(len(order), bool)
    keep[1:] = ordered[1:] < np.minimum.accumulate(ordered)[:-1] * (1 - _ROUNDING)
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
