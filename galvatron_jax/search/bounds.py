"""Lower bounds of pipelines: what no cut and no choice of options undercuts.

A stage's seconds are at least the sum of its layers' cheapest options; and under a price of `mu` seconds per byte, at
least the cheapest sum of seconds and priced bytes, less the priced budget (Lagrangian relaxation of its memory limit,
as in `relaxation`). The slowest stage of the best cut follows by dynamic programming over those.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.search.pipeline import Pipeline

_PRICES = 8


@dataclass(frozen=True, eq=False)
class Bounds:
    """Lower bounds of one problem under one budget."""

    problem: Pipeline
    busy: np.ndarray
    """Forward and backward seconds of a stage over layers `start` to `stop - 1`; infinite where they do not fit.
    float64[stages, layers + 1, layers + 1]"""
    forward: np.ndarray
    """Seconds of the first layers' cheapest forwards. float64[layers + 1]"""
    backward: np.ndarray
    """The same backward, recomputation included."""
    once: np.ndarray
    """The same once a step."""
    left: np.ndarray
    """The slowest of the first stages over the first layers, cut best. float64[stages + 1, layers + 1]"""
    right: np.ndarray
    """The slowest of the last stages over the last layers, cut best. float64[stages + 1, layers + 1]"""
    share: tuple[np.ndarray, np.ndarray]
    """Per virtual stage, seconds of the step that a second of its forward, and of its backward, costs at least when
    every tick is shared out evenly over the groups that work in it. float64[stages]"""
    _rest: dict[tuple[int, int], tuple[np.ndarray, float]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, problem: Pipeline, budget_bytes: float) -> Bounds:
        """Bounds of a problem.

        Args:
            problem: the problem.
            budget_bytes: per device, without `Pipeline.fixed_bytes`.
        """
        tables = [_layer_table(problem, layer) for layer in range(len(problem.layers))]
        forward, backward, once = (_running([table[:, part].min() for table in tables]) for part in range(3))
        busy = np.stack([_busy(problem, tables, stage, budget_bytes) for stage in range(problem.num_stages)])
        return cls(problem, busy, forward, backward, once, _first(busy), _last(busy), _even_share(problem))

    # ------------------------------------------------------------------------------------------ of completions

    def rest(self, stage: int, layer: int) -> tuple[np.ndarray, float]:
        """What stages from `stage` over layers from `layer` take at least.

        Returns:
            Per kind of tick, seconds of its slowest group; and seconds once a step.
        """
        key = (stage, layer)
        if key not in self._rest:
            self._rest[key] = self._ticks(stage, layer), self._once(stage, layer)
        return self._rest[key]

    def _ticks(self, stage: int, layer: int) -> np.ndarray:
        problem, kinds = self.problem, self.problem.kinds
        floor = np.zeros(len(kinds.count))
        if problem.num_chunks > 1 or stage == problem.num_stages:
            return floor
        both = (kinds.forward & kinds.backward)[:, stage:].all(1)
        floor[both] = self.right[problem.num_stages - stage, layer]
        count = len(problem.layers)
        groups = problem.num_stages - stage
        for active, seconds in ((kinds.forward, self.forward), (kinds.backward, self.backward)):
            alone = active[:, stage:].all(1) & ~both
            floor[alone] = np.maximum(floor[alone], (seconds[count] - seconds[layer]) / groups)
        if problem.recomputes:
            # The last stage's forward is part of its backward.
            floor[kinds.forward[:, stage:].all(1) & ~kinds.backward[:, stage:].all(1)] = 0.0
        return floor

    def _once(self, stage: int, layer: int) -> float:
        left = self.problem.num_stages - stage
        if not left:
            return 0.0
        return float(self.once[-1] - self.once[layer]) / self.problem.degree

    def work(self, stage: int, layer: int) -> float:
        """Seconds of the step that the layers from `layer` cost at least, shared out evenly."""
        if stage == self.problem.num_stages:
            return 0.0
        forward, backward = (share[stage:].min() for share in self.share)
        own = forward * (self.forward[-1] - self.forward[layer]) + backward * (self.backward[-1] - self.backward[layer])
        return float(own)

    # ------------------------------------------------------------------------------------------ of stages

    def seconds(self) -> float:
        """Of the whole step."""
        floor, once = self.rest(0, 0)
        slowest = float(self.right[self.problem.num_stages, 0])
        ticks = max(float((floor * self.problem.kinds.count).sum()), self.problem.num_microbatches * slowest)
        if self.problem.num_chunks > 1 and np.isfinite(slowest):
            ticks = 0.0
        return max(ticks, self.work(0, 0)) + once

    def stage_seconds(self, stage: int, start: int, stop: int) -> float:
        """Of the whole step, when a virtual stage holds these layers."""
        count = self.problem.num_microbatches
        here = float(self.busy[stage, start, stop])
        if not np.isfinite(here):
            return here
        if self.problem.num_chunks > 1:
            return max(count * here, self.work(0, 0))
        after = len(self.problem.layers) - stop
        left = float(self.left[stage, start]) if stage else 0.0
        right = float(self.right[self.problem.num_stages - stage - 1, stop]) if after else 0.0
        return max(count * max(left, here, right), self.work(0, 0))

    def alone_seconds(self, stage: int, start: int, stop: int) -> float:
        """Of the whole step, by this stage alone: it grows with the stage."""
        return self.problem.num_microbatches * float(self.busy[stage, start, stop])

    def longest_stage(self, upper_s: float) -> float:
        """Forward and backward seconds of a stage in a step faster than `upper_s`."""
        return upper_s / self.problem.num_microbatches


def _layer_table(problem: Pipeline, layer: int) -> np.ndarray:
    """A layer's options: forward, backward (recomputation included), once, static and residual bytes."""
    options = problem.layers[layer]
    backward = options.backward_s + (options.forward_s if problem.recomputes else 0.0)
    repeat = problem.repeats[layer]
    static = options.static_bytes
    once = options.once_s
    if repeat is not None:
        static, once = np.minimum(static, repeat.static_bytes), np.minimum(once, repeat.once_s)
    return np.stack([options.forward_s, backward, once, static, options.residual_bytes], axis=1)


def _running(values: list[float]) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])


def _busy(problem: Pipeline, tables: list[np.ndarray], stage: int, budget_bytes: float) -> np.ndarray:
    """Least seconds of one virtual stage over every range of layers. float64[layers + 1, layers + 1]."""
    count, kept = len(tables), problem.residuals_kept(stage)
    limit = budget_bytes - problem.in_flight[stage] * np.array([cut.bytes for cut in problem.cuts] + [0.0])
    found = np.zeros((count + 1, count + 1))
    # Where chunks share a group, another chunk's residual may be the one that is held.
    kept = 0 if problem.recomputes and problem.num_chunks > 1 else kept
    own = []
    for table in tables:
        forward = table[:, 0] * (0.0 if problem.recomputes and stage == problem.num_stages - 1 else 1.0)
        own.append((forward + table[:, 1], table[:, 3] + kept * table[:, 4]))
    for price in (0.0, *_prices(own)):
        total = _running([(seconds + price * needed).min() for seconds, needed in own])
        bound = total[None, :] - total[:, None] - price * limit[:, None]
        found = np.maximum(found, bound)
    least = _running([needed.min() for _, needed in own])
    found[least[None, :] - least[:, None] > limit[:, None]] = np.inf
    return np.where(np.arange(count + 1)[None, :] > np.arange(count + 1)[:, None], found, np.inf)


def _prices(own: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Prices of a byte at which some layer would change its option: a spread of them."""
    slopes = []
    for seconds, needed in {id(pair[0]): pair for pair in own}.values():
        order = np.argsort(needed)
        seconds, needed = seconds[order], needed[order]
        best = np.minimum.accumulate(seconds)
        gain = best[:-1] - best[1:]
        step = np.diff(needed)
        slopes.append(gain[(gain > 0) & (step > 0)] / step[(gain > 0) & (step > 0)])
    every = np.unique(np.concatenate(slopes)) if slopes else np.zeros(0)
    if len(every) <= _PRICES:
        return every
    return every[np.linspace(0, len(every) - 1, _PRICES).astype(int)]


def _first(busy: np.ndarray) -> np.ndarray:
    """The slowest of the first stages over the first layers, cut best. float64[stages + 1, layers + 1]."""
    found = np.full((busy.shape[0] + 1, busy.shape[1]), np.inf)
    found[0, 0] = 0.0
    for stage in range(busy.shape[0]):
        found[stage + 1] = np.maximum(found[stage][:, None], busy[stage]).min(0)
    return found


def _last(busy: np.ndarray) -> np.ndarray:
    """The slowest of the last stages over the last layers, cut best. float64[stages + 1, layers + 1]."""
    found = np.full((busy.shape[0] + 1, busy.shape[1]), np.inf)
    found[0, -1] = 0.0
    for number in range(busy.shape[0]):
        found[number + 1] = np.maximum(busy[-1 - number], found[number][None, :]).min(1)
    return found


def _even_share(problem: Pipeline) -> tuple[np.ndarray, np.ndarray]:
    kinds, groups = problem.kinds, problem.degree
    active = (kinds.forward | kinds.backward).reshape(len(kinds.count), problem.num_chunks, groups).any(1).sum(1)
    weight = kinds.count / np.maximum(active, 1)
    return (weight[:, None] * kinds.forward).sum(0), (weight[:, None] * kinds.backward).sum(0)
