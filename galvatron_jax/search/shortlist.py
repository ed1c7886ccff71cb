"""Axes on demand: plans of one stage made of the axes alone that may matter.

Lagrangian relaxation of the memory limit bounds plans made of plain options and stand-ins (see `stand_ins`). Where a
stand-in may be in a plan that is faster than one known, its axes are opened, the most promising first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.step import fixed_bytes
from galvatron_jax.search.options import ChainBuilder
from galvatron_jax.search.problems import Chains, Effort, Problem, Progress, problems_of
from galvatron_jax.search.space import Axes, Rule, SearchSpace, batch_axes_for
from galvatron_jax.search.stand_ins import OpenedTables
from galvatron_jax.search.tables import Slot, Table, tie_variants

_CASES = 8
"""Ranges of the largest workspace, each with a bound of its own."""
_MAX_TURNS = 30
_ROUNDING = 1e-12
_NEAR = 1e-4
"""Before a plan is known, what may be in one this near to the bound is opened."""


def worthwhile_chains(
    costs: Sequence[CostModel],
    *,
    global_batch: int,
    memory_bytes: int,
    space: SearchSpace,
    effort: Effort,
    deadline: float | None,
    progress: Progress | None,
) -> tuple[Chains, float] | None:
    """Those of `build_problems` that may hold the fastest plan, and seconds of the fastest with unlimited memory.

    Returns:
        None where nothing is known to fit, and so all may.
    """
    done, built = Effort(), dict[tuple[int, int], list[Problem]]()
    lists = [Shortlist(OpenedTables(model, space, done.pruned), global_batch, memory_bytes) for model in costs]
    counts, best = space.microbatch_counts(global_batch), None
    for step, shortlist in enumerate(lists):
        if progress is not None:
            progress(step, len(lists) + 1, "planning layers without rematerialisation")
        for count in shortlist.promising(counts):
            problems = built[step, count] = shortlist.problems(count)
            first = Chains(problems, memory_bytes, done, deadline, best)
            first.relax(leaders=1)
            best = first.best
            if best is not None:
                break
    if best is None:
        return None
    if progress is not None:
        progress(len(lists), len(lists) + 1, "planning layers in full")
    found, unlimited = list[Problem](), math.inf
    for step, shortlist in enumerate(lists):
        for count in shortlist.worthwhile(counts, best.solution.seconds):
            problems = built[step, count] = shortlist.problems(count)
            found += problems
        unlimited = min(unlimited, shortlist.unlimited_s())
        done.planned += shortlist.tables.costs.table.planned
        done.count(shortlist.tables)
    done.problems = sum(map(len, built.values()))
    effort.add(done)
    found.sort(key=lambda problem: problem.bound_s)
    return Chains(found, memory_bytes, effort, deadline, best), unlimited


class BoundedLayer(NamedTuple):
    """Layers alike, with their priced options and then the stand-ins of the others."""

    kind: int
    number: int
    seconds: np.ndarray
    """Of a step. float64[options]"""
    resident_bytes: np.ndarray
    """int64[options]"""
    workspace_bytes: np.ndarray
    """int64[options]"""
    stands_for: tuple[Axes, ...]
    """Of the last options."""


@dataclass(frozen=True, eq=False)
class Bound:
    """What no plan with some number of micro-batches undercuts, moves between layers left out.

    The largest workspace is in one of several ranges: in each case the options are those that need no more than its
    end, and the room for what adds up is what its beginning leaves.
    """

    layers: tuple[BoundedLayer, ...]
    allowed: tuple[np.ndarray, ...]
    """Per layer. bool[cases, options] each"""
    price: np.ndarray
    """Seconds per byte that give the bounds. float64[cases]"""
    case_s: np.ndarray
    """float64[cases]"""
    unlimited_s: float
    """Of every plan with unlimited memory, at least."""

    @classmethod
    def of(cls, layers: Sequence[BoundedLayer], room_bytes: int) -> Bound:
        """The bound of layers that have together so much room."""
        floor = max(int(layer.workspace_bytes.min()) for layer in layers)
        sizes = np.unique(np.concatenate([layer.workspace_bytes for layer in layers]))
        ranges = np.array_split(sizes[sizes >= floor], min(_CASES, np.count_nonzero(sizes >= floor)))
        most = np.array([case[-1] for case in ranges])
        room = room_bytes - np.array([case[0] for case in ranges])
        allowed = tuple([layer.workspace_bytes <= most[:, None] for layer in layers])
        price, case_s = _ascend(layers, allowed, room)
        unlimited = sum([layer.number * float(layer.seconds.min()) for layer in layers])
        return cls(tuple(layers), allowed, price, case_s, unlimited)

    @property
    def seconds(self) -> float:
        """Of every plan, at least."""
        return float(self.case_s.min())

    def wanted(self, upper_s: float) -> dict[int, list[Axes]]:
        """Per layer kind, axes whose stand-ins may be in a plan faster than `upper_s`, the most promising first."""
        if math.isinf(upper_s):
            return {}  # Nothing fits.
        room = upper_s - self.case_s
        found: dict[int, dict[Axes, float]] = {}
        for layer, allowed in zip(self.layers, self.allowed, strict=True):
            if not layer.stands_for:
                continue
            cost = _priced(layer, allowed, self.price)
            more = cost[:, -len(layer.stands_for) :] - cost.min(axis=1, keepdims=True) - room[:, None]
            known = found.setdefault(layer.kind, {})
            for axes, short in zip(layer.stands_for, more.min(axis=0).tolist(), strict=True):
                if short < 0:
                    known[axes] = min(short, known.get(axes, math.inf))
        return {kind: sorted(known, key=known.__getitem__) for kind, known in found.items() if known}


def _ascend(
    layers: Sequence[BoundedLayer], allowed: Sequence[np.ndarray], room: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Per case the best price of a byte and the bound that it gives, by secants as in `layers`, but without moves."""
    price, none = np.zeros(len(room)), np.zeros(len(room))
    fast_s, fast_bytes = _cheapest(layers, allowed, none, np.ones(len(room)))
    small_s, small_bytes = _cheapest(layers, allowed, np.ones(len(room)), none)
    bound = np.where(small_bytes > room, np.inf, fast_s)
    moving = (fast_bytes > room) & (small_bytes <= room)
    for _ in range(_MAX_TURNS):
        if not moving.any():
            break
        trial = np.maximum((small_s - fast_s) / np.where(moving, fast_bytes - small_bytes, 1.0), 0.0)
        seconds, size = _cheapest(layers, allowed, trial, np.ones(len(room)))
        dual = seconds + trial * (size - room)
        better = moving & (dual > bound)
        bound, price = np.where(better, dual, bound), np.where(better, trial, price)
        moving &= seconds + trial * size < (fast_s + trial * fast_bytes) * (1 - _ROUNDING)
        above, below = moving & (size > room), moving & (size <= room)
        fast_s, fast_bytes = np.where(above, seconds, fast_s), np.where(above, size, fast_bytes)
        small_s, small_bytes = np.where(below, seconds, small_s), np.where(below, size, small_bytes)
    return price, bound


def _cheapest(
    layers: Sequence[BoundedLayer], allowed: Sequence[np.ndarray], price: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and bytes of each layer's cheapest options together, per case: float64[cases] both."""
    seconds, size = np.zeros(len(price)), np.zeros(len(price))
    for layer, mine in zip(layers, allowed, strict=True):
        pick = _priced(layer, mine, price, weight).argmin(axis=1)
        seconds += layer.number * layer.seconds[pick]
        size += layer.number * layer.resident_bytes[pick]
    return seconds, size


def _priced(
    layer: BoundedLayer, allowed: np.ndarray, price: np.ndarray, weight: np.ndarray | float = 1.0
) -> np.ndarray:
    """Weighed seconds and priced bytes of each option, per case. float64[cases, options]."""
    cost = np.multiply.outer(weight * np.ones_like(price), layer.seconds)
    cost += np.multiply.outer(price, layer.resident_bytes)
    return np.where(allowed, cost, np.inf)


@dataclass
class Shortlist:
    """Opens axes of one mesh."""

    tables: OpenedTables
    global_batch: int
    memory_bytes: int
    _builder: ChainBuilder = field(init=False, repr=False)
    _bounds: dict[int, Bound] = field(default_factory=dict, repr=False)
    """By number of micro-batches; what is opened later only raises them."""
    _fresh: set[int] = field(default_factory=set, repr=False)
    """Those bounds that nothing was opened after."""
    _surprises: int = 0
    """Times that all bounds had to be forgotten."""

    def __post_init__(self) -> None:
        self._builder = ChainBuilder(self.tables)

    # ------------------------------------------------------------------------------------------ what to solve

    def promising(self, counts: Sequence[int]) -> Iterator[int]:
        """Of some numbers of micro-batches, ascending, the one with the least bound once its axes are opened.

        Those that follow it are the others that have been looked at.
        """
        first = self._most_promising(counts)
        yield first
        for count in sorted(self._bounds, key=lambda each: self._bounds[each].seconds):
            if count != first and math.isfinite(self._bounds[count].seconds):
                yield count

    def _most_promising(self, counts: Sequence[int]) -> int:
        known = self._bounds
        while True:
            count = min(known, key=lambda each: known[each].seconds, default=counts[0])
            ahead = next((each for each in counts if each not in known), None)
            if ahead is not None and known and known[count].seconds > known[max(known)].unlimited_s:
                self._renew(ahead)
            elif count not in self._fresh:
                self._renew(count)
            else:
                wanted = known[count].wanted(known[count].seconds * (1 + _NEAR))
                if not wanted:
                    return count
                self._open({kind: axes[:1] for kind, axes in wanted.items()})

    def worthwhile(self, counts: Sequence[int], upper_s: float) -> list[int]:
        """Of some numbers of micro-batches, ascending, those with plans that may be faster than `upper_s`."""
        known, pruned = self._bounds, self.tables.pruned
        on_demand = self.tables.space.applies(Rule.MICROBATCHES_ON_DEMAND)
        while True:
            found, surprises = [], self._surprises
            for count in counts:
                if count not in known:
                    last = max(known, default=count)
                    if on_demand and count > last and known[last].unlimited_s >= upper_s:
                        break
                    self._renew(count)
                if known[count].seconds < upper_s:
                    self._settle(count, upper_s)
                    found += [count] if known[count].seconds < upper_s else []
            if surprises == self._surprises:
                break
        skipped, unpriced = len(set(counts) - set(known)), sum(self.tables.unpriced().values())
        pruned.update({Rule.MICROBATCHES_ON_DEMAND: skipped} if skipped else {})
        pruned.update({Rule.AXES_ON_DEMAND: unpriced} if unpriced else {})
        return found

    def problems(self, count: int) -> list[Problem]:
        """The problems with a number of micro-batches, as far as axes are open."""
        return list(problems_of(self._builder, self.global_batch, count))

    def unlimited_s(self) -> float:
        """Seconds of the fastest plan with unlimited memory."""
        found, known = math.inf, self._bounds
        for count in sorted(known, key=lambda each: known[each].unlimited_s):
            if known[count].unlimited_s >= found:
                break
            found = min([found, *(problem.bound_s for problem in self.problems(count))])
        return found

    # ------------------------------------------------------------------------------------------ opening

    def _settle(self, count: int, upper_s: float) -> None:
        """Opens axes until no more stand-ins may be in a plan with that many micro-batches faster than `upper_s`."""
        at_once = 1
        while True:
            if count not in self._fresh:
                self._renew(count)
            wanted = self._bounds[count].wanted(upper_s)
            if not wanted:
                return
            self._open({kind: axes[:at_once] for kind, axes in wanted.items()})
            at_once *= 2

    def _open(self, wanted: Mapping[int, Iterable[Axes]]) -> None:
        for kind, axes in wanted.items():
            self.tables.open(kind, axes)
        self._fresh.clear()
        self._builder = ChainBuilder(self.tables)

    def _renew(self, count: int) -> None:
        """Bounds the plans with a number of micro-batches by all that is open."""
        layouts = batch_axes_for(self.tables.costs.table.mesh, self.global_batch // count)
        batchings = [Batching(self.global_batch, count, axes) for axes in layouts]
        for batching in batchings:
            self._agree(batching)
        while surprising := self._surprising(batchings[0]):
            # Stand-ins on their other axes may have been too slow, and so all bounds.
            self._open(surprising)
            self._bounds.clear()
            self._surprises += 1
        fixed = min(fixed_bytes(self.tables.costs, batching) for batching in batchings)
        layers = [self._layer(slot, number, batchings) for slot, number in Counter(self.tables.slots).items()]
        self._bounds[count] = Bound.of(layers, self.memory_bytes - fixed)
        self._fresh.add(count)

    def _agree(self, batching: Batching) -> None:
        """Lets layers that share parameters repeat their work where no layouts of those agree."""
        slots, tied = dict.fromkeys(self.tables.slots), self.tables.costs.wiring.tied
        while not tie_variants([self.tables.table(slot, batching) for slot in slots], tied):
            if not self.tables.let_tied_repeat(batching):
                return
            self._builder = ChainBuilder(self.tables)

    def _surprising(self, batching: Batching) -> dict[int, tuple[Axes, ...]]:
        """Layer kinds of which some option is faster than the plain ones on its axes, with the axes not opened."""
        found, count = {}, batching.num_microbatches
        for slot in dict.fromkeys(self.tables.slots):
            table, closed = self.tables.table(slot, batching), self.tables.closed(slot.wiring.kind, batching)
            if closed and self.tables.surprises(slot.wiring.kind, table.strategies, _seconds(table, count)):
                found[slot.wiring.kind] = tuple(closed)
        return found

    def _layer(self, slot: Slot, number: int, batchings: Sequence[Batching]) -> BoundedLayer:
        tables = [self.tables.table(slot, batching) for batching in batchings]
        table, kind = tables[0], slot.wiring.kind
        seconds = np.min([_seconds(each, batchings[0].num_microbatches) for each in tables], axis=0)
        closed = self.tables.closed(kind, batchings[0])
        fastest = [seconds[options].min() for options in closed.values()]
        least = [self.tables.least(slot.wiring).memory.static_bytes] * len(closed)
        return BoundedLayer(
            kind,
            number,
            np.array([*seconds, *fastest]),
            np.array([*(table.static_bytes + table.residual_bytes), *least], np.int64),
            np.array([*table.workspace_bytes, *[0] * len(closed)], np.int64),
            tuple(closed),
        )


def _seconds(table: Table, count: int) -> np.ndarray:
    """Of a step with a number of micro-batches. float64[options]."""
    return count * (table.forward_s + table.backward_s) + table.once_s
