"""Pipelines made of a model: the problem of several stages, from every layer's priced options."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.cost.model import Batching
from galvatron_jax.cost.pipeline import (
    Pipelining,
    cut_costs,
    exchange_seconds,
    fixed_stage_bytes,
    held_values,
    stage_wirings,
    tied_users,
)
from galvatron_jax.cost.wiring import LayerWiring
from galvatron_jax.search.pipeline import Cut, Held, Pipeline, StageOptions, Tie
from galvatron_jax.search.space import Rule
from galvatron_jax.search.tables import COLUMNS, Allowed, Slot, Table, TableBuilder, admitted, tie_variants


@dataclass
class PipelineBuilder:
    """Builds the pipelines of one stage mesh."""

    tables: TableBuilder
    _undominated: dict[tuple, Table] = field(default_factory=dict, repr=False)
    _edges: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)
    _made: dict[tuple, tuple[Table, StageOptions]] = field(default_factory=dict, repr=False)

    def build(self, pipelining: Pipelining, batching: Batching, allowed: Allowed | None = None) -> Iterator[Pipeline]:
        """One problem for each joint layout of the tied parameters.

        Args:
            pipelining: schedule and groups of devices.
            batching: how the batch is fed.
            allowed: which strategies to use; a layer that offers none of them keeps all.
        """
        costs = self.tables.costs
        firsts = self.tables.slots()
        slots = [Slot(stage_wirings(slot.wiring)[0], slot.handed_on) for slot in firsts]
        later = [stage_wirings(slot.wiring)[1] for slot in firsts]
        repeats = [
            None if wiring is None else Slot(wiring, slot.handed_on) for wiring, slot in zip(later, firsts, strict=True)
        ]
        every = dict.fromkeys([*slots, *(slot for slot in repeats if slot is not None)])
        while True:
            tables = {slot: self._table(slot, batching, allowed) for slot in every}
            variants = tie_variants([tables[slot] for slot in slots], costs.wiring.tied)
            if variants or allowed is not None or not self.tables.let_tied_repeat(batching):
                break
            for stale in (self._undominated, self._edges, self._made):
                stale.clear()
        cuts = tuple(Cut(cut.bytes, cut.forward_s, cut.backward_s) for cut in cut_costs(costs, pipelining, batching))
        held = tuple(Held(value.producer, value.last, value.bytes) for value in held_values(costs, batching))
        moves = {pair: self.tables.moves(*pair, batching) for pair in itertools.pairwise(slots)}
        for variant in variants:
            made = {slot: self._options(slot, table, variant, batching) for slot, table in tables.items()}
            if any(not len(options) for options in made.values()):
                continue
            yield Pipeline(
                schedule=pipelining.schedule,
                degree=pipelining.degree,
                num_chunks=pipelining.num_chunks,
                num_microbatches=batching.num_microbatches,
                layers=tuple(made[slot] for slot in slots),
                repeats=tuple(None if slot is None else made[slot] for slot in repeats),
                moves=tuple(moves[pair] for pair in itertools.pairwise(slots)),
                cuts=cuts,
                held=held,
                ties=self._ties(pipelining, slots, tables, variant),
                fixed_bytes=fixed_stage_bytes(costs, batching),
            )

    def _table(self, slot: Slot, batching: Batching, allowed: Allowed | None) -> Table:
        priced = self.tables.table(slot, batching)
        prune = self.tables.space.applies(Rule.DOMINATED)
        if allowed is not None:
            kept = priced.allowing(allowed)
            return kept.undominated([getattr(kept, name) for name in COLUMNS]) if prune else kept
        key = self.tables.key(slot, batching)
        if key not in self._undominated:
            kept = priced.undominated([getattr(priced, name) for name in COLUMNS]) if prune else priced
            self.tables.pruned[Rule.DOMINATED] += len(priced) - len(kept)
            self._undominated[key] = kept
        return self._undominated[key]

    def _options(self, slot: Slot, table: Table, variant: dict[str, tuple], batching: Batching) -> StageOptions:
        index = np.flatnonzero(admitted(table, variant))
        key = (slot, batching, id(table), index.tobytes())
        if key not in self._made:
            kept = table.take(index)
            made = StageOptions(
                kept.strategies,
                *(getattr(kept, name) for name in COLUMNS),
                boundary=kept.boundary,
                num_classes=len(kept.examples),
                enter_s=self._edge(slot, kept, batching, leaving=False),
                leave_s=self._edge(slot, kept, batching, leaving=True),
            )
            self._made[key] = table, made
        return self._made[key][1]

    def _edge(self, slot: Slot, table: Table, batching: Batching, *, leaving: bool) -> np.ndarray:
        """Seconds between a layer's classes and the plan-wide layout at a cut. float64[classes, 2]."""
        key = (slot, batching, leaving)
        if key not in self._edges:
            costs = self.tables.costs
            ends = self._ends(slot, leaving=leaving)
            none = [(0.0, 0.0)] * len(table.examples)
            pairs = none if ends is None else [
                costs.cut_seconds(*ends, plan, batching, leaving=leaving) for plan in table.examples
            ]  # fmt: skip
            self._edges[key] = np.array(pairs)
        return self._edges[key]

    def _ends(self, slot: Slot, *, leaving: bool) -> tuple[int, LayerWiring] | None:
        """Kind in front of the cut, and wiring behind it; None for the first layer's entry and the last one's exit."""
        layers = self.tables.costs.wiring.layers
        slots = self.tables.slots()
        for index, other in enumerate(slots):
            same = other.wiring.kind == slot.wiring.kind and other.handed_on == slot.handed_on
            if same and other.wiring.hops == slot.wiring.hops:
                if leaving:
                    return (other.wiring.kind, layers[index + 1]) if index + 1 < len(layers) else None
                return (layers[index - 1].kind, other.wiring) if index else None
        return None

    def _ties(
        self, pipelining: Pipelining, slots: list[Slot], tables: dict[Slot, Table], variant: dict[str, tuple]
    ) -> tuple[Tie, ...]:
        ties = []
        for name, users in tied_users(self.tables.costs).items():
            table = tables[slots[users[0]]]
            size = next(
                sizes[name]
                for sizes, layout in zip(table.tied_bytes, table.ties, strict=True)
                if layout[name] == variant[name]
            )
            ties.append(Tie(users, exchange_seconds(self.tables.costs, pipelining, size)))
        return tuple(ties)
