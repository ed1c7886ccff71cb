"""A lower bound of pipelines that weighs all stages: no stage can be relieved without another one paying for it.

A tick takes at least any weighted average of what its groups take, and what is done once a step at least any weighted
average of that. With the weights fixed, a step is bounded by a sum over stages, each under a price of a byte as in
`bounds`, and the best cuts follow by dynamic programming. The weights are those of a game against the cuts: whoever is
slow gains weight (Freund & Schapire, "Adaptive game playing using multiplicative weights", 1999).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from galvatron_jax.search.bounds import Bounds, LayerTables
from galvatron_jax.search.pipeline import Pipeline

_ROUNDS = 16
_PRICES = 7
_STEP = 2.0
_SHRINK = 0.9
"""Of the step, from round to round."""
_ROUNDING = 1e-9
FORWARD, BACKWARD, ONCE, STATIC, RESIDUAL, WORKSPACE = range(6)
"""Columns of the tables of options."""


@dataclass(frozen=True, eq=False)
class _Weights:
    """Which stages' seconds count."""

    ticks: np.ndarray
    """Shares of the groups in each kind of tick, by virtual stage. float64[kinds, stages]"""
    once: np.ndarray
    """Shares of the groups in what is done once a step. float64[stages]"""


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """The cheapest cuts and options under some weights."""

    seconds: float
    sums: np.ndarray
    """Seconds forward, backward and once a step of its stages. float64[stages, 3]"""
    starts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Balanced:
    """What the weighing gave."""

    seconds: float
    """No plan is faster than the least of this and the seconds to beat."""
    starts: tuple[tuple[int, ...], ...]
    """Cuts that were the cheapest in some round."""


@dataclass(frozen=True, eq=False)
class _Stages:
    """The stages of a problem that a step faster than `upper_s` may have."""

    problem: Pipeline
    layers: LayerTables
    limit: np.ndarray
    """Bytes for a stage's layers, by its first one. float64[stages, layers + 1]"""
    price: np.ndarray
    """Of a byte, where seconds per micro-batch count once. float64[stages, prices]"""
    open: np.ndarray
    """Whether a stage may end before a layer and begin some layers before. bool[stages, layers + 1, lengths]"""
    first: np.ndarray
    """First layer of a stage by its end and length, 0 where there is none. int64[layers + 1, lengths]"""

    @cached_property
    def where(self) -> tuple[np.ndarray, ...]:
        """Stage, end and length of what is open."""
        return self.open.nonzero()

    @classmethod
    def of(cls, problem: Pipeline, bounds: Bounds, upper_s: float) -> _Stages | None:
        """The stages; None where there is no way to cut."""
        slowest = np.maximum(bounds.left[:-1, :, None], bounds.load)
        slowest = np.maximum(slowest, bounds.right[-2::-1, None, :])
        wide = slowest <= bounds.longest_stage(upper_s) * (1 + _ROUNDING)
        stage, start, stop = np.nonzero(wide)
        if not len(stage):
            return None
        length = np.arange(1, int((stop - start).max()) + 1)
        begin = np.arange(wide.shape[1])[:, None] - length[None, :]
        first = np.maximum(begin, 0)
        return cls(
            problem,
            LayerTables.of(problem),
            np.stack([priced.limit for priced in bounds.priced]) - bounds.budget_bytes * (1 - 1 / problem.num_chunks),
            _best_prices(problem, bounds),
            wide[:, first, np.arange(wide.shape[1])[:, None]] & (begin >= 0),
            first,
        )

    def cheapest(self, weights: _Weights) -> _Relaxed:
        """The cheapest cuts and options under some weights."""
        kinds, problem = self.problem.kinds, self.problem
        share = kinds.count[:, None] * weights.ticks
        forward, backward = ((share * active).sum(0) for active in (kinds.forward, kinds.backward))
        price = self.price * ((forward + backward) / (2 * problem.num_microbatches))[:, None]
        if problem.num_chunks > 1:
            # The chunks of a group share its bytes, so they share the price of one.
            price = price.reshape(problem.num_chunks, problem.degree, -1).mean(0)
            price = np.tile(price, (problem.num_chunks, 1))
        cost, choice = self._cost(np.stack([forward, backward, weights.once], axis=1), price)
        value = np.full(len(self.limit[0]), np.inf)
        value[0] = 0.0
        lengths = []
        for stage in range(problem.num_stages):
            arrival = value[self.first] + cost[stage]
            lengths.append(arrival.argmin(1))
            value = arrival.min(1)
        if not math.isfinite(value[-1]):
            return _Relaxed(math.inf, np.zeros((problem.num_stages, 3)), ())
        return self._trace(float(value[-1]), lengths, choice)

    def _cost(self, weight: np.ndarray, price: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Weighted seconds of every stage, by end and length; and what was chosen for them."""
        kept = np.array([self._kept(stage) for stage in range(len(weight))])
        least, least_first, chosen, chosen_first = [], [], [], []
        for table in self.layers.tables:
            seconds = weight @ table[:, : ONCE + 1].T
            resident = table[:, STATIC] + kept[:, None] * table[:, RESIDUAL]
            cost = seconds[:, None] + price[..., None] * resident[:, None]
            # A stage's first layer stands for its workspace.
            with_workspace = cost + price[..., None] * table[:, WORKSPACE]
            for every, values, picks in ((cost, least, chosen), (with_workspace, least_first, chosen_first)):
                picks.append(every.argmin(-1))
                values.append(np.take_along_axis(every, picks[-1][..., None], -1)[..., 0])
        layers = np.stack(least, axis=-1)[..., self.layers.kind]
        extra = np.stack(least_first, axis=-1)[..., self.layers.kind] - layers
        total = np.concatenate([np.zeros((*price.shape, 1)), layers.cumsum(-1)], axis=-1)
        begin = np.concatenate([extra, np.zeros((*price.shape, 1))], axis=-1) - total
        begin -= price[..., None] * self.limit[:, None]
        # Few ends and lengths are open to each stage.
        stage, stop, length = where = self.where
        start = self.first[stop, length]
        found = total[stage, :, stop] + begin[stage, :, start]
        best = np.zeros(self.open.shape, np.int64)
        best[where] = found.argmax(1)
        least = np.maximum(found.max(1), 0.0) if self.problem.num_chunks == 1 else found.max(1)
        there, back = self.problem.passing[:, start, stop]
        cost = np.full(self.open.shape, np.inf)
        cost[where] = least + weight[stage, 0] * there + weight[stage, 1] * back
        return cost, (best, np.stack(chosen, axis=-1), np.stack(chosen_first, axis=-1))

    def _kept(self, stage: int) -> int:
        # Where chunks share a group, another chunk's residual may be the one that is held.
        return 0 if self.problem.recomputes and self.problem.num_chunks > 1 else self.problem.residuals_kept(stage)

    def _trace(self, seconds: float, lengths: list[np.ndarray], choice: tuple[np.ndarray, ...]) -> _Relaxed:
        best, chosen, chosen_first = choice
        stop, sums, starts = len(self.layers.kind), np.zeros((len(lengths), 3)), []
        for stage in range(len(lengths) - 1, -1, -1):
            length = int(lengths[stage][stop])
            start, price = int(self.first[stop, length]), int(best[stage, stop, length])
            for layer in range(start, stop):
                kind = self.layers.kind[layer]
                pick = (chosen_first if layer == start else chosen)[stage, price, kind]
                sums[stage] += self.layers.tables[kind][pick, : ONCE + 1]
            sums[stage, :2] += self.problem.passing[:, start, stop]
            starts.append(start)
            stop = start
        return _Relaxed(seconds, sums, tuple(reversed(starts)))


def balanced(problem: Pipeline, bounds: Bounds, *, upper_s: float) -> Balanced:
    """Weighs the stages until no plan is faster than `upper_s`, or the bound grows no more.

    Args:
        problem: the problem.
        bounds: its own.
        upper_s: seconds to beat.
    """
    least = bounds.seconds()
    stages = _Stages.of(problem, bounds, upper_s) if least < upper_s else None
    if stages is None:
        return Balanced(math.inf, ())
    weights, starts = _even(problem), {}
    for number in range(_ROUNDS):
        found = stages.cheapest(weights)
        least = max(least, found.seconds)
        if least >= upper_s:
            break
        starts[found.starts] = None
        weights = _heavier(problem, weights, found, _STEP * _SHRINK**number)
    return Balanced(least, tuple(starts))


def _even(problem: Pipeline) -> _Weights:
    """Alike for all groups that do both in a tick, or where none does, for all that work."""
    kinds, degree = problem.kinds, problem.degree
    shape = (len(kinds.count), problem.num_chunks, degree)
    forward, backward = (active.reshape(shape).any(1) for active in (kinds.forward, kinds.backward))
    both = np.asarray(forward & backward)
    who = np.where(both.sum(1, keepdims=True) > 0, both, forward | backward).astype(float)
    who /= np.maximum(who.sum(1, keepdims=True), 1.0)
    return _Weights(np.tile(who, (1, problem.num_chunks)), np.full(problem.num_stages, 1 / degree))


def _heavier(problem: Pipeline, weights: _Weights, found: _Relaxed, step: float) -> _Weights:
    """More weight on what was slow."""
    kinds, chunks, degree = problem.kinds, problem.num_chunks, problem.degree
    forward_s, backward_s, once_s = found.sums.T
    ticks = kinds.forward * forward_s + kinds.backward * backward_s
    ticks = ticks.reshape(len(ticks), chunks, degree).sum(1)
    once = once_s.reshape(chunks, degree).sum(0)
    return _Weights(
        np.tile(_moved(weights.ticks[:, :degree], ticks, step), (1, chunks)),
        np.tile(_moved(weights.once[:degree], once, step), chunks),
    )


def _moved(share: np.ndarray, seconds: np.ndarray, step: float) -> np.ndarray:
    """Shares multiplied by what grows with the seconds."""
    least = np.maximum(share, 1e-4 / share.shape[-1]) * (seconds > 0)
    most = np.maximum(seconds.max(-1, keepdims=True), 1e-300)
    grown = least * np.exp(step * (seconds / most - 1.0))
    total = grown.sum(-1, keepdims=True)
    return np.where(total > 0, grown / np.where(total > 0, total, 1.0), share)


def _best_prices(problem: Pipeline, bounds: Bounds) -> np.ndarray:
    """Per stage, the prices about the one that bounds a stage of average length best. float64[stages, prices]."""
    found = []
    for priced in bounds.priced:
        room = float(np.median(priced.limit)) - bounds.budget_bytes * (1 - 1 / problem.num_chunks)
        value = priced.total[:, -1] / problem.num_stages - priced.price * room
        best = int(np.argmax(value))
        if problem.num_chunks > 1:
            found.append(priced.price[[best]])
            continue
        low = max(0, min(best - _PRICES // 2, len(priced.price) - _PRICES + 1))
        near = priced.price[low : low + _PRICES - 1]
        found.append(np.concatenate([np.zeros(_PRICES - len(near)), near]))
    return np.stack(found) * problem.num_microbatches
