"""Pipelines made of a model: the problem of several stages, from every layer's priced options."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

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
from galvatron_jax.search.tables import COLUMNS, Allowed, Slot, Table, TableBuilder, tie_variants


@dataclass
class PipelineBuilder:
    """Builds the pipelines of one stage mesh."""

    tables: TableBuilder
    _undominated: dict[tuple, Table] = field(default_factory=dict, repr=False)
    _edges: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)
    _made: dict[tuple, tuple[Table, StageOptions]] = field(default_factory=dict, repr=False)
    _crossings: dict[tuple, tuple[Cut, ...]] = field(default_factory=dict, repr=False)

    def build(self, pipelining: Pipelining, batching: Batching, allowed: Allowed | None = None) -> Iterator[Pipeline]:
        """One problem for each joint layout of the tied parameters.

        Args:
            pipelining: schedule and groups of devices.
            batching: how the batch is fed.
            allowed: which strategies to use; a layer that offers none of them keeps all.
        """
        costs, (slots, repeats) = self.tables.costs, self._slots
        every = dict.fromkeys([*slots, *(slot for slot in repeats if slot is not None)])
        while True:
            tables = {slot: self._table(slot, batching, allowed) for slot in every}
            variants = tie_variants([tables[slot] for slot in dict.fromkeys(slots)], costs.wiring.tied)
            if variants or allowed is not None or not self.tables.let_tied_repeat(batching):
                break
            for stale in (self._undominated, self._edges, self._made):
                stale.clear()
        cuts = self._cuts(pipelining, batching)
        held = tuple(Held(value.producer, value.last, value.bytes) for value in held_values(costs, batching))
        moves = {pair: self.tables.moves(*pair, batching) for pair in dict.fromkeys(itertools.pairwise(slots))}
        between = tuple([moves[pair] for pair in itertools.pairwise(slots)])
        fixed_bytes = fixed_stage_bytes(costs, batching, one_program=self._one_program)
        for variant in variants:
            options = partial(self._options, variant=variant, batching=batching, stashes=not pipelining.recomputes)
            made = {slot: options(slot, table) for slot, table in tables.items()}
            if any(not len(options) for options in made.values()):
                continue
            yield Pipeline(
                schedule=pipelining.schedule,
                degree=pipelining.degree,
                num_chunks=pipelining.num_chunks,
                num_microbatches=batching.num_microbatches,
                layers=tuple([made[slot] for slot in slots]),
                repeats=tuple([None if slot is None else made[slot] for slot in repeats]),
                moves=between,
                cuts=cuts,
                held=held,
                ties=self._ties(pipelining, slots, tables, variant),
                fixed_bytes=fixed_bytes,
                slots_alike=self._one_program and self.tables.space.applies(Rule.SLOTS_ALIKE),
            )

    @cached_property
    def _slots(self) -> tuple[tuple[Slot, ...], tuple[Slot | None, ...]]:
        """Per layer, its slot as the first of its stage to use its parameters; and as a later one, if that differs."""
        pairs = [(stage_wirings(slot.wiring), slot.handed_on) for slot in self.tables.slots]
        return (
            tuple([self.tables.slot(first, handed_on) for (first, _), handed_on in pairs]),
            tuple([None if later is None else self.tables.slot(later, handed_on) for (_, later), handed_on in pairs]),
        )

    @cached_property
    def _users(self) -> dict[str, tuple[int, ...]]:
        """Layers that use each tied parameter."""
        return tied_users(self.tables.costs)

    def _cuts(self, pipelining: Pipelining, batching: Batching) -> tuple[Cut, ...]:
        """What lies in front of each layer where a stage begins with it, whatever the schedule."""
        key = pipelining.axes, batching
        if key not in self._crossings:
            found = cut_costs(self.tables.costs, pipelining, batching)
            self._crossings[key] = tuple([Cut(cut.bytes, cut.forward_s, cut.backward_s) for cut in found])
        return self._crossings[key]

    def _table(self, slot: Slot, batching: Batching, allowed: Allowed | None) -> Table:
        priced = self.tables.table(slot, batching)
        prune = self.tables.space.applies(Rule.DOMINATED)
        if allowed is not None:
            kept = priced.allowing(self.tables.with_equals(slot.wiring.kind, allowed))
            return kept.undominated(self._compared(kept)) if prune else kept
        key = self.tables.key(slot, batching)
        if key not in self._undominated:
            kept = priced.undominated(self._compared(priced)) if prune else priced
            self.tables.pruned[Rule.DOMINATED] += len(priced) - len(kept)
            self._undominated[key] = kept
        return self._undominated[key]

    def _compared(self, table: Table) -> list[np.ndarray]:
        """What an option may be better at than another one."""
        found = [getattr(table, name) for name in COLUMNS]
        return [*found, *table.flat().T] if self._one_program else found

    @property
    def _one_program(self) -> bool:
        return self.tables.space.applies(Rule.ONE_PROGRAM)

    def _options(
        self, slot: Slot, table: Table, variant: dict[str, tuple], batching: Batching, *, stashes: bool
    ) -> StageOptions:
        index = np.flatnonzero(table.admitted(variant))
        key = (slot, batching, id(table), index.tobytes(), stashes)
        if key not in self._made:
            kept = table.take(index)
            columns = {name: getattr(kept, name) for name in COLUMNS}
            if stashes:
                # Into a slot in forward, out of it in backward.
                copied = self.tables.costs.copy_seconds(1) * kept.residual_bytes
                columns |= {name: columns[name] + copied for name in ("forward_s", "backward_s")}
            made = StageOptions(
                kept.strategies,
                **columns,
                boundary=kept.boundary,
                num_classes=len(kept.examples),
                enter_s=self._edge(slot, kept, batching, leaving=False),
                leave_s=self._edge(slot, kept, batching, leaving=True),
                flat_bytes=kept.flat() if self._one_program else None,
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
        for index, other in enumerate(self.tables.slots):
            same = other.wiring.kind == slot.wiring.kind and other.handed_on == slot.handed_on
            if same and other.wiring.hops == slot.wiring.hops:
                if leaving:
                    return (other.wiring.kind, layers[index + 1]) if index + 1 < len(layers) else None
                return (layers[index - 1].kind, other.wiring) if index else None
        return None

    def _ties(
        self, pipelining: Pipelining, slots: Sequence[Slot], tables: dict[Slot, Table], variant: dict[str, tuple]
    ) -> tuple[Tie, ...]:
        ties = []
        for name, users in self._users.items():
            table = tables[slots[users[0]]]
            size = next(
                table.tied_bytes[way][name] for way in table.offered_ties if table.ties[way][name] == variant[name]
            )
            ties.append(Tie(users, exchange_seconds(self.tables.costs, pipelining, name, size, user=users[0])))
        return tuple(ties)
