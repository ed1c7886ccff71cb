"""Layouts of values over logical axes, and the steps that change them.

A *logical axis* is a group of mesh axes that are always used together (all of `tp`, say); where a factor is too small
for the whole group it is taken apart into its prime axes. A layout says per logical axis where it sits in a value:
at a *position* (the flat index of one of the value's factors), nowhere, or pending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

NOWHERE = -1
"""The value is repeated over the axis."""
PENDING = -2
"""Each device holds a summand; the value is the sum over the axis."""

Layout = tuple[int, ...]
"""Per logical axis: a position, `NOWHERE` or `PENDING`."""


class Role(StrEnum):
    """What a logical axis serves."""

    DATA = "dp"
    TENSOR = "tp"
    SEQUENCE = "sp"
    STORAGE = "zero"
    """ZeRO's view of the data axes: parameters are stored sharded over it and gathered before use."""
    IDLE = "idle"
    """Nothing: all devices do the same. Known only to layers at whose ports gradients pass as summands."""


@dataclass(frozen=True)
class Axis:
    """A logical axis."""

    role: Role
    names: tuple[str, ...]
    """Mesh axes in mesh order."""
    size: int
    rank: int
    """Position of its first mesh axis in the mesh."""
    mirror: int | None = None
    """For a storage axis, the data or sequence axis that is the same devices."""


class StepKind(StrEnum):
    """One way to change a layout."""

    SLICE = "slice"
    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_TO_ALL = "all-to-all"


@dataclass(frozen=True, slots=True)
class Step:
    """A slice or a collective on a local array viewed factor by factor."""

    kind: StepKind
    names: tuple[str, ...]
    """Mesh axes, major to minor."""
    size: int
    """Devices in the group."""
    shape: tuple[int, ...]
    """Local shape before, one entry a position."""
    split: int = -1
    """Position that becomes (further) sharded."""
    join: int = -1
    """Position that becomes whole (or less sharded)."""
    dtype: str | None = None
    """Type in which the array is sent, if not its own."""


def summed_in(steps: tuple[Step, ...], dtype: str) -> tuple[Step, ...]:
    """The same steps with sums taken in another type, in which all that is sent goes then; no others are changed."""
    if not any(step.kind in (StepKind.ALL_REDUCE, StepKind.REDUCE_SCATTER) for step in steps):
        return steps
    return tuple([step if step.kind is StepKind.SLICE else replace(step, dtype=dtype) for step in steps])


def step_bytes(step: Step, itemsize: int) -> float:
    """Bytes that one device sends in a step (ring algorithms; Patarasuk & Yuan, 2009)."""
    local, n = math.prod(step.shape) * itemsize, step.size
    return {
        StepKind.SLICE: 0.0,
        StepKind.ALL_GATHER: local * (n - 1),
        StepKind.ALL_REDUCE: 2.0 * local * (n - 1) / n,
    }.get(step.kind, local * (n - 1) / n)


@dataclass(frozen=True)
class Frame:
    """What a conversion must know of a value: the sizes and order at its positions."""

    sizes: tuple[int, ...]
    """Local size per position with no axis on it (1 where the value is lazily broadcast)."""
    ascending: tuple[bool, ...]
    """Per position, whether axes stand in mesh order there (the batch), or in reverse (everything else): so that
    layouts of unlike layers are prefixes of one another."""


def order_at(axes: Sequence[Axis], frame: Frame, position: int, axis: int) -> int:
    """Key that sorts the axes at a position from major to minor."""
    return axes[axis].rank if frame.ascending[position] else -axes[axis].rank


def names_at(axes: Sequence[Axis], frame: Frame, position: int, axis: int) -> tuple[str, ...]:
    """Mesh axes of a logical axis in the order of a position, major to minor."""
    names = axes[axis].names
    return names if frame.ascending[position] else names[::-1]


def local_sizes(axes: Sequence[Axis], frame: Frame, layout: Sequence[int]) -> list[int]:
    """Local size per position under a layout."""
    sizes = list(frame.sizes)
    for axis, place in enumerate(layout):
        if place >= 0:
            sizes[place] //= axes[axis].size
    return sizes


def convert(axes: Sequence[Axis], frame: Frame, source: Layout, target: Layout) -> list[Step]:
    """Steps from one layout to another; pending sums that the target keeps pending stay.

    Slices come first since they are free and make the rest smaller; a pending sum that ends up sharded is
    reduce-scattered; an axis that moves between positions goes by all-to-all; adjacent axes that do the same are
    merged into one collective.
    """
    moves = _Moves(axes, frame, list(source), target)
    while moves.current != list(target):
        if len(moves.steps) > 8 * len(axes) + 8:
            raise AssertionError(f"no way from {source} to {target} at sizes {frame.sizes}: {moves.steps}")
        if not (moves.slice() or moves.reduce_scatter() or moves.all_to_all() or moves.all_reduce() or moves.gather()):
            moves.unblock()
    return moves.steps


class _Moves:
    """A conversion under way."""

    def __init__(self, axes: Sequence[Axis], frame: Frame, current: list[int], target: Layout) -> None:
        self.axes, self.frame, self.current, self.target = axes, frame, current, target
        self.steps: list[Step] = []

    def order(self, position: int, axis: int) -> int:
        return order_at(self.axes, self.frame, position, axis)

    def can_enter(self, axis: int) -> bool:
        """Whether the axis would be the minor-most at its target, among just those who stay, its devices free."""
        position, key = self.target[axis], self.order(self.target[axis], axis)
        for other, place in enumerate(self.current):
            if other == axis:
                continue
            if place != NOWHERE and self.same_devices(axis, other):
                return False
            if place == position and (self.order(position, other) > key or self.target[other] != position):
                return False
            if self.target[other] == position and place != position and self.order(position, other) < key:
                return False
        return True

    def same_devices(self, axis: int, other: int) -> bool:
        """Whether one axis is ZeRO's view of the other: then only one of them may be in use at a time."""
        return self.axes[axis].mirror == other or self.axes[other].mirror == axis

    def can_leave(self, axis: int) -> bool:
        """Whether the axis is the minor-most at its position."""
        position, key = self.current[axis], self.order(self.current[axis], axis)
        return not any(
            place == position and self.order(position, other) > key for other, place in enumerate(self.current)
        )

    def can_exchange(self, axis: int) -> bool:
        """Whether one all-to-all moves the axis to its target: its mesh axes must stand in one order at both ends."""
        ascending = self.frame.ascending
        same_order = len(self.axes[axis].names) == 1 or ascending[self.current[axis]] == ascending[self.target[axis]]
        return same_order and self.can_leave(axis) and self.can_enter(axis)

    def emit(self, kind: StepKind, group: list[int], *, split: int = -1, join: int = -1) -> None:
        shape = tuple(local_sizes(self.axes, self.frame, self.before))
        place = split if split >= 0 else join
        names: tuple[str, ...] = ()
        size = 1
        for axis in group:
            names += names_at(self.axes, self.frame, place, axis) if place >= 0 else self.axes[axis].names
            size *= self.axes[axis].size
        self.steps.append(Step(kind, names, size, shape, split, join))

    def slice(self) -> bool:
        for axis, (now, then) in enumerate(zip(self.current, self.target, strict=True)):
            if now == NOWHERE and then >= 0 and self.can_enter(axis):
                self.before = tuple(self.current)
                self.current[axis] = then
                self.emit(StepKind.SLICE, [axis], split=then)
                return True
        return False

    def reduce_scatter(self) -> bool:
        for axis, (now, then) in enumerate(zip(self.current, self.target, strict=True)):
            if now == PENDING and then >= 0 and self.can_enter(axis):
                self.before = tuple(self.current)
                group = self._enter_together(axis, lambda place: place == PENDING)
                self.emit(StepKind.REDUCE_SCATTER, group, split=then)
                return True
        return False

    def _enter_together(self, first: int, same: Callable[[int], bool]) -> list[int]:
        """Axes that can enter the first one's target right after it, coming from where it comes from."""
        position = self.target[first]
        group = [first]
        self.current[first] = position
        found = True
        while found:
            found = False
            for axis, place in enumerate(self.current):
                if same(place) and self.target[axis] == position and self.can_enter(axis):
                    group.append(axis)
                    self.current[axis] = position
                    found = True
        return group

    def all_to_all(self) -> bool:
        for axis, (now, then) in enumerate(zip(self.current, self.target, strict=True)):
            if now >= 0 and then >= 0 and now != then and self.can_exchange(axis):
                self.before = tuple(self.current)
                self.current[axis] = then
                self.emit(StepKind.ALL_TO_ALL, [axis], split=then, join=now)
                return True
            group = self._a_suffix_moves(axis)
            if group:
                self.emit(StepKind.ALL_TO_ALL, group, split=then, join=now)
                return True
        return False

    def _a_suffix_moves(self, first: int) -> list[int]:
        """Adjacent axes, minor-most at one position, that move together to another in the same order."""
        now, then = self.current[first], self.target[first]
        if now < 0 or then < 0 or now == then or not self.can_enter(first):
            return []
        behind = [a for a, place in enumerate(self.current) if place == now and a != first]
        behind = [a for a in behind if self.order(now, a) > self.order(now, first)]
        behind.sort(key=lambda a: self.order(now, a))
        if not behind or any(self.target[a] != then for a in behind):
            return []
        group = [first, *behind]
        if sorted(group, key=lambda a: self.order(then, a)) != group:
            return []
        before = tuple(self.current)
        for axis in group:
            if not self.can_enter(axis):
                self.current[:] = before
                return []
            self.current[axis] = then
        self.before = before
        return group

    def all_reduce(self) -> bool:
        group = [a for a, place in enumerate(self.current) if place == PENDING and self.target[a] == NOWHERE]
        if not group:
            return False
        self.before = tuple(self.current)
        for axis in group:
            self.current[axis] = NOWHERE
        self.emit(StepKind.ALL_REDUCE, group)
        return True

    def gather(self) -> bool:
        for axis, (now, then) in enumerate(zip(self.current, self.target, strict=True)):
            if now >= 0 and then == NOWHERE and self.can_leave(axis):
                self.before = tuple(self.current)
                group = [axis]
                self.current[axis] = NOWHERE
                self._leave_together(group, now)
                self.emit(StepKind.ALL_GATHER, group, join=now)
                return True
        return False

    def _leave_together(self, group: list[int], position: int) -> None:
        """More major axes at the position that leave too are gathered in the same collective."""
        found = True
        while found:
            found = False
            for axis, place in enumerate(self.current):
                if place == position and self.target[axis] == NOWHERE and self.can_leave(axis):
                    group.insert(0, axis)
                    self.current[axis] = NOWHERE
                    found = True

    def unblock(self) -> None:
        """Nothing can move without breaking the order at some position: take a blocking axis off for a while."""
        wrong = [a for a, (now, then) in enumerate(zip(self.current, self.target, strict=True)) if now != then]
        pending = [a for a in wrong if self.current[a] == PENDING]
        leaving = [a for a in wrong if self.current[a] >= 0]
        if pending:
            axis, place = pending[0], -1
        elif leaving:
            position = self.current[leaving[0]]
            axis, place = self._minor_most(position), position
        else:
            position = self.target[wrong[0]]
            axis, place = self._minor_most(position), position
        self.before = tuple(self.current)
        self.current[axis] = NOWHERE
        self.emit(StepKind.ALL_REDUCE if place < 0 else StepKind.ALL_GATHER, [axis], join=place)

    def _minor_most(self, position: int) -> int:
        at = [a for a, place in enumerate(self.current) if place == position]
        return max(at, key=lambda a: self.order(position, a))
