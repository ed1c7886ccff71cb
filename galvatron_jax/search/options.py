"""Chains made of a model: every layer's options, priced by the cost model and pruned."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.step import signatures
from galvatron_jax.cost.wiring import LayerWiring
from galvatron_jax.partition.layer_plan import LayerPlan
from galvatron_jax.search.chain import Chain, Options
from galvatron_jax.search.space import Rule, SearchSpace
from galvatron_jax.spec.strategy import LayerStrategy


@dataclass(frozen=True)
class _Slot:
    """What a layer's options depend on: layers with equal slots share them."""

    wiring: LayerWiring
    handed_on: tuple[int, ...]
    """Output ports that only the next layer reads."""


@dataclass(frozen=True, eq=False)
class _Table:
    """A slot's options before the variants of tied parameters are known."""

    strategies: tuple[LayerStrategy, ...]
    seconds: np.ndarray
    resident_bytes: np.ndarray
    workspace_bytes: np.ndarray
    boundary: np.ndarray
    examples: tuple[LayerPlan, ...]
    """A plan of each boundary class."""
    ties: tuple[dict[str, tuple], ...]
    """Per option, the signature of each tied parameter."""

    def take(self, index: np.ndarray) -> _Table:
        """Some of the options; the classes stay as they are."""
        return _Table(
            tuple(self.strategies[i] for i in index),
            self.seconds[index],
            self.resident_bytes[index],
            self.workspace_bytes[index],
            self.boundary[index],
            self.examples,
            tuple(self.ties[i] for i in index),
        )

    def allowing(self, allowed: Callable[[LayerStrategy], bool]) -> _Table:
        """The options with some strategies; all when there are none."""
        index = np.flatnonzero([allowed(strategy) for strategy in self.strategies])
        return self.take(index) if len(index) else self

    def undominated(self) -> _Table:
        """Without the options that others make superfluous."""
        ties: dict[tuple, int] = {}
        group = np.array([ties.setdefault(tuple(sorted(tie.items())), len(ties)) for tie in self.ties])
        return self.take(np.flatnonzero(~dominated(self, group)))


@dataclass
class ChainBuilder:
    """Builds the chains of one mesh. Prices are kept, so that chains that differ in the batch layout share them."""

    costs: CostModel
    space: SearchSpace
    pruned: Counter[str] = field(default_factory=Counter)
    priced: int = 0
    """Options priced."""
    estimated: int = 0
    """Options whose computation time was not measured."""
    _priced: dict[tuple, _Table] = field(default_factory=dict, repr=False)
    _tables: dict[tuple, _Table] = field(default_factory=dict, repr=False)
    _strategies: dict[tuple, tuple[LayerStrategy, ...]] = field(default_factory=dict, repr=False)
    _moves: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)

    def offers(self, allowed: Callable[[LayerStrategy], bool]) -> bool:
        """Whether any layer can use any of some strategies."""
        return any(allowed(strategy) for found in self._strategies.values() for strategy in found)

    def build(self, batching: Batching, allowed: Callable[[LayerStrategy], bool] | None = None) -> Chain | None:
        """The chain for one way of feeding the batch; None when no layouts of the tied parameters agree.

        Args:
            batching: how the batch is fed.
            allowed: which strategies to use. A layer that offers none of them keeps all; None when that is the most
                frequent layer.
        """
        slots = self._slots()
        frequent = max(slots, key=slots.count)
        if allowed is not None and not any(map(allowed, self._candidates(frequent.wiring.kind, batching))):
            return None
        tables = {slot: self._table(slot, batching, allowed) for slot in dict.fromkeys(slots)}
        variants = _variants([tables[slot] for slot in slots], self.costs.wiring.tied)
        options = {slot: _finish(table, variants) for slot, table in tables.items()}
        if not variants or any(not layer.admitted.any(axis=0).any() for layer in options.values()):
            return None
        moves = tuple(self._move(before, here, tables, batching) for before, here in itertools.pairwise(slots))
        return Chain(tuple(options[slot] for slot in slots), moves)

    def _slots(self) -> tuple[_Slot, ...]:
        layers = self.costs.wiring.layers
        following = [tuple(hop.output for hop in layer.hops) for layer in layers[1:]]
        return tuple(_Slot(layer, ports) for layer, ports in zip(layers, [*following, ()], strict=True))

    def _table(self, slot: _Slot, batching: Batching, allowed: Callable[[LayerStrategy], bool] | None) -> _Table:
        wiring = slot.wiring
        held = any(place.batched for place in wiring.reads + wiring.writes)
        key = (slot, batching.num_microbatches, batching.axes if held else None)
        if key not in self._priced:
            self._priced[key] = self._price(slot, batching)
        prune = self.space.applies(Rule.DOMINATED)
        if allowed is not None:
            kept = self._priced[key].allowing(allowed)
            return kept.undominated() if prune else kept
        if key not in self._tables:
            kept = self._priced[key].undominated() if prune else self._priced[key]
            self.pruned[Rule.DOMINATED] += len(self._priced[key].strategies) - len(kept.strategies)
            self._tables[key] = kept
        return self._tables[key]

    def _price(self, slot: _Slot, batching: Batching) -> _Table:
        costs, wiring = self.costs, slot.wiring
        strategies = self._candidates(wiring.kind, batching)
        plans = [costs.table.plan(wiring.kind, strategy, microbatch=batching.microbatch) for strategy in strategies]
        prices = [costs.layer_cost(wiring, strategy, batching) for strategy in strategies]
        classes: dict[tuple, int] = {}
        examples: list[LayerPlan] = []
        boundary = []
        for plan in plans:
            layouts = (
                tuple(plan.inputs[hop.input] for hop in wiring.hops),
                tuple(plan.outputs[port] for port in slot.handed_on),
            )
            if layouts not in classes:
                classes[layouts] = len(classes)
                examples.append(plan)
            boundary.append(classes[layouts])
        self.priced += len(prices)
        self.estimated += sum(price.estimated for price in prices)
        return _Table(
            strategies,
            np.array([price.step_s(batching.num_microbatches) for price in prices]),
            np.array([price.memory.resident_bytes for price in prices], np.int64),
            np.array([price.memory.workspace_bytes for price in prices], np.int64),
            np.array(boundary),
            tuple(examples),
            tuple(signatures(plan, wiring.tied) for plan in plans),
        )

    def _candidates(self, kind: int, batching: Batching) -> tuple[LayerStrategy, ...]:
        key = (kind, batching.microbatch)
        if key not in self._strategies:
            self._strategies[key] = self.space.strategies(
                self.costs.model.kinds[kind],
                mesh=self.costs.table.mesh,
                microbatch=batching.microbatch,
                pruned=self.pruned,
            )
        return self._strategies[key]

    def _move(self, before: _Slot, here: _Slot, tables: dict[_Slot, _Table], batching: Batching) -> np.ndarray:
        key = (before, here, batching.num_microbatches)
        if key not in self._moves:
            self._moves[key] = batching.num_microbatches * np.array(
                [
                    [
                        sum(
                            self.costs.transition_seconds(
                                before.wiring.kind, here.wiring, source, target, microbatch=batching.microbatch
                            )
                        )
                        for target in tables[here].examples
                    ]
                    for source in tables[before].examples
                ]
            )
        return self._moves[key]


def dominated(table: _Table, group: np.ndarray) -> np.ndarray:
    """Options that another one with equal boundary and ties makes superfluous; of equals the first stays.

    Args:
        table: the options.
        group: per option, its class of ties. int64[options]
    """
    columns = (table.seconds, table.resident_bytes, table.workspace_bytes)
    same = (table.boundary[:, None] == table.boundary) & (group[:, None] == group)
    no_worse = same & np.logical_and.reduce([column[:, None] <= column for column in columns])
    better = np.logical_or.reduce([column[:, None] < column for column in columns])
    earlier = np.arange(len(group))[:, None] < np.arange(len(group))
    return (no_worse & (better | earlier)).any(axis=0)


def _variants(tables: Sequence[_Table], tied: tuple[str, ...]) -> list[dict[str, tuple]]:
    """Joint layouts of the tied parameters that every layer using them offers."""
    choices = []
    for name in tied:
        offers = [dict.fromkeys(tie[name] for tie in table.ties) for table in tables if name in table.ties[0]]
        choices.append([layout for layout in offers[0] if all(layout in offer for offer in offers)] if offers else [()])
    return [dict(zip(tied, layouts, strict=True)) for layouts in itertools.product(*choices)]


def _finish(table: _Table, variants: list[dict[str, tuple]]) -> Options:
    admitted = [
        [all(variant[name] == layout for name, layout in tie.items()) for tie in table.ties] for variant in variants
    ]
    return Options(
        table.strategies,
        table.seconds,
        table.resident_bytes,
        table.workspace_bytes,
        table.boundary,
        len(table.examples),
        np.array(admitted, bool).reshape(len(variants), len(table.strategies)),
    )
