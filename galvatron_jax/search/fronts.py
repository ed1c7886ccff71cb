"""What one stage can do: every choice of options for its layers that no other choice beats.

A label is a choice for the first layers of a stage: its seconds forward, backward and once a step, its bytes, and the
boundary class it ends in. Of labels that end in one class only the Pareto-optimal live on. Stages that begin alike
share their labels: a run of like layers is grown once, however many stages lie in it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.search.pipeline import Pipeline, StageOptions

FORWARD, BACKWARD, ONCE, RESIDENT, RESIDUAL, WORKSPACE = range(6)
"""Columns of a label. `RESIDUAL` is kept apart only where chunks of one group pass through theirs in turn."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Choices for the first layers of a stage."""

    columns: np.ndarray
    """float64[labels, 6]; bytes are whole numbers below 2**53."""
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
    labels: Labels
    index: np.ndarray
    """Per point, its label."""
    complete: bool

    def __len__(self) -> int:
        return len(self.index)

    def options(self, point: int) -> tuple[int, ...]:
        """One option per layer of the stage."""
        return self.labels.options(int(self.index[point]))


@dataclass(frozen=True)
class Limits:
    """What no label of a useful plan exceeds."""

    bytes: float
    busy_s: float = np.inf
    """Forward and backward seconds of one stage together."""
    labels: int = 4000
    """Kept per layer; beyond it the front is not complete."""


@dataclass
class FrontBuilder:
    """Grows the fronts of one problem."""

    problem: Pipeline
    limits: Limits
    grown: int = 0
    """Labels kept, over all layers."""
    _nodes: dict[Hashable, tuple[Labels, Hashable]] = field(default_factory=dict, repr=False)
    _fronts: dict[Hashable, StageFront] = field(default_factory=dict, repr=False)

    def front(self, stage: int, start: int, stop: int) -> StageFront:
        """The choices of a virtual stage that holds layers `start` to `stop - 1`."""
        problem = self.problem
        last = stop == len(problem.layers)
        labels, key = self._labels(stage, start, stop)
        exchange, kept = problem.exchange_s(start, stop), problem.kept_bytes(stage, start, stop)
        memo = (key, last, problem.cuts[start], None if last else problem.cuts[stop], exchange, kept)
        if memo not in self._fronts:
            self._fronts[memo] = self._finish(labels, start, stop, exchange, kept)
        return self._fronts[memo]

    def _labels(self, stage: int, start: int, stop: int) -> tuple[Labels, Hashable]:
        problem, kept = self.problem, self.problem.residuals_kept(stage)
        first = problem.options(start, start)
        key: Hashable = (id(first), start > 0, kept)
        if key not in self._nodes:
            self._nodes[key] = self._root(first, start > 0, kept), key
        labels, key = self._nodes[key]
        for layer in range(start + 1, stop):
            options, moves = problem.options(layer, start), problem.moves[layer - 1]
            extended = (key, id(options), id(moves))
            if extended not in self._nodes:
                # A short name, so that keys do not grow with the stage.
                self._nodes[extended] = self._extend(labels, options, moves, kept), len(self._nodes)
            labels, key = self._nodes[extended]
        return labels, key

    def _own(self, options: StageOptions, kept: int) -> np.ndarray:
        """The columns that one layer's options add."""
        apart = self.problem.recomputes and self.problem.num_chunks > 1
        residual = options.residual_bytes.astype(float)
        resident = options.static_bytes + (0 if apart else kept) * residual
        return np.stack(
            [
                options.forward_s, options.backward_s, options.once_s, resident,
                residual if apart else np.zeros(len(options)), options.workspace_bytes.astype(float),
            ],
            axis=1,
        )  # fmt: skip

    def _root(self, options: StageOptions, enters: bool, kept: int) -> Labels:
        columns = self._own(options, kept)
        if enters:
            columns[:, :2] += options.enter_s[options.boundary]
        count = len(options)
        labels = Labels(columns, options.boundary, np.full(count, -1), np.arange(count), None, complete=True)
        return self._prune(labels)

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
        return self._prune(Labels(columns, classes, parent, option, labels, labels.complete))

    def _prune(self, labels: Labels) -> Labels:
        columns, limits = labels.columns, self.limits
        needed = columns[:, RESIDENT] + columns[:, RESIDUAL] + columns[:, WORKSPACE]
        alive = (needed <= limits.bytes) & (columns[:, FORWARD] + columns[:, BACKWARD] <= limits.busy_s)
        labels = labels.take(np.flatnonzero(alive))
        kept = [
            members[pareto(labels.columns[members])]
            for members in (np.flatnonzero(labels.classes == here) for here in np.unique(labels.classes))
        ]
        index = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        complete = labels.complete
        if len(index) > limits.labels:
            busy = labels.columns[index, FORWARD] + labels.columns[index, BACKWARD]
            index, complete = _spread(index, busy, labels.columns[index, RESIDENT], limits.labels), False
        self.grown += len(index)
        labels = labels.take(index)
        return Labels(labels.columns, labels.classes, labels.parent, labels.option, labels.before, complete)

    def _finish(self, labels: Labels, start: int, stop: int, exchange_s: float, kept_bytes: int) -> StageFront:
        problem, columns = self.problem, labels.columns.copy()
        last = stop == len(problem.layers)
        recomputed = columns[:, FORWARD].copy()
        if not last:
            columns[:, :2] += problem.layers[stop - 1].leave_s[labels.classes]
            columns[:, FORWARD] += problem.cuts[stop].forward_s
        columns[:, BACKWARD] += problem.cuts[start].backward_s
        columns[:, ONCE] += exchange_s
        columns[:, RESIDENT] += kept_bytes
        if problem.recomputes:
            columns[:, BACKWARD] += recomputed
            if last:
                columns[:, FORWARD] = 0.0
        passing = columns[:, RESIDUAL] + columns[:, WORKSPACE]
        if problem.num_chunks == 1:
            fits = np.flatnonzero(columns[:, RESIDENT] + passing <= self.limits.bytes)
            index = fits[pareto(columns[fits][:, [FORWARD, BACKWARD, ONCE]])]
        else:
            fits = np.flatnonzero(columns[:, RESIDENT] + passing <= self.limits.bytes)
            both = np.concatenate([columns[fits][:, [FORWARD, BACKWARD, ONCE, RESIDENT]], passing[fits][:, None]], 1)
            index = fits[pareto(both)]
        return StageFront(
            columns[index, FORWARD],
            columns[index, BACKWARD],
            columns[index, ONCE],
            columns[index, RESIDENT],
            passing[index],
            labels,
            index,
            labels.complete,
        )


def _spread(index: np.ndarray, busy_s: np.ndarray, resident: np.ndarray, count: int) -> np.ndarray:
    """The fastest half and the smallest half of too many labels."""
    fast = np.argsort(busy_s, kind="stable")[: count // 2]
    small = np.argsort(resident, kind="stable")[: count - count // 2]
    return index[np.unique(np.concatenate([fast, small]))]


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
