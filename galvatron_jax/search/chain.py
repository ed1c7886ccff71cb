"""The problem that the layer search solves, as arrays: a chain of layers, each with options.

Minimise the sum of seconds (of options, and of moves between neighbours' boundary classes) subject to
`sum(resident bytes) + max(workspace bytes) <= budget` and to one common variant for tied layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from galvatron_jax.search.walks import Walks
from galvatron_jax.spec.strategy import LayerStrategy


@dataclass(frozen=True, eq=False)
class Options:
    """What one layer can do. Layers alike share one object."""

    strategies: tuple[LayerStrategy, ...]
    seconds: np.ndarray
    """Per option, of a whole step. float64[options]"""
    resident_bytes: np.ndarray
    """int64[options]"""
    workspace_bytes: np.ndarray
    """int64[options]"""
    boundary: np.ndarray
    """Class of the layouts at the layer's boundary; moves depend on nothing else. int64[options]"""
    num_classes: int
    """Boundary classes; some may have no option."""
    admitted: np.ndarray
    """Which options each variant of tied parameters allows. bool[variants, options]"""

    @cached_property
    def by_class(self) -> tuple[np.ndarray, ...]:
        """Per boundary class, its options. int64[options of the class] each."""
        return tuple(np.flatnonzero(self.boundary == label) for label in range(self.num_classes))


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers in order, with the moves between neighbours."""

    layers: tuple[Options, ...]
    moves: tuple[np.ndarray, ...]
    """Before each layer but the first: seconds of a step from a class of the layer before to one of this.
    float64[classes before, classes here]"""

    @property
    def num_variants(self) -> int:
        """Joint choices of layouts for tied parameters."""
        return self.layers[0].admitted.shape[0]

    @cached_property
    def walks(self) -> Walks:
        """What sums along choices are made of."""
        return Walks.through(self)


@dataclass(frozen=True)
class Solution:
    """One option per layer, and what they sum to."""

    options: tuple[int, ...]
    seconds: float
    resident_bytes: int
    workspace_bytes: int

    @property
    def bytes(self) -> int:
        """Resident bytes and the largest workspace."""
        return self.resident_bytes + self.workspace_bytes


def evaluate(chain: Chain, options: tuple[int, ...]) -> Solution:
    """Sums up one choice."""
    layers = list(zip(chain.layers, options, strict=True))
    seconds = sum(float(layer.seconds[option]) for layer, option in layers)
    for (before, left), (here, right), moves in zip(layers, layers[1:], chain.moves, strict=False):
        seconds += float(moves[before.boundary[left], here.boundary[right]])
    return Solution(
        tuple(int(option) for option in options),
        seconds,
        sum(int(layer.resident_bytes[option]) for layer, option in layers),
        max(int(layer.workspace_bytes[option]) for layer, option in layers),
    )
