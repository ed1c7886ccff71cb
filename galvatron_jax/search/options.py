"""Chains made of a model: the problem of one stage, from every layer's priced options."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.cost.model import Batching
from galvatron_jax.search.chain import Chain, Options
from galvatron_jax.search.space import Rule
from galvatron_jax.search.tables import Allowed, Slot, Table, TableBuilder, tie_variants


@dataclass
class ChainBuilder:
    """Builds the chains of one mesh."""

    tables: TableBuilder
    _undominated: dict[tuple, Table] = field(default_factory=dict, repr=False)

    def build(self, batching: Batching, allowed: Allowed | None = None) -> Chain | None:
        """The chain for one way of feeding the batch; None when no layouts of the tied parameters agree.

        Args:
            batching: how the batch is fed.
            allowed: which strategies to use. A layer that offers none of them keeps all; None when that is the most
                frequent layer.
        """
        slots = self.tables.slots
        frequent = max(slots, key=slots.count)
        kind = frequent.wiring.kind
        if allowed is not None and not any(
            map(self.tables.with_equals(kind, allowed), self.tables.candidates(kind, batching))
        ):
            return None
        while True:
            tables = {slot: self._table(slot, batching, allowed) for slot in dict.fromkeys(slots)}
            variants = tie_variants(tables.values(), self.tables.costs.wiring.tied)
            if variants or allowed is not None or not self.tables.let_tied_repeat(batching):
                break
            self._undominated.clear()
        options = {slot: _finish(table, variants, batching.num_microbatches) for slot, table in tables.items()}
        if not variants or any(not layer.admitted.any(axis=0).any() for layer in options.values()):
            return None
        moves = tuple(
            batching.num_microbatches * self.tables.moves(before, here, batching).sum(-1)
            for before, here in itertools.pairwise(slots)
        )
        return Chain(tuple(options[slot] for slot in slots), moves)

    def _table(self, slot: Slot, batching: Batching, allowed: Allowed | None) -> Table:
        prune = self.tables.space.applies(Rule.DOMINATED)
        priced = self.tables.table(slot, batching)
        if allowed is not None:
            kept = priced.allowing(self.tables.with_equals(slot.wiring.kind, allowed))
            return kept.undominated(_columns(kept, batching.num_microbatches)) if prune else kept
        key = self.tables.key(slot, batching)
        if key not in self._undominated:
            kept = priced.undominated(_columns(priced, batching.num_microbatches)) if prune else priced
            self.tables.pruned[Rule.DOMINATED] += len(priced) - len(kept)
            self._undominated[key] = kept
        return self._undominated[key]


def _columns(table: Table, num_microbatches: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds of a step, resident and workspace bytes."""
    seconds = num_microbatches * (table.forward_s + table.backward_s) + table.once_s
    return seconds, table.static_bytes + table.residual_bytes, table.workspace_bytes


def _finish(table: Table, variants: list[dict[str, tuple]], num_microbatches: int) -> Options:
    seconds, resident, workspace = _columns(table, num_microbatches)
    return Options(
        table.strategies,
        seconds,
        resident,
        workspace,
        table.boundary,
        len(table.examples),
        np.array([table.admitted(variant) for variant in variants], bool).reshape(len(variants), len(table)),
    )
