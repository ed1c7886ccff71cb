"""Every way to cut the layers that may hold the best plan, by what its stages take at least, exactly.

Branching is on the cuts: with the stages' exact minima few are left, and for each of them a step's least seconds follow
from those of its stages, in every tick and its mirror image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from galvatron_jax.search.bounds import Bounds, mirrored, slowest_first, slowest_last
from galvatron_jax.search.minima import StageMinima, Weight
from galvatron_jax.search.pipeline import Pipeline

MOST_CUTS = 400_000
"""Looked at; of more, none is."""
_BLOCK = 50_000
_BUSY = Weight(1.0, 1.0, 0.0)
"""Seconds forward and backward."""
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Cuts:
    """Cuts in order of what they take at least."""

    starts: np.ndarray
    """int64[cuts, stages]"""
    bound_s: np.ndarray
    """Seconds of a step that no options of a cut undercut. float64[cuts]"""


@dataclass
class CutFinder:
    """Finds the cuts of one problem with one virtual stage per group."""

    problem: Pipeline
    bounds: Bounds
    minima: StageMinima
    upper_s: float
    """Seconds to beat."""
    _busy: np.ndarray | None = None
    _exact: np.ndarray | None = None

    def find(self, aim_s: float) -> Cuts | None:
        """The cuts that may hold a plan faster than `aim_s`, up to `upper_s`; None where they are too many."""
        if self._busy is None or self._exact is None:
            self._busy = self._relaxed()
            self._exact = ~np.isfinite(self._busy)
        while True:
            found = _Placing.of(self.problem, self.bounds, self._busy, aim_s).run()
            # Only stages of cuts that are left need to be known exactly.
            wanted = ~self._exact if found is None else self._stages_of(found) & ~self._exact
            if not wanted.any():
                return found
            below = self.bounds.longest_stage(self.upper_s) * (1 + _ROUNDING)
            for stage, start, stop in np.argwhere(wanted).tolist():
                least = self.minima.least(stage, start, stop, _BUSY, below=below)
                self._busy[stage, start, stop] = least.seconds
            self._exact |= wanted

    def _stages_of(self, cuts: Cuts) -> np.ndarray:
        """Which layers each stage holds in some cut. bool[stages, layers + 1, layers + 1]."""
        count = len(self.problem.layers)
        found = np.zeros((self.problem.num_stages, count + 1, count + 1), bool)
        ends = np.concatenate([cuts.starts, np.full((len(cuts.starts), 1), count)], axis=1)
        for stage in range(self.problem.num_stages):
            found[stage, ends[:, stage], ends[:, stage + 1]] = True
        return found

    def _relaxed(self) -> np.ndarray:
        """Seconds forward and backward of every stage that may be of use, at least; infinite for others."""
        longest = self.bounds.longest_stage(self.upper_s)
        useful, below = self._useful(longest), longest * (1 + _ROUNDING)
        busy = np.full(useful.shape, np.inf)
        for stage, start, stop in np.argwhere(useful).tolist():
            busy[stage, start, stop] = self.minima.least(stage, start, stop, _BUSY, below=below, exact=False).seconds
        return busy

    def _useful(self, longest_s: float) -> np.ndarray:
        """Whether a stage of a useful plan may hold some layers. bool[stages, layers + 1, layers + 1]."""
        below, load = longest_s * (1 + _ROUNDING), self.bounds.load.copy()
        weight = Weight(1.0, 1.0, 1 / self.problem.num_microbatches)
        known = np.zeros(load.shape, bool)
        while True:
            slowest = np.maximum(slowest_first(load)[:-1, :, None], load)
            slowest = np.maximum(slowest, slowest_last(load)[-2::-1, None, :])
            useful = slowest < below
            new = np.argwhere(useful & ~known)
            if not len(new):
                return useful
            for stage, start, stop in new.tolist():
                found = self.minima.least(stage, start, stop, weight, below=below, exact=False).seconds
                load[stage, start, stop] = max(load[stage, start, stop], found)
            known |= useful


@dataclass(frozen=True, eq=False)
class _Placing:
    """Places stage after stage; beginnings that cost too much are dropped."""

    busy: np.ndarray
    """Least seconds forward and backward of a stage over layers `start` to `stop - 1`; infinite where it is of no use.
    float64[stages, layers + 1, layers + 1]"""
    once: np.ndarray
    """Least seconds once a step of the first layers. float64[layers + 1]"""
    upper_s: float
    sets: tuple[tuple[np.ndarray, float, float], ...]
    """Stages, bool[stages], with how often a tick takes at least what the slowest of them does; and what that is in
    any useful plan."""
    last: np.ndarray
    """The slowest of the last stages over the last layers, cut best. float64[stages + 1, layers + 1]"""

    @classmethod
    def of(cls, problem: Pipeline, bounds: Bounds, busy: np.ndarray, upper_s: float) -> _Placing:
        """Ready to place the first stage."""
        steady, pairs = mirrored(problem.kinds, recomputes=problem.recomputes)
        first, last = slowest_first(busy), slowest_last(busy)
        every = np.ones(problem.num_stages, bool)
        sets = [(who, ticks, _least_of(who, first, last)) for who, ticks in [(every, steady), *pairs]]
        return cls(busy, bounds.once, upper_s, tuple(sets), last)

    def run(self) -> Cuts | None:
        """The cuts that are left, and what they take at least; None where they are too many."""
        stages = self.busy.shape[0]
        starts, stop, seconds = np.zeros((1, 0), np.int32), np.zeros(1, np.int32), np.zeros((1, 0))
        once, bound = np.zeros(1), np.zeros(1)
        for stage in range(stages):
            useful = np.isfinite(self.busy[stage]) & np.isfinite(self.last[stages - stage - 1])
            row, after = np.nonzero(useful[stop])
            spent = np.maximum(once[row], self.once[after] - self.once[stop[row]])
            kept = []
            for block in np.split(np.arange(len(row)), range(_BLOCK, len(row), _BLOCK)):
                ends = stop[row[block]], after[block]
                grown = np.concatenate([seconds[row[block]], self.busy[stage][ends][:, None]], axis=1)
                least = self._bound(grown, after[block], spent[block])
                alive = np.flatnonzero(least < self.upper_s)
                kept.append((block[alive], grown[alive], least[alive]))
                if sum(len(one) for one, _, _ in kept) > MOST_CUTS:
                    return None
            index, seconds, bound = (np.concatenate(part) for part in zip(*kept, strict=True))
            row = row[index]
            starts = np.concatenate([starts[row], stop[row, None]], axis=1)
            stop, once = after[index], spent[index]
        order = np.argsort(bound, kind="stable")
        return Cuts(starts[order], bound[order])

    def _bound(self, seconds: np.ndarray, stop: np.ndarray, once: np.ndarray) -> np.ndarray:
        """Seconds of a step that some beginnings take at least. float64[beginnings].

        Args:
            seconds: of their stages. float64[beginnings, stages placed]
            stop: where they end. int64[beginnings]
            once: what their slowest stage takes once a step. float64[beginnings]
        """
        placed, found = seconds.shape[1], once.copy()
        behind = self.last[self.busy.shape[0] - placed, stop] if placed < self.busy.shape[0] else np.zeros(len(stop))
        for who, ticks, least in self.sets:
            slowest = seconds[:, who[:placed]].max(1, initial=least)
            found += ticks * (np.maximum(slowest, behind) if who[placed:].all() else slowest)
        return found


def _least_of(who: np.ndarray, first: np.ndarray, last: np.ndarray) -> float:
    """What the slowest of some stages takes at least, if they are the first ones or the last."""
    number, stages = int(who.sum()), len(who)
    if who[:number].all():
        # They hold at least the layers that leave room for the others.
        return float(first[number][np.isfinite(last[stages - number])].min(initial=np.inf))
    if who[-number:].all():
        return float(last[number][np.isfinite(first[stages - number])].min(initial=np.inf))
    return 0.0
