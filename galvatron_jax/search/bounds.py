"""Lower bounds of pipelines: what no cut and no choice of options undercuts.

A stage's seconds are at least the sum of its layers' cheapest options; and under a price of `mu` seconds per byte, at
least the cheapest sum of seconds and priced bytes, less the priced budget (Lagrangian relaxation of its memory limit,
as in `relaxation`). The slowest stage of the best cut follows by dynamic programming over those. What a stage does
once a step counts with its seconds per micro-batch, shared out over the micro-batches: no option is fast at both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from galvatron_jax.cost.schedules import TickKinds
from galvatron_jax.search.pipeline import Pipeline

_PRICES = 40
_NEAR = 2
"""Prices on either side of the best one that bound a stage of some length."""
_LENGTHS = (0.5, 1.0, 1.5)
"""Of a stage, as parts of the average, that prices are chosen for."""
_TURNS = 40


@dataclass(frozen=True, eq=False)
class Priced:
    """Cheapest sums of a stage's layers when bytes have a price."""

    price: np.ndarray
    """Seconds per byte, ascending from zero. float64[prices]"""
    total: np.ndarray
    """Seconds and priced bytes of the first layers. float64[prices, layers + 1]"""
    least_bytes: np.ndarray
    """Of the first layers. float64[layers + 1]"""
    limit: np.ndarray
    """Bytes for layers of a stage that begins with each layer. float64[layers + 1]"""


@dataclass(frozen=True, eq=False)
class Bounds:
    """Lower bounds of one problem under one budget."""

    problem: Pipeline
    load: np.ndarray
    """Seconds per micro-batch of a stage over layers `start` to `stop - 1`: forward, backward, and its part of what is
    done once a step; infinite where they do not fit. float64[stages, layers + 1, layers + 1]"""
    forward: np.ndarray
    """Seconds of the first layers' cheapest forwards. float64[layers + 1]"""
    backward: np.ndarray
    """The same backward, recomputation included."""
    once: np.ndarray
    """The same once a step."""
    left: np.ndarray
    """The largest load of the first stages over the first layers, cut best. float64[stages + 1, layers + 1]"""
    right: np.ndarray
    """The largest load of the last stages over the last layers, cut best. float64[stages + 1, layers + 1]"""
    share: tuple[np.ndarray, np.ndarray]
    """Per virtual stage, seconds of the step that a second of its forward, and of its backward, costs at least when
    every tick is shared out evenly over the groups that work in it. float64[stages]"""
    priced: tuple[Priced, ...]
    """Per virtual stage, sums of loads over the first layers under several prices of a byte."""
    budget_bytes: float
    """Per device, without `Pipeline.fixed_bytes`."""
    _rest: dict[tuple[int, int], tuple[np.ndarray, float]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, problem: Pipeline, budget_bytes: float) -> Bounds:
        """Bounds of a problem.

        Args:
            problem: the problem.
            budget_bytes: per device, without `Pipeline.fixed_bytes`.
        """
        tables = LayerTables.of(problem)
        forward, backward, once = (tables.running(lambda table, part=part: table[:, part].min()) for part in range(3))
        priced = _price_all(problem, tables, budget_bytes, once=1 / problem.num_microbatches)
        load = _loads(problem, priced)
        return cls(
            problem, load, forward, backward, once, slowest_first(load), slowest_last(load), _even_share(problem),
            priced, budget_bytes,
        )  # fmt: skip

    @cached_property
    def busy(self) -> np.ndarray:
        """Forward and backward seconds of a stage over layers `start` to `stop - 1`; infinite where they do not fit.

        Returns:
            float64[stages, layers + 1, layers + 1]
        """
        priced = _price_all(self.problem, LayerTables.of(self.problem), self.budget_bytes, once=0.0)
        return _loads(self.problem, priced)

    @cached_property
    def _slowest(self) -> np.ndarray:
        """The slowest of the last stages over the last layers, cut best. float64[stages + 1, layers + 1]."""
        return slowest_last(self.busy)

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
        floor[both] = self._slowest[problem.num_stages - stage, layer]
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
        forward, backward = (share[stage:].copy() for share in self.share)
        least = backward.min()
        if self.problem.recomputes:
            # The last stage's forward is part of its backward; others repeat it there, at the same place as theirs.
            forward[-1] = 0.0
            extra = max(0.0, (forward + backward).min() - least)
        else:
            extra = forward.min()
        own = extra * (self.forward[-1] - self.forward[layer]) + least * (self.backward[-1] - self.backward[layer])
        return float(own)

    # ------------------------------------------------------------------------------------------ of stages

    def seconds(self) -> float:
        """Of the whole step."""
        return self.with_slowest(float(self.right[self.problem.num_stages, 0]))

    def stage_seconds(self, stage: int, start: int, stop: int) -> float:
        """Of the whole step, when a virtual stage holds these layers."""
        left = float(self.left[stage, start])
        right = float(self.right[self.problem.num_stages - stage - 1, stop])
        return self.with_slowest(max(left, float(self.load[stage, start, stop]), right))

    def with_slowest(self, load_s: float) -> float:
        """Of the whole step, when the largest load of a stage is no less."""
        return self._whole.with_slowest(load_s) if np.isfinite(load_s) else load_s

    @cached_property
    def _whole(self) -> _Whole:
        room = sum(float(stage.limit.max()) for stage in self.priced) / self.problem.num_chunks
        return _Whole(self.problem, _total_seconds(self.problem, self.priced[-1].limit, room))

    def alone_seconds(self, stage: int, start: int, stop: int) -> float:
        """Of the whole step, by this stage alone: it grows with the stage."""
        return self.problem.num_microbatches * float(self.load[stage, start, stop])

    def shortest_stop(self, stage: int, start: int, load_s: float) -> int:
        """Where a stage must end at least, for those behind it to have loads up to `load_s`."""
        rest = self.right[self.problem.num_stages - stage - 1]
        fits = np.flatnonzero(rest <= load_s)
        return max(start + 1, int(fits[0])) if len(fits) else len(self.problem.layers)

    def longest_stage(self, upper_s: float) -> float:
        """The load of a stage in a step faster than `upper_s`, at most."""
        if not np.isfinite(upper_s):
            return np.inf
        low, high = 0.0, upper_s / self.problem.num_microbatches
        if self.with_slowest(high) <= upper_s:
            return high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.with_slowest(middle) < upper_s else (low, middle)
        return high


def seconds_of_work(problem: Pipeline, budget_bytes: float) -> float:
    """Of the whole step, at least, by the layers' work alone: in a fraction of the time that `Bounds` take.

    Args:
        problem: the problem.
        budget_bytes: per device, without `Pipeline.fixed_bytes`.
    """
    limit = np.full(len(problem.layers) + 1, float(budget_bytes))
    return _Whole(problem, _total_seconds(problem, limit, budget_bytes * problem.degree)).with_slowest(0.0)


def _total_seconds(problem: Pipeline, limit: np.ndarray, room: float) -> float:
    """Forward and backward seconds of all stages together, at least.

    Args:
        problem: the problem.
        limit: bytes for layers of the last stage, by its first one. float64[layers + 1]
        room: bytes of all groups.
    """
    # Residuals weigh least in the last stage, which has the fewest micro-batches in flight.
    priced = _price(problem, LayerTables.of(problem), problem.num_stages - 1, limit, once=0.0)
    sends = sorted(cut.forward_s + cut.backward_s for cut in problem.cuts[1:])
    sent = sum(sends[: problem.num_stages - 1])
    if problem.num_stages > 1:
        # The first stage also waits for a gradient, and the last for a value.
        sent += min(cut.forward_s for cut in problem.cuts[1:]) + min(cut.backward_s for cut in problem.cuts[1:])
    return float(max(0.0, (priced.total[:, -1] - priced.price * room).max()) + sent)


@dataclass(frozen=True, eq=False)
class _Whole:
    """A step whose stages do some work together."""

    problem: Pipeline
    total_s: float
    """Forward and backward seconds of all stages, at least."""

    def with_slowest(self, load_s: float) -> float:
        """Of the step, when the largest load of a stage is no less."""
        return self._with_longest(max(load_s, self._turn_s))

    def _with_longest(self, busy_s: float) -> float:
        """Of the step, when the largest load of a stage is just this: a convex function of it."""
        steady, spread_over = self._spread
        spread = spread_over.cheapest(self.total_s, busy_s)
        return max(self.problem.num_microbatches * busy_s, steady * busy_s + spread)

    @cached_property
    def _chunk_ramp(self) -> tuple[float, np.ndarray]:
        """The same as `_ramp` where chunks share a group.

        While only forwards run, the first micro-batch passes one stage after another, and the last one comes back
        while only backwards run; the other ticks take at least what their groups work on average.
        """
        kinds, problem = self.problem.kinds, self.problem
        forward, backward = kinds.forward.any(1), kinds.backward.any(1)
        both = np.where(forward & backward, kinds.count, 0) / problem.degree
        often = [(both[:, None] * part).sum(0) for part in (kinds.forward, kinds.backward)]
        if problem.recomputes:
            often[0][-1] = often[1][-1]  # The last stage's forward is part of its backward.
        alone = np.ones(problem.num_stages)
        alone[-1] = 0.0
        return 0.0, alone + np.minimum(*often)

    @cached_property
    def _turn_s(self) -> float:
        """Work of the slowest stage at which the bound is least.

        Below it, a slower stage leaves room to move work to where the other ticks cost less.
        """
        low, high = self.total_s / self.problem.num_stages, self.total_s
        for _ in range(_TURNS):
            left, right = low + (high - low) / 3, high - (high - low) / 3
            low, high = (low, right) if self._with_longest(left) <= self._with_longest(right) else (left, high)
        return low

    @cached_property
    def _spread(self) -> tuple[float, _Spread]:
        if self.problem.num_chunks > 1:
            steady, weight = self._chunk_ramp
        else:
            steady, weight = _ramp(self.problem.kinds, self.problem.recomputes)
        return steady, _Spread.of(weight)


@lru_cache(maxsize=256)
def _ramp(kinds: TickKinds, recomputes: bool) -> tuple[float, np.ndarray]:
    """Ticks in which every group does both; and what a second of each stage costs at least in the others."""
    steady, pairs = mirrored(kinds, recomputes=recomputes)
    weight = np.zeros(kinds.forward.shape[1])
    for who, ticks in pairs:
        weight[who] += ticks / who.sum()
    return steady, weight


def mirrored(kinds: TickKinds, *, recomputes: bool) -> tuple[float, list[tuple[np.ndarray, float]]]:
    """Ticks and their mirror images.

    A tick's mirror image has backward where it has forward: together they take what their slowest stage takes for
    both, twice where it does both in both.

    Args:
        kinds: of a schedule with one stage per group.
        recomputes: whether the last stage's forward is part of its backward.

    Returns:
        Ticks in which every stage does both; and stages, bool[stages], with how often the others take at least what
        the slowest of those stages takes for both.
    """
    forward = kinds.forward.copy()
    if recomputes:
        forward[:, -1] |= kinds.backward[:, -1]
    compared = slice(None, -1) if recomputes else slice(None)
    steady, pairs = 0.0, []
    waiting: set[tuple] = set()
    for one, other, count in zip(forward, kinds.backward, kinds.count, strict=True):
        if one.all() and other.all():
            steady += count
            continue
        twin = (other[compared].tobytes(), one.tobytes(), int(count))
        if twin not in waiting:
            waiting.add((one[compared].tobytes(), other.tobytes(), int(count)))
            continue
        waiting.remove(twin)
        twice, once = one & other, one | other
        pairs.append((twice, 2.0 * count) if twice.any() else (once, float(count)))
    return steady, pairs


@dataclass(frozen=True, eq=False)
class _Spread:
    """Weights of the stages, ascending, to share out work over."""

    weight: np.ndarray
    """float64[stages]"""
    total: np.ndarray
    """Of the first ones. float64[stages + 1]"""

    @classmethod
    def of(cls, weight: np.ndarray) -> _Spread:
        """Sorts weights."""
        weight = np.sort(weight)
        return cls(weight, _running(weight))

    def cheapest(self, total: float, most: float) -> float:
        """Least of `weight @ load` over loads up to `most` each that sum to `total`."""
        full = min(int(total / most), len(self.weight)) if most > 0 else 0
        rest = (total - full * most) * float(self.weight[full]) if full < len(self.weight) else 0.0
        return most * float(self.total[full]) + max(0.0, rest)


@dataclass(frozen=True, eq=False)
class LayerTables:
    """The layers' options as rows; layers alike share one table.

    Columns: seconds forward, backward (recomputation included) and once a step; static, residual and workspace bytes.
    """

    tables: tuple[np.ndarray, ...]
    """float64[options, 6] each"""
    kind: np.ndarray
    """Table of each layer. int64[layers]"""

    @classmethod
    def of(cls, problem: Pipeline) -> LayerTables:
        """The tables of a problem."""
        keys = [(id(first), id(repeat)) for first, repeat in zip(problem.layers, problem.repeats, strict=True)]
        first = {key: layer for layer, key in reversed(list(enumerate(keys)))}
        number = {key: index for index, key in enumerate(first)}
        tables = tuple(_layer_table(problem, layer) for layer in first.values())
        return cls(tables, np.array([number[key] for key in keys]))

    def running(self, least: Callable[[np.ndarray], float]) -> np.ndarray:
        """Sums of some figure of the tables over the first layers. float64[layers + 1]."""
        return _running(np.array([least(table) for table in self.tables])[self.kind])


def _layer_table(problem: Pipeline, layer: int) -> np.ndarray:
    parts = [part for part in (problem.layers[layer], problem.repeats[layer]) if part is not None]
    rows = []
    for options in parts:
        backward = options.backward_s + (options.forward_s if problem.recomputes else 0.0)
        columns = [options.forward_s, backward, options.once_s, options.static_bytes, options.residual_bytes]
        columns.append(options.workspace_bytes)
        rows.append(np.stack(columns, axis=1))
    return np.concatenate(rows)


def _running(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])


def _price_all(problem: Pipeline, tables: LayerTables, budget_bytes: float, *, once: float) -> tuple[Priced, ...]:
    """Priced sums of every virtual stage.

    `once` says how much a second counts that is spent once a step.
    """
    cut = np.array([cut.bytes for cut in problem.cuts] + [0.0])
    found, alike = [], {}
    for stage in range(problem.num_stages):
        limit = budget_bytes - problem.in_flight[stage] * cut
        key = problem.residuals_kept(stage), stage == problem.num_stages - 1
        if key not in alike:
            alike[key] = _price(problem, tables, stage, limit, once=once)
        found.append(replace(alike[key], limit=limit))
    return tuple(found)


def _price(problem: Pipeline, tables: LayerTables, stage: int, limit: np.ndarray, *, once: float) -> Priced:
    # Where chunks share a group, another chunk's residual may be the one that is held.
    kept = 0 if problem.recomputes and problem.num_chunks > 1 else problem.residuals_kept(stage)
    alone = 0.0 if problem.recomputes and stage == problem.num_stages - 1 else 1.0
    own = [
        (alone * table[:, 0] + table[:, 1] + once * table[:, 2], table[:, 3] + kept * table[:, 4])
        for table in tables.tables
    ]
    price = np.concatenate([[0.0], _prices(own)])
    cheapest = np.stack([(seconds + price[:, None] * needed).min(1) for seconds, needed in own], axis=1)
    total = np.zeros((len(price), len(tables.kind) + 1))
    np.cumsum(cheapest[:, tables.kind], axis=1, out=total[:, 1:])
    least = _running(np.array([needed.min() for _, needed in own])[tables.kind])
    return Priced(price, total, least, limit)


def _useful(priced: Priced, stages: int) -> np.ndarray:
    """Prices that bound stages of about average length well. int64[useful]."""
    length = np.array(_LENGTHS)[:, None] / stages
    best = (priced.total[:, -1] * length - priced.price * np.median(priced.limit)).argmax(1)
    near = best[:, None] + np.arange(-_NEAR, _NEAR + 1)
    return np.unique(np.concatenate([[0], near.clip(0, len(priced.price) - 1).ravel()]))


def _loads(problem: Pipeline, priced: tuple[Priced, ...]) -> np.ndarray:
    """Least seconds of every virtual stage over every range of layers. float64[stages, layers + 1, layers + 1]."""
    size = len(problem.layers) + 1
    empty = np.tri(size, dtype=bool)
    found = np.empty((len(priced), size, size))
    for stage, one in enumerate(priced):
        useful = _useful(one, problem.num_stages)
        price, total = one.price[useful], one.total[useful]
        bound = total[:, None, :] - (total + price[:, None] * one.limit[None, :])[:, :, None]
        np.maximum(bound.max(0), 0.0, out=found[stage])
        needed = one.least_bytes[None, :] - one.least_bytes[:, None]
        found[stage][empty | (needed > one.limit[:, None])] = np.inf
    return found + problem.passing.sum(0)


def _prices(own: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Prices of a byte at which some layer would change its option: a spread of them."""
    slopes = []
    for seconds, needed in own:
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


def slowest_first(busy: np.ndarray) -> np.ndarray:
    """The slowest of the first stages over the first layers, cut best. float64[stages + 1, layers + 1]."""
    found = np.full((busy.shape[0] + 1, busy.shape[1]), np.inf)
    found[0, 0] = 0.0
    for stage in range(busy.shape[0]):
        found[stage + 1] = np.maximum(found[stage][:, None], busy[stage]).min(0)
    return found


def slowest_last(busy: np.ndarray) -> np.ndarray:
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
    forward, backward = ((weight[:, None] * part).sum(0) for part in (kinds.forward, kinds.backward))
    if problem.recomputes:
        forward[-1] = backward[-1]  # The last stage's forward is part of its backward.
    return forward, backward
