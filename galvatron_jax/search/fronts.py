"""What one stage can do: every choice of options for its layers that no other choice beats.

A label is a choice for the first layers of a stage: its seconds forward, backward and once a step, its bytes, and the
boundary class it ends in. Of labels that end in one class only the Pareto-optimal live on. Stages that begin alike
share their labels: a run of like layers is grown once, however many stages lie in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from galvatron_jax.cost.pipeline import residuals_kept
from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.pipeline import Pipeline, StageOptions

FORWARD, BACKWARD, ONCE, RESIDENT, RESIDUAL, WORKSPACE = range(6)
"""Columns of a label. `RESIDUAL` is kept apart only where chunks of one group pass through theirs in turn."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Choices for the first layers of a stage."""

    columns: np.ndarray
    """float64[labels, columns]: those above, and more where one program is looked for; bytes are whole numbers below
    2**53."""
    classes: np.ndarray
    """Boundary class of the last layer. int64[labels]"""
    parent: np.ndarray
    """Label of the layers before. int64[labels]"""
    option: np.ndarray
    """Option of the last layer. int64[labels]"""
    before: Labels | None
    complete: bool
    """Whether no label was dropped to save work."""

    def take(self, index: np.ndarray) -> Labels:
        """Some of the labels."""
        return Labels(
            self.columns[index], self.classes[index], self.parent[index], self.option[index], self.before, self.complete
        )

    def options(self, index: int) -> tuple[int, ...]:
        """The choice that a label stands for."""
        found, labels = [], self
        while labels is not None:
            found.append(int(labels.option[index]))
            index, labels = int(labels.parent[index]), labels.before
        return tuple(reversed(found))


@dataclass(frozen=True, eq=False)
class StageFront:
    """The Pareto-optimal choices of one virtual stage."""

    forward_s: np.ndarray
    """float64[points]"""
    backward_s: np.ndarray
    once_s: np.ndarray
    resident_bytes: np.ndarray
    """What the stage adds to its group's bytes all the time. float64[points]"""
    passing_bytes: np.ndarray
    """What it needs while it works. float64[points]"""
    options: Sequence[tuple[int, ...]]
    """Per point, one option per layer of the stage."""
    complete: bool
    """Whether no choice is missing."""
    program: np.ndarray | None = None
    """Where one program for all groups is looked for, what the stage needs of it: bytes in every flat array, in slots,
    of residuals outside of them, and while it works. float64[points, arrays + 3]"""

    def __len__(self) -> int:
        return len(self.forward_s)


@dataclass(frozen=True, eq=False)
class _Choices(Sequence[tuple[int, ...]]):
    """Options of points, traced back when they are asked for."""

    labels: Labels
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, point: Any) -> Any:
        return self.labels.options(int(self.rows[point]))


@dataclass(frozen=True)
class Limits:
    """What no label of a useful plan exceeds."""

    bytes: float
    load_s: float = np.inf
    """Seconds of one stage per micro-batch, its part of what is done once a step included."""
    labels: int = 3_000
    """Kept per layer; beyond it the front is not complete."""


@dataclass
class FrontBuilder:
    """Grows the fronts of one problem."""

    problem: Pipeline
    bounds: Bounds
    limits: Limits
    one_program: bool = False
    """Whether what stages need of one program for all groups is looked at, too."""
    grown: int = 0
    """Labels kept, over all layers."""
    _labels: dict[tuple[int, int], list[Labels]] = field(default_factory=dict, repr=False)
    _fronts: dict[tuple[int, int, int], StageFront] = field(default_factory=dict, repr=False)

    def front(self, stage: int, start: int, stop: int) -> StageFront:
        """The choices of a virtual stage that holds layers `start` to `stop - 1`."""
        key = (stage, start, stop)
        if key not in self._fronts:
            self._fronts[key] = self._finish(self._grow(stage, start, stop), stage, start, stop)
        return self._fronts[key]

    def _grow(self, stage: int, start: int, stop: int) -> Labels:
        """Labels of layers `start` to `stop - 1`; those of shorter stages are kept for longer ones."""
        problem, kept = self.problem, self.problem.residuals_kept(stage)
        found = self._labels.setdefault((stage, start), [])
        for layer in range(start + len(found), stop):
            options = problem.options(layer, start)
            if found:
                labels = self._extend(found[-1], options, problem.moves[layer - 1], kept)
            else:
                labels = self._root(options, start > 0, kept)
            found.append(self._prune(labels, stage, start, layer + 1))
        return found[stop - start - 1]

    def _own(self, options: StageOptions, kept: int) -> np.ndarray:
        """The columns that one layer's options add."""
        apart = self.problem.recomputes and self.problem.num_chunks > 1
        residual = options.residual_bytes.astype(float)
        resident = options.static_bytes + (0 if apart else kept) * residual
        columns = [
            options.forward_s, options.backward_s, options.once_s, resident,
            residual if apart else np.zeros(len(options)), options.workspace_bytes.astype(float),
        ]  # fmt: skip
        if self.one_program:
            assert options.flat_bytes is not None
            columns += [*options.flat_bytes.T.astype(float), residual]
        return np.stack(columns, axis=1)

    def _root(self, options: StageOptions, enters: bool, kept: int) -> Labels:
        columns = self._own(options, kept)
        if enters:
            columns[:, :2] += options.enter_s[options.boundary]
        count = len(options)
        return Labels(columns, options.boundary, np.full(count, -1), np.arange(count), None, complete=True)

    def _extend(self, labels: Labels, options: StageOptions, moves: np.ndarray, kept: int) -> Labels:
        own, pieces = self._own(options, kept), []
        for here in np.unique(options.boundary):
            members = np.flatnonzero(options.boundary == here)
            arrival = labels.columns.copy()
            arrival[:, :2] += moves[labels.classes, here]
            alive = pareto(arrival)
            shape = (len(alive), len(members))
            columns = arrival[alive][:, None] + own[members][None]
            columns[..., WORKSPACE] = np.maximum(arrival[alive][:, None, WORKSPACE], own[members][None, :, WORKSPACE])
            pieces.append(
                (
                    columns.reshape(-1, columns.shape[-1]),
                    np.full(shape[0] * shape[1], here),
                    np.broadcast_to(alive[:, None], shape).ravel(),
                    np.broadcast_to(members[None], shape).ravel(),
                )
            )
        columns, classes, parent, option = (np.concatenate(part) for part in zip(*pieces, strict=True))
        return Labels(columns, classes, parent, option, labels, labels.complete)

    def _prune(self, labels: Labels, stage: int, start: int, stop: int) -> Labels:
        """Drops labels of layers `start` to `stop - 1` that others beat, or that no stage of a useful plan begins as.

        However the stage goes on, it must reach far enough for the stages behind it not to take too long.
        """
        columns, priced = labels.columns, self.bounds.priced[stage]
        load, needed = self._load(columns, stage), columns[:, [RESIDENT, RESIDUAL, WORKSPACE]].sum(1)
        far = max(stop, self.bounds.shortest_stop(stage, start, self.limits.load_s))
        ahead = priced.total[:, far] - priced.total[:, stop] - priced.price * priced.limit[start]
        # Another chunk's residual may be the one that is held: it does not count for sure.
        sure = columns[:, RESIDENT] + columns[:, WORKSPACE]
        bound = (load[:, None] + priced.price * sure[:, None] + ahead).max(1)
        alive = (needed <= priced.limit[start]) & (bound <= self.limits.load_s * (1 + _ROUNDING))
        alive = np.flatnonzero(alive)
        labels, bound = labels.take(alive), bound[alive]
        kept = [
            members[pareto(labels.columns[members])]
            for members in (np.flatnonzero(labels.classes == here) for here in np.unique(labels.classes))
        ]
        index = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        complete = labels.complete
        if len(index) > self.limits.labels:
            # The most promising go on.
            index, complete = index[np.argsort(bound[index], kind="stable")[: self.limits.labels]], False
        self.grown += len(index)
        labels = labels.take(index)
        return Labels(labels.columns, labels.classes, labels.parent, labels.option, labels.before, complete)

    def _load(self, columns: np.ndarray, stage: int) -> np.ndarray:
        """Seconds per micro-batch: forward, backward, recomputation, and a part of what is done once a step."""
        problem = self.problem
        again = problem.recomputes and stage < problem.num_stages - 1
        once = columns[:, ONCE] / problem.num_microbatches
        return (2 if again else 1) * columns[:, FORWARD] + columns[:, BACKWARD] + once

    def _finish(self, labels: Labels, stage: int, start: int, stop: int) -> StageFront:
        problem, columns = self.problem, labels.columns.copy()
        last = stop == len(problem.layers)
        recomputed = columns[:, FORWARD].copy()
        if not last:
            columns[:, :2] += problem.options(stop - 1, start).leave_s[labels.classes]
        columns[:, ONCE] += problem.exchange_s(start, stop)
        columns[:, RESIDENT] += problem.kept_bytes(stage, start, stop)
        if problem.recomputes:
            columns[:, BACKWARD] += recomputed
            if last:
                columns[:, FORWARD] = 0.0
        columns[:, [FORWARD, BACKWARD]] += problem.passing[:, start, stop]
        passing = columns[:, RESIDUAL] + columns[:, WORKSPACE]
        program = self._program(columns, stage, start, stop) if self.one_program else None
        compared = columns[:, [FORWARD, BACKWARD, ONCE]]
        if program is not None:
            compared = np.concatenate([compared, program], 1)
        elif problem.num_chunks > 1:
            compared = np.concatenate([compared, columns[:, [RESIDENT]], passing[:, None]], 1)
        fits = np.flatnonzero(columns[:, RESIDENT] + passing <= self.limits.bytes)
        index = fits[pareto(compared[fits])]
        return StageFront(
            columns[index, FORWARD],
            columns[index, BACKWARD],
            columns[index, ONCE],
            columns[index, RESIDENT],
            passing[index],
            _Choices(labels, index),
            labels.complete,
            None if program is None else program[index],
        )

    def _program(self, columns: np.ndarray, stage: int, start: int, stop: int) -> np.ndarray:
        """See `StageFront.program`."""
        problem, flying = self.problem, self.problem.own_in_flight[stage]
        residual = columns[:, -1]
        made = problem.made_bytes(start, stop)
        outside = np.full(len(columns), float(made)) if problem.recomputes else residual + made
        inputs = flying * problem.cuts[start].bytes if start else 0
        pooled = inputs + (residuals_kept(flying, recomputes=problem.recomputes) - 1) * outside
        passing = columns[:, WORKSPACE] + (residual if problem.recomputes else 0.0)
        return np.concatenate([columns[:, WORKSPACE + 1 : -1], np.stack([pooled, outside, passing], 1)], 1)


_ROUNDING = 1e-12
_BLOCK = 128


def pareto(columns: np.ndarray) -> np.ndarray:
    """Rows that no other row beats: no column is larger there; of equal rows the first stays.

    Args:
        columns: float64[rows, columns], all to be small.

    Returns:
        Their indices, ascending by the sum of ranks in which they were found.
    """
    count = len(columns)
    if count <= 1:
        return np.arange(count)
    varying = np.flatnonzero(columns.max(0) > columns.min(0))
    if not len(varying):
        return np.zeros(1, np.int64)
    columns = columns[:, varying]
    if columns.shape[1] == 1:
        return np.array([int(np.argmin(columns[:, 0]))])
    if columns.shape[1] == 2:
        order = np.lexsort((columns[:, 1], columns[:, 0]))
        least = np.minimum.accumulate(columns[order, 1])
        return order[np.concatenate([[True], columns[order[1:], 1] < least[:-1]])]
    # Whoever beats a row has a smaller sum (but for rounding, which leaves a row too many).
    scaled = (columns - columns.min(0)) / (columns.max(0) - columns.min(0))
    order = np.lexsort((*scaled.T[::-1], scaled.sum(1)))
    return order[_sweep(columns[order])]


def _sweep(columns: np.ndarray) -> np.ndarray:
    """Rows of an array, sorted such that none is beaten by a later one, that no earlier one beats."""
    kept: list[np.ndarray] = []
    best = np.empty((0, columns.shape[1]))
    for first in range(0, len(columns), _BLOCK):
        block = columns[first : first + _BLOCK]
        rows = np.arange(first, first + len(block))
        if len(best):
            alive = ~_beaten(block, best)
            block, rows = block[alive], rows[alive]
        inner = (block[:, None] >= block[None]).all(2) & np.tri(len(block), k=-1, dtype=bool)
        alive = ~inner.any(1)
        kept.append(rows[alive])
        best = np.concatenate([best, block[alive]])
    return np.concatenate(kept)


def _beaten(block: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Rows of a block that some row of `best` beats or equals."""
    beaten = np.ones((len(block), len(best)), bool)
    for column in range(block.shape[1]):
        beaten &= block[:, column, None] >= best[None, :, column]
    return np.asarray(beaten.any(1))
