"""What the rest of a stage costs at least within the bytes that are left, exactly: from every layer to its end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from galvatron_jax.search.chain import Chain
from galvatron_jax.search.labels import pareto_index

_Front = tuple[np.ndarray, np.ndarray]
"""Resident bytes, ascending, and seconds, descending."""


@dataclass(frozen=True, eq=False)
class Suffixes:
    """Cheapest completions of one stage's chain."""

    fronts: tuple[tuple[_Front, ...], ...]
    """Per number of layers placed, and class of the last of them."""
    workspace: np.ndarray
    """The layers behind need this much at least. float64[layers + 1]"""
    limit_bytes: float

    @classmethod
    def of(cls, chain: Chain, *, limit_bytes: float, below: float) -> Suffixes:
        """Completions that some beginning may need.

        Args:
            chain: the stage.
            limit_bytes: for resident bytes and the largest workspace.
            below: whole choices count whose seconds are less.
        """
        layers = chain.layers
        least = np.array([layer.workspace_bytes.min() for layer in layers] + [0])
        workspace = np.maximum.accumulate(least[::-1])[::-1]
        fast = np.concatenate([[0.0], np.cumsum([layer.seconds.min() for layer in layers])])
        small = np.concatenate([[0], np.cumsum([layer.resident_bytes.min() for layer in layers])])
        room = limit_bytes - workspace[0]
        none: _Front = (np.zeros(1), np.zeros(1))
        fronts: list[tuple[_Front, ...]] = [(none,) * layers[-1].num_classes]
        for index in range(len(layers) - 1, 0, -1):
            own = _ahead(chain, index, fronts[-1])
            seconds, resident = (np.concatenate([part[place] for part in own]) for place in (1, 0))
            classes = np.repeat(np.arange(len(own)), [len(part[0]) for part in own])
            alive = (resident + small[index] <= room) & (seconds + fast[index] < below)
            seconds, resident, classes = seconds[alive], resident[alive], classes[alive]
            fronts.append(tuple(_arriving(seconds, resident, moves[classes]) for moves in chain.moves[index - 1]))
        return cls(tuple(reversed(fronts)), workspace, limit_bytes)

    def least(self, placed: int, classes: np.ndarray, resident: np.ndarray, workspace: np.ndarray) -> np.ndarray:
        """Seconds that the rest takes at least; infinite where it does not fit. float64[beginnings].

        Args:
            placed: layers placed.
            classes: of the last of them, for each of some beginnings. int64[beginnings]
            resident: bytes of each. float64[beginnings]
            workspace: its largest. float64[beginnings]
        """
        left = self.limit_bytes - resident - np.maximum(workspace, self.workspace[placed])
        found = np.full(len(classes), np.inf)
        for here in np.unique(classes):
            rows = np.flatnonzero(classes == here)
            needed, seconds = self.fronts[placed - 1][here]
            place = np.searchsorted(needed, left[rows], side="right") - 1
            fits = place >= 0
            found[rows[fits]] = seconds[place[fits]]
        return found


def _ahead(chain: Chain, index: int, behind: tuple[_Front, ...]) -> list[_Front]:
    """Per class of a layer, its options with what may come behind them."""
    layer, found = chain.layers[index], []
    for members, (needed, seconds) in zip(layer.by_class, behind, strict=True):
        both_bytes = (layer.resident_bytes[members][:, None] + needed).ravel()
        both = (layer.seconds[members][:, None] + seconds).ravel()
        kept = pareto_index(both, both_bytes, np.zeros(len(both), np.int64)) if len(both) else np.zeros(0, np.int64)
        found.append((both_bytes[kept], both[kept]))
    return found


def _arriving(seconds: np.ndarray, resident: np.ndarray, moves: np.ndarray) -> _Front:
    """What a layer of one class has before it, the move to the next layer included."""
    if not len(seconds):
        return np.zeros(0), np.zeros(0)
    seconds = seconds + moves
    kept = pareto_index(seconds, resident, np.zeros(len(seconds), np.int64))
    return resident[kept].astype(float), seconds[kept]
