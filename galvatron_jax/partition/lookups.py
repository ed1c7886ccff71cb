"""Embedding tables over ZeRO's axes: rows looked up, and gradients added, where they are stored.

A lookup needs the whole table, or of all examples the indices, the rows that a device stores, and a sum that spreads
the rows over the devices that asked. A table's gradient is the sum of what each device makes of its own examples, or is
made of everyone's indices and cotangents, by each device for the rows that it stores. Either can move fewer bytes: many
examples speak for the first, large tables for the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from galvatron_jax.partition.choice import Choice
from galvatron_jax.partition.layout import NOWHERE, PENDING, Layout, Role, convert, step_bytes
from galvatron_jax.partition.setting import Held, Setting
from galvatron_jax.partition.static import StaticFactor, StaticOp, prepare_kind
from galvatron_jax.spec.model import LayerKind
from galvatron_jax.spec.program import FactorKind


class Home(NamedTuple):
    """Where a parameter's gradient is to end up."""

    layout: Layout
    itemsize: int
    """Bytes of one of its elements, as they are summed."""


@dataclass(frozen=True)
class ShardedRows:
    """A way to apply an operation in which each device works on the rows that it stores."""

    rows: Mapping[int, StaticFactor]
    """Per storage axis, the factor that it shards."""
    settled: Mapping[int, int]
    """Per data axis that is the same devices, where it ends up in the result (`NOWHERE`: not at all). Operands come
    whole over it."""
    spared_bytes: float = 0.0
    """Bytes that a device need not send later."""

    @cached_property
    def spreads(self) -> bool:
        """Whether what comes out is summands that are spread at once."""
        return any(place >= 0 for place in self.settled.values())


WHOLE = ShardedRows({}, {})
"""What is needed is made whole."""


def looks_up_parameters(kind: LayerKind) -> bool:
    """Whether a layer looks up rows of a parameter, as embeddings do."""
    static = prepare_kind(kind)
    return bool(static.table_gradients) or any(op.looks_up for op in static.program.operations)


def sharded_rows(setting: Setting, op: StaticOp, states: tuple[Held, ...], home: Home | None) -> ShardedRows | None:
    """How an operation works on stored rows; None where it cannot.

    Args:
        setting: the program and its axes.
        op: the operation.
        states: of its operands.
        home: for what makes a parameter's gradient, where that is to end up; None where it may stay as it is made.
    """
    if op.looks_up:
        return _lookup(setting, op, states)
    if home is None:
        return None
    return _scatter(setting, op, states, home) if op.scatter_rows else _follow(setting, op, states)


def _lookup(setting: Setting, op: StaticOp, states: tuple[Held, ...]) -> ShardedRows | None:
    table, indices = (state.first for state in states)
    choice = Choice(setting, op, states)
    rows: dict[int, StaticFactor] = {}
    settled: dict[int, int] = {}
    for axis, data in _storage(setting):
        index = _factor(op, FactorKind.INDEX, 0, table[axis])
        batch = _batch_factor(choice, data, indices[data])
        if index is not None and batch is not None and choice.fits(index, axis, rows):
            rows[axis], settled[data] = index, batch.results[0]
    return ShardedRows(rows, settled) if rows else None


def _batch_factor(choice: Choice, axis: int, place: int) -> StaticFactor | None:
    """The factor of a lookup's result over which an axis spreads it: as the indices, or where it may."""
    op, allowed = choice.op, choice.setting.allowed[axis]
    if place >= 0:
        return _factor(op, FactorKind.PARALLEL, 1, place)
    found = (f for f in op.factors if f.kind is FactorKind.PARALLEL and f.operands[1] >= 0 and f.factor in allowed)
    return next((f for f in found if choice.fits(f, axis, {})), None)


def _scatter(setting: Setting, op: StaticOp, states: tuple[Held, ...], home: Home) -> ShardedRows | None:
    zeros, indices, updates = states
    if not zeros.zero:
        return None
    choice = Choice(setting, op, states)
    rows: dict[int, StaticFactor] = {}
    for axis, data in _storage(setting):
        row = next((f for f in op.scatter_rows if f.results[0] == home.layout[axis]), None)
        summed = _factor(op, FactorKind.ZERO_REDUCE, 2, updates.first[data])
        alike = summed is not None and indices.first[data] in (NOWHERE, summed.operands[1])
        if row is not None and alike and choice.fits(row, axis, rows):
            rows[axis] = row
    if not rows:
        return None
    pending = tuple(PENDING if axis in rows else place for axis, place in enumerate(home.layout))
    frame = setting.frame(op.results[0], frozenset())
    steps = convert(setting.axes, frame, pending, home.layout)
    settled = {data: NOWHERE for axis, data in _storage(setting) if axis in rows}
    return ShardedRows(rows, settled, sum(step_bytes(step, home.itemsize) for step in steps))


def _follow(setting: Setting, op: StaticOp, states: tuple[Held, ...]) -> ShardedRows | None:
    """What is sharded already stays so."""
    rows = {}
    for axis, _ in _storage(setting):
        factor = _factor(op, FactorKind.PARALLEL, 0, states[0].first[axis])
        if factor is not None:
            rows[axis] = factor
    return ShardedRows(rows, {}) if rows else None


def _storage(setting: Setting) -> list[tuple[int, int]]:
    """Storage axes with the data or sequence axis that is the same devices."""
    axes = enumerate(setting.axes)
    return [(index, axis.mirror) for index, axis in axes if axis.role is Role.STORAGE and axis.mirror is not None]


def _factor(op: StaticOp, kind: FactorKind, operand: int, place: int) -> StaticFactor | None:
    """The factor of a kind that an operand has at a position; None if it is nowhere or there is none."""
    if place < 0:
        return None
    return next((f for f in op.factors if f.kind is kind and f.operands[operand] == place), None)
