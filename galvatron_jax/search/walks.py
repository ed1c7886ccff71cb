"""Sums along many walks through a chain at once: one option per layer each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from galvatron_jax.search.chain import Chain


@dataclass(frozen=True, eq=False)
class Walks:
    """A chain's arrays laid end to end, so that one look-up serves all layers. Layers alike share their place."""

    seconds: np.ndarray
    """float64[options of all distinct layers]"""
    resident_bytes: np.ndarray
    """int64[options of all distinct layers]"""
    boundary: np.ndarray
    """int64[options of all distinct layers]"""
    layer_start: np.ndarray
    """Per layer, its place in these. int64[layers]"""
    moves: np.ndarray
    """float64[pairs of classes of all distinct moves]"""
    move_start: np.ndarray
    """Per layer but the first, the place of the moves before it. int64[layers - 1]"""
    move_width: np.ndarray
    """Per layer but the first, its classes. int64[layers - 1]"""

    @classmethod
    def through(cls, chain: Chain) -> Walks:
        """The arrays of a chain."""
        layers, layer_start = _end_to_end(chain.layers, [len(layer.seconds) for layer in chain.layers])
        moves, move_start = _end_to_end(chain.moves, [table.size for table in chain.moves])
        return cls(
            seconds=np.concatenate([layer.seconds for layer in layers]),
            resident_bytes=np.concatenate([layer.resident_bytes for layer in layers]),
            boundary=np.concatenate([layer.boundary for layer in layers]),
            layer_start=layer_start,
            moves=np.concatenate([table.ravel() for table in moves]) if moves else np.zeros(0),
            move_start=move_start,
            move_width=np.array([table.shape[1] for table in chain.moves], np.int64),
        )

    def running(self, options: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds (the move into each layer included) and bytes of the first layers. [walks, layers + 1].

        Args:
            options: one per layer. int64[walks, layers]
        """
        place = options + self.layer_start
        steps = self.seconds[place]
        steps[:, 1:] += self.moving(options, options)
        seconds, resident = (
            np.zeros((len(options), steps.shape[1] + 1)),
            np.zeros((len(options), steps.shape[1] + 1), np.int64),
        )
        np.cumsum(steps, axis=1, out=seconds[:, 1:])
        np.cumsum(self.resident_bytes[place], axis=1, out=resident[:, 1:])
        return seconds, resident

    def moving(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Seconds of the moves from each layer on one walk to the next layer on another. float64[walks, layers - 1].

        Args:
            before: the walks that are left. int64[walks, layers]
            after: the walks that are entered. int64[walks, layers]
        """
        leaving = self.boundary[before[:, :-1] + self.layer_start[:-1]]
        entering = self.boundary[after[:, 1:] + self.layer_start[1:]]
        return self.moves[self.move_start + leaving * self.move_width + entering]


def _end_to_end(tables: Sequence, sizes: Sequence[int]) -> tuple[list, np.ndarray]:
    """Distinct tables, and where each begins when they are laid end to end."""
    places: dict[int, int] = {}
    distinct, total = [], 0
    for table, size in zip(tables, sizes, strict=True):
        if id(table) not in places:
            places[id(table)] = total
            distinct.append(table)
            total += size
    return distinct, np.array([places[id(table)] for table in tables], np.int64)
