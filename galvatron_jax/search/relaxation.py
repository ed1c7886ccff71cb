"""Many shortest paths through a chain at once: the Lagrangian relaxation of the memory limit.

For a price of `multiplier` seconds per byte, the cheapest path by `seconds + multiplier * bytes` gives a lower bound
for every budget (Handler & Zang, "A dual algorithm for the constrained shortest path problem", 1980). All cases
(variant of tied parameters x workspace threshold), each with a multiplier of its own, run through NumPy together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from galvatron_jax.search.chain import Chain, Options


@dataclass(frozen=True, eq=False)
class Cases:
    """Restrictions of a chain, solved side by side."""

    variant: np.ndarray
    """int64[cases]"""
    workspace_bytes: np.ndarray
    """No option may need more. int64[cases]"""

    def take(self, index: np.ndarray) -> Cases:
        """Some of the cases."""
        return Cases(self.variant[index], self.workspace_bytes[index])

    def __len__(self) -> int:
        return len(self.variant)


@dataclass(frozen=True, eq=False)
class Paths:
    """The cheapest path of each case."""

    options: np.ndarray
    """int64[cases, layers]; meaningless where `cost` is infinite."""
    cost: np.ndarray
    """What was minimised. float64[cases]"""
    seconds: np.ndarray
    resident_bytes: np.ndarray

    def take(self, index: np.ndarray) -> Paths:
        """The paths of some cases."""
        return Paths(self.options[index], self.cost[index], self.seconds[index], self.resident_bytes[index])

    def choose(self, other: Paths, where: np.ndarray) -> Paths:
        """`other` where the mask says so, these elsewhere."""
        return Paths(
            np.where(where[:, None], other.options, self.options),
            np.where(where, other.cost, self.cost),
            np.where(where, other.seconds, self.seconds),
            np.where(where, other.resident_bytes, self.resident_bytes),
        )


def allowed_options(layer: Options, cases: Cases) -> np.ndarray:
    """Which options each case may use. bool[cases, options]."""
    return layer.admitted[cases.variant] & (layer.workspace_bytes[None] <= cases.workspace_bytes[:, None])


def best_per_class(layer: Options, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cheapest option of each boundary class.

    Args:
        layer: the layer.
        cost: per case and option, infinite where not allowed. float64[cases, options]

    Returns:
        Cost and option, both [cases, classes]; infinite for classes without an option.
    """
    count = layer.num_classes
    best = np.full((len(cost), count), np.inf)
    option = np.zeros((len(cost), count), np.int64)
    rows = np.arange(len(cost))
    for label, members in enumerate(layer.by_class):
        if len(members):
            pick = cost[:, members].argmin(axis=1)
            option[:, label] = members[pick]
            best[:, label] = cost[rows, members[pick]]
    return best, option


def shortest_paths(chain: Chain, cases: Cases, *, multiplier: np.ndarray | float, seconds_weight: float = 1.0) -> Paths:
    """Per case, the path that minimises `seconds_weight * seconds + multiplier * resident bytes`."""
    price = np.broadcast_to(np.asarray(multiplier, float), (len(cases),))
    tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for layer in chain.layers:
        if id(layer) not in tables:
            cost = seconds_weight * layer.seconds[None] + price[:, None] * layer.resident_bytes[None]
            tables[id(layer)] = best_per_class(layer, np.where(allowed_options(layer, cases), cost, np.inf))
    moves = {id(table): seconds_weight * table for table in chain.moves}
    values = [tables[id(chain.layers[0])][0]]
    for layer, table in zip(chain.layers[1:], chain.moves, strict=True):
        values.append(np.minimum.reduce(values[-1][:, :, None] + moves[id(table)], axis=1) + tables[id(layer)][0])
    return _sum_up(chain, _trace_back(chain, tables, moves, values), values[-1].min(axis=1))


def _trace_back(chain: Chain, tables: dict, moves: dict, values: list[np.ndarray]) -> np.ndarray:
    """The option of each layer on each case's path. int64[cases, layers]."""
    arriving = {table: np.ascontiguousarray(move.T) for table, move in moves.items()}
    rows, label = np.arange(len(values[0])), values[-1].argmin(axis=1)
    options = np.empty((len(rows), len(chain.layers)), np.int64)
    for index in range(len(chain.layers) - 1, -1, -1):
        options[:, index] = tables[id(chain.layers[index])][1][rows, label]
        if index:
            label = (values[index - 1] + arriving[id(chain.moves[index - 1])][label]).argmin(axis=1)
    return options


def _sum_up(chain: Chain, options: np.ndarray, cost: np.ndarray) -> Paths:
    seconds, resident = chain.walks.running(options)
    return Paths(options, cost, np.where(np.isfinite(cost), seconds[:, -1], np.inf), resident[:, -1])
