"""What passes over one program share: sizes, axes, the states that values take, and what was planned before.

How an operation is planned depends on nothing but the setting and the states of its operands. So strategies that differ
in what they recompute or in how they store parameters, and the forward and the backward pass of each, meet the same
questions again and again; the answers are kept here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from galvatron_jax.partition.counts import NONE, Amount, Tally, collectives
from galvatron_jax.partition.instructions import Convert, Decision, Instruction
from galvatron_jax.partition.layout import NOWHERE, PENDING, Axis, Frame, Layout, Step, convert, summed_in
from galvatron_jax.partition.liveness import Where
from galvatron_jax.partition.outline import Outlines
from galvatron_jax.partition.static import StaticFactor, StaticOp, StaticProgram


@dataclass(frozen=True, eq=False, slots=True)
class Held:
    """A value's state during a pass. A setting has one object for each content, so that states compare by identity."""

    layouts: tuple[Layout, ...]
    """By version, in order of appearance."""
    lazy: frozenset[int]
    """Dims that are still of size 1 (lazily broadcast)."""
    zero: bool
    """Whether all elements are zero."""

    @property
    def first(self) -> Layout:
        """The layout in which the value came or was made."""
        return self.layouts[0]


class Keep(Enum):
    """What passes in a setting keep of what they plan."""

    STEPS = "conversions and FLOPs"
    COUNTS = "what instructions count for"
    INSTRUCTIONS = "instructions, and what they count for"


Work = tuple[int, tuple[int, ...]]
"""The index of an operation that has FLOPs, and the axes that share them out."""


class Outcome(NamedTuple):
    """What planning one operation gives."""

    held: dict[int, Held]
    """New states of operands and results."""
    instructions: tuple[Instruction, ...]
    tallies: tuple[Tally, ...]
    """What each instruction counts for."""
    decisions: tuple[Decision, ...] = ()
    flops: Amount = NONE
    """Local FLOPs of one device."""
    form: int = 0
    """Number of the instructions without sizes, see `Outlines`."""
    work: tuple[Work, ...] = ()
    """What `flops` are made of; loops' are left out."""
    dear: tuple[DearChoice | DearRows, ...] = ()
    """What was chosen at a cost, in loops too: at other sizes it may not be the cheapest. Not noted where
    conversions and FLOPs alone are kept."""


class DearChoice(NamedTuple):
    """A factor chosen for an axis although it moves bytes, and what the choice depends on."""

    setting: Setting
    op: StaticOp
    states: tuple[Held, ...]
    axis: int
    chosen: dict[int, StaticFactor]
    """Factors of the axes before it."""
    factor: StaticFactor | None


class DearRows(NamedTuple):
    """Whether an operation works on stored rows, and what that depends on."""

    op: StaticOp
    states: tuple[Held, ...]
    about: tuple
    """What else `plan_operation` was told."""
    more: Amount
    """Bytes that a device sends more if it does."""

    def pays(self, share: float = 1.0) -> bool:
        """Whether it is fewer, at a share of the micro-batch planned, whatever is rounded."""
        return self.more[0] + self.more[1] * share < -1.0


class Setting:
    """A program at given sizes under given logical axes."""

    def __init__(
        self,
        program: StaticProgram,
        sizes: Sequence[int],
        axes: Sequence[Axis],
        allowed: Sequence[frozenset[int]],
        *,
        growing: frozenset[int] = frozenset(),
        keep: Keep = Keep.INSTRUCTIONS,
        outlines: Outlines | None = None,
        sum_dtypes: Mapping[int, str] | None = None,
    ) -> None:
        """Nothing is planned yet.

        Args:
            program: the operations.
            sizes: per factor.
            axes: logical axes.
            allowed: per axis, the factors it may shard.
            growing: factors whose size is proportional to the micro-batch.
            keep: what is wanted of what is planned.
            outlines: what is known of programs that come out; nothing otherwise.
            sum_dtypes: values whose sums are taken in another type than their own, with that.
        """
        self.program, self.sizes, self.growing, self.keep = program, tuple(sizes), growing, keep
        self.axes = tuple(axes)
        self.axis_sizes = tuple(axis.size for axis in axes)
        self.nowhere: Layout = (NOWHERE,) * len(self.axes)
        self.allowed = tuple(allowed)
        self._shared: dict[tuple, dict[tuple, Outcome]] = {}
        self._bodies: dict[int, Setting] = {}
        self.moves: dict[tuple[int, Held, Layout], tuple[Outcome, int]] = {}
        """Conversions by value, state and target, with the version that each makes."""
        self.outlines = Outlines() if outlines is None else outlines
        self.sum_dtypes = {} if sum_dtypes is None else sum_dtypes
        self._elsewhere: dict[tuple[int, ...], Setting] = {}
        self._states: dict[tuple, Held] = {}
        self._bytes: dict[tuple[int, Held, int], float] = {}
        self._points: dict[int, tuple[float, bool]] = {}

    @cached_property
    def outcomes(self) -> list[dict[tuple, Outcome]]:
        """Per operation, by the states of its operands. Many settings are only asked questions, and have none."""
        return [{} for _ in self.program.operations]

    def allowing(self, allowed: Sequence[frozenset[int]]) -> Setting:
        """The same with other factors allowed; all that come from one setting share what does not depend on these."""
        other = copy.copy(self)
        other.allowed, other._bodies = tuple(allowed), {}
        other.outcomes = [
            self._shared.setdefault((op.index, *[factors & op.asks for factors in allowed]), {})
            for op in self.program.operations
        ]
        return other

    def body(self, op: StaticOp) -> Setting:
        """The setting of a loop's body."""
        if op.index not in self._bodies:
            assert op.body is not None
            self._bodies[op.index] = Setting(
                op.body, self.sizes, self.axes, self.allowed, growing=self.growing, keep=self.keep,
                outlines=self.outlines,
            )  # fmt: skip
        return self._bodies[op.index]

    def elsewhere(self, sizes: tuple[int, ...]) -> Setting:
        """The same at other sizes, to ask what would be chosen there."""
        if sizes not in self._elsewhere:
            self._elsewhere[sizes] = Setting(self.program, sizes, self.axes, self.allowed)
        return self._elsewhere[sizes]

    def state(self, layouts: tuple[Layout, ...], *, lazy: frozenset[int] = frozenset(), zero: bool = False) -> Held:
        """The one object for a state."""
        key = layouts, lazy, zero
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = Held(layouts, lazy, zero)
        return found

    def initial(self) -> dict[int, Held]:
        """States before a pass: constants are at hand everywhere."""
        values = self.program.program.values
        return {v: self.state((self.nowhere,), zero=values[v].zero) for v in self.program.program.constants}

    # ------------------------------------------------------------------------------------------ sizes

    def frame(self, value: int, lazy: frozenset[int]) -> Frame:
        """Sizes and order at the value's positions."""
        dims = self.program.dim_of[value]
        sizes = tuple(1 if dims[p] in lazy else self.sizes[f] for p, f in enumerate(self.program.positions[value]))
        return Frame(sizes, self.program.ascending[value])

    def local_bytes(self, value: int, held: Held, version: int = 0) -> float:
        """Local bytes of a version of a value."""
        key = value, held, version
        total = self._bytes.get(key)
        if total is None:
            total = float(self.program.itemsize[value])
            dims = self.program.dim_of[value]
            for position, factor in enumerate(self.program.positions[value]):
                if dims[position] not in held.lazy:
                    total *= self.sizes[factor]
            for size, place in zip(self.axis_sizes, held.layouts[version], strict=True):
                if place >= 0:
                    total /= size
            self._bytes[key] = total
        return total

    def whole_bytes(self, value: int) -> float:
        """Bytes of a whole value."""
        total = float(self.program.itemsize[value])
        for factor in self.program.positions[value]:
            total *= self.sizes[factor]
        return total

    def local_shape(self, value: int, layout: Layout, lazy: frozenset[int]) -> tuple[int, ...]:
        """Local shape, dim by dim; lazily broadcast dims are 1."""
        shape = [1] * self.program.rank[value]
        dims = self.program.dim_of[value]
        for dim, factor in zip(dims, self.program.positions[value], strict=True):
            if dim not in lazy:
                shape[dim] *= self.sizes[factor]
        for size, place in zip(self.axis_sizes, layout, strict=True):
            if place >= 0:
                shape[dims[place]] //= size
        return tuple(shape)

    def grows(self, value: int, lazy: frozenset[int]) -> bool:
        """Whether a value's size is proportional to the micro-batch."""
        growing = self.growing
        if not growing:
            return False
        for dim, factor in zip(self.program.dim_of[value], self.program.positions[value], strict=True):
            if factor in growing and dim not in lazy:
                return True
        return False

    def points(self, op: StaticOp) -> tuple[float, bool]:
        """FLOPs of a whole operation, and whether they are proportional to the micro-batch."""
        found = self._points.get(op.index)
        if found is None:
            flops, grows = op.flops, False
            for factor in op.factors:
                flops *= self.sizes[factor.factor]
                grows |= factor.factor in self.growing
            found = self._points[op.index] = flops, grows
        return found

    # ------------------------------------------------------------------------------------------ conversions

    def convert(self, value: int, held: Held, target: Layout) -> tuple[Outcome, int]:
        """How a value gets into a layout, from the nearest version that there is, and the version's number."""
        key = value, held, target
        found = self.moves.get(key)
        if found is None:
            found = self.moves[key] = self._convert(value, held, target)
        return found

    def _convert(self, value: int, held: Held, target: Layout) -> tuple[Outcome, int]:
        if held.lazy:
            dims = self.program.dim_of[value]
            target = tuple(NOWHERE if t >= 0 and dims[t] in held.lazy else t for t in target)
        if target in held.layouts:
            return NOTHING, held.layouts.index(target)
        layouts = held.layouts
        source = min(range(len(layouts)), key=lambda i: (_distance(layouts[i], target), i))
        return self._version(value, held, source, target, self.steps(value, held, source, target))

    def steps(self, value: int, held: Held, source: int, target: Layout) -> tuple[Step, ...]:
        """From a version of a value to a layout."""
        steps = tuple(convert(self.axes, self.frame(value, held.lazy), held.layouts[source], target))
        return summed_in(steps, self.sum_dtypes[value]) if value in self.sum_dtypes else steps

    def relabel(self, value: int, held: Held, layout: Layout) -> tuple[Outcome, int]:
        """Sees a value's first version as another layout of the same local array."""
        if layout in held.layouts:
            return NOTHING, held.layouts.index(layout)
        return self._version(value, held, 0, layout, ())

    def settle(self, value: int, held: Held) -> Outcome:
        """Makes a value's first version from its second, in which it is computed."""
        return self._step(value, held, 1, 0, self.steps(value, held, 1, held.first))

    def _version(self, value: int, held: Held, source: int, target: Layout, steps: tuple) -> tuple[Outcome, int]:
        after = self.state((*held.layouts, target), lazy=held.lazy, zero=held.zero)
        version = len(held.layouts)
        return self._step(value, after, source, version, steps), version

    def _step(self, value: int, held: Held, source: int, target: int, steps: tuple) -> Outcome:
        """One version of a value made from another, both among those held."""
        made = () if self.keep is Keep.COUNTS else (
            Convert(value, source, target, steps, self.local_shape(value, held.layouts[target], held.lazy)),
        )  # fmt: skip
        tallies = () if self.keep is Keep.STEPS else (self._tally(value, held, source, target, steps),)
        return Outcome({value: held}, made, tallies, form=self.outlines.number(tallies))

    def _tally(self, value: int, held: Held, source: int, target: int, steps: Sequence[Step]) -> Tally:
        """A conversion counts its collectives; slices alone fuse with what reads them."""
        grows = self.grows(value, held.lazy)
        sent = collectives(steps, self.program.itemsize[value], self.program.program.values[value].dtype)
        moved = self.local_bytes(value, held, source)
        return Tally(
            read=((value, source),),
            made=(((value, target), self.local_bytes(value, held, target), grows),),
            fused=not sent,
            moved=NONE if not sent else (0.0, moved) if grows else (moved, 0.0),
            sent=tuple([(each, grows) for each in sent]),
            place=Where.WHOLE if sent else Where.FUSED if steps else Where.SEEN,
        )


NOTHING = Outcome({}, (), ())
"""What is at hand already."""


def _distance(source: Layout, target: Layout) -> int:
    if any(s != PENDING and t == PENDING for s, t in zip(source, target, strict=True)):
        return 1 << 30
    return sum((0 if s == t else 1 if s == NOWHERE else 4) for s, t in zip(source, target, strict=True))
