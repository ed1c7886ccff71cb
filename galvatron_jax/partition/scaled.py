"""Passes over a layer at other sizes of its axes than those at which they were planned.

How many devices an axis has decides little: what it can shard, by divisibility; which factor is the cheapest where
each moves bytes; whether rows of tables are worked on where they are stored; and which of a value's versions is the
smallest. Where all that comes out as it did at the sizes planned, the passes are the same, and what they count for
follows from the sizes of what they handle: no operation is looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from galvatron_jax.partition.agreement import Dear
from galvatron_jax.partition.choice import Choice
from galvatron_jax.partition.counts import Amount, Counts, Sent, Tally, collectives, combined, largest
from galvatron_jax.partition.instructions import Version
from galvatron_jax.partition.layout import Layout, Role
from galvatron_jax.partition.liveness import Lifetimes, Named
from galvatron_jax.partition.operations import asked_again
from galvatron_jax.partition.placement import Counted, Placement
from galvatron_jax.partition.planner import Pass
from galvatron_jax.partition.scatters import scattered_late
from galvatron_jax.partition.setting import DearChoice, DearRows, Held, Outcome, Setting

if TYPE_CHECKING:
    from galvatron_jax.partition.layers import Passes


MAX_SHARING = 6
"""Axes that may shard one factor where contexts follow others, ZeRO's among them."""
MAX_MODELS = 16
"""Contexts of one structure that others follow."""


class Scaled:
    """What passes in the setting of one context, the model, count for in that of another, if all is chosen alike."""

    def __init__(self, setting: Setting, planned: Setting, recipes: Recipes) -> None:
        """Placements must be `alike`.

        Args:
            setting: where figures are wanted.
            planned: the model's.
            recipes: the model's.
        """
        self.setting, self.planned, self.recipes = setting, planned, recipes
        self._choices: dict[int, tuple[DearChoice | DearRows, DearChoice | DearRows | None]] = {}
        """By identity, the model's choices, and the same here if they come out alike."""
        self._chunks: list[np.ndarray] = []
        self._sizes = np.empty(0)
        """Of all measures, chunk by chunk and together."""
        self._counts: dict[int, Counts] = {}
        self._sent: dict[_Message, tuple[Sent, ...]] = {}

    def counted(self, passes: Passes) -> Counted | None:
        """What the model's passes count for; None where they would not be the same."""
        dear = []
        for choice in passes.counted.dear:
            here = self._chosen(choice)
            if here is None:
                return None
            dear.append(here)
        if any(pick.smallest(self.setting) != pick.smallest(self.planned) for pick in passes.about.picks):
            return None
        return self._evaluate(self.recipes.of(passes), passes, tuple(dear))

    def _chosen(self, choice: DearChoice | DearRows) -> DearChoice | DearRows | None:
        if id(choice) not in self._choices:
            self._choices[id(choice)] = choice, _chosen_alike(choice, self.setting)
        return self._choices[id(choice)][1]

    def _evaluate(self, recipe: _Recipe, passes: Passes, dear: Dear) -> Counted:
        measures = self.recipes.measures
        if len(self._sizes) < len(measures):
            self._chunks += measures.at(self.setting, self._chunks)
            self._sizes = np.concatenate(self._chunks)
        sizes, kept = self._sizes, recipe.kept_inputs
        stays, grows = recipe.residuals.at(sizes)
        return Counted(
            counts=(self._phase(recipe.forward), self._phase(recipe.backward)),
            residual_bytes=(int(stays), int(grows)),
            kept_inputs=tuple(
                [(port, 0, int(sizes[n])) if larger else (port, int(sizes[n]), 0) for port, n, larger in kept]
            ),
            gradient_layouts=passes.counted.gradient_layouts,
            dear=dear,
        )

    def _phase(self, phase: _Phase) -> Counts:
        found = self._counts.get(id(phase))
        if found is None:
            found = self._counts[id(phase)] = phase.at(self._sizes, self._messages)
        return found

    def _messages(self, message: _Message) -> tuple[Sent, ...]:
        found = self._sent.get(message)
        if found is None:
            found = self._sent[message] = tuple((each, message.grows) for each in message.sent(self.setting))
        return found


def _chosen_alike(choice: DearChoice | DearRows, setting: Setting) -> DearChoice | DearRows | None:
    """A choice in another setting, if it comes out there as it did."""
    if isinstance(choice, DearRows):
        rows = asked_again(choice, setting)
        return rows if rows is not None and rows.pays() == choice.pays() else None
    factor, _ = Choice(setting, choice.op, choice.states).cheapest(choice.axis, choice.chosen)
    return choice._replace(setting=setting) if factor is choice.factor else None


def alike(one: Placement, other: Placement, *, stored: bool) -> bool:
    """Whether placements of one `structure` are laid out alike at their boundaries.

    Args:
        one: a placement.
        other: another.
        stored: whether it matters how parameters are spread over ZeRO's axes, as it does to ZeRO 2 and 3.
    """
    here, there = one.ports, other.ports
    return (
        one.setting.growing == other.setting.growing
        and here.outputs == there.outputs
        and here.inputs(sharded=False) == there.inputs(sharded=False)
        and not (stored and here.inputs(sharded=True) != there.inputs(sharded=True))
        and not (stored and _room(one, _sharing_rows(one)) != _room(other, _sharing_rows(other)))
    )


def structure(place: Placement) -> tuple | None:
    """Roles of axes, which can shard what, and the type of sums: placements of one structure may be `alike`.

    None for programs with loops, whose bodies are planned as often as it takes; where too many axes may shard one
    factor to look at all their sets; and where an axis has one device, for which all is free, so nothing asked again.
    """
    axes, allowed = place.axes.axes, place.axes.allowed
    sharing = {f: [a for a, factors in enumerate(allowed) if f in factors] for f in frozenset().union(*allowed)}
    most = max(map(len, [*sharing.values(), *_sharing_rows(place).values()]), default=0)
    if most > MAX_SHARING or any(op.loop for op in place.program.operations) or any(axis.size == 1 for axis in axes):
        return None
    ranks = sorted({axis.rank for axis in axes})
    roles = tuple([(axis.role, axis.mirror, ranks.index(axis.rank)) for axis in axes])
    return place.ports.sp_kind, allowed, roles, _room(place, sharing), place.gradient_sum_dtype


def _sharing_rows(place: Placement) -> dict[int, list[int]]:
    """The axes that may shard rows which ZeRO stores apart, its own among them."""
    axes, layout = place.axes, place.storage.layout
    stores, positions = axes.of(Role.STORAGE), place.program.positions
    apart = [v for v in place.static.parameter_values if layout(v, sharded=True) != layout(v, sharded=False)]
    rows = place.program.stored_rows & {factor for value in apart for factor in positions[value]}
    return {f: [a for a, factors in enumerate(axes.allowed) if f in factors or a in stores] for f in rows}


def _room(place: Placement, sharing: Mapping[int, Sequence[int]]) -> tuple:
    """Per factor, whether each set of axes that may share it divides it; no axis shares with its own devices."""
    found, axes = [], place.axes.axes
    for factor, sharers in sorted(sharing.items()):
        ways: list[tuple[int, frozenset[int]]] = [(1, frozenset())]
        for axis in sharers:
            size, mirror = axes[axis].size, axes[axis].mirror
            ways += [(n * size, others | {axis}) for n, others in ways if mirror not in others]
        found.append((factor, tuple([place.sizes[factor] % n == 0 for n, _ in ways])))
    return tuple(found)


class Pick(NamedTuple):
    """A question: which of a value's versions is the smallest?"""

    value: int
    held: Held
    versions: tuple[int, ...]

    def smallest(self, setting: Setting) -> int:
        """The answer in a setting; of equals the first."""
        return min(self.versions, key=lambda version: setting.local_bytes(self.value, self.held, version))


# ------------------------------------------------------------------------------------------ what figures are made of


_Product = tuple[float, tuple[int, ...], tuple[int, ...]]
"""A unit, factors, and axes that share them out."""
NOTHING = 0
"""The number of a measure that is nothing."""


class _Measures:
    """Sizes of values and of work, as products of those of factors over those of axes."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._seen: dict[tuple, int] = {}
        """By version, or by operation and axes."""
        self._axes: dict[Layout, tuple[int, ...]] = {}
        self._numbers: dict[_Product, int] = {(0.0, (), ()): NOTHING}
        self._chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        """Products so far as arrays: units, factors and axes."""

    def __len__(self) -> int:
        return len(self._numbers)

    def value(self, value: int, held: Held, version: int) -> int:
        """The number of a version's local bytes."""
        seen = value, held, version
        number = self._seen.get(seen)
        if number is None:
            number = self._seen[seen] = self._value(value, held, held.layouts[version])
        return number

    def _value(self, value: int, held: Held, layout: Layout) -> int:
        program = self.setting.program
        factors = program.positions[value]
        if held.lazy:
            factors = tuple([f for f, dim in zip(factors, program.dim_of[value], strict=True) if dim not in held.lazy])
        axes = self._axes.get(layout)
        if axes is None:
            axes = self._axes[layout] = tuple([axis for axis, place in enumerate(layout) if place >= 0])
        return self._number((float(program.itemsize[value]), factors, axes))

    def work(self, operation: int, axes: tuple[int, ...]) -> int:
        """The number of an operation's local FLOPs."""
        seen = operation, axes
        number = self._seen.get(seen)
        if number is None:
            op = self.setting.program.operations[operation]
            factors = tuple([factor.factor for factor in op.factors])
            number = self._seen[seen] = self._number((op.flops, factors, axes))
        return number

    def _number(self, product: _Product) -> int:
        return self._numbers.setdefault(product, len(self._numbers))

    def at(self, setting: Setting, known: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All that are not known yet at the sizes of a setting, chunk by chunk. float64[measures of a chunk] each."""
        begin = sum([len(units) for units, _, _ in self._chunks])
        if begin < len(self):
            units, factors, axes = zip(*islice(self._numbers, begin, None), strict=True)
            self._chunks.append((np.array(units), _padded(factors), _padded(axes)))
        sizes, ways = np.array([1.0, *setting.sizes]), np.array([1.0, *setting.axis_sizes])
        return [
            units * sizes[factors].prod(axis=1) / ways[axes].prod(axis=1)
            for units, factors, axes in self._chunks[len(known) :]
        ]


class _Sums(NamedTuple):
    """Sums of measures."""

    measures: np.ndarray
    """Of all sums, one after the other; each begins with nothing, for no sum may be empty."""
    begins: np.ndarray

    @classmethod
    def of(cls, *sums: Sequence[int]) -> _Sums:
        """Of the measures of each."""
        begins = [0, *accumulate([len(each) + 1 for each in sums[:-1]])]
        measures = list(chain.from_iterable([(NOTHING, *each) for each in sums]))
        return cls(np.array(measures, np.int64), np.array(begins, np.int64))

    def at(self, sizes: np.ndarray) -> list[float]:
        """What they come to."""
        return np.add.reduceat(sizes.take(self.measures), self.begins).tolist()


def _padded(rows: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Rows of indices from 1, filled with zeros. int64[rows, longest]."""
    longest = max([len(row) for row in rows], default=0)
    return np.array([[*[index + 1 for index in row], *[0] * (longest - len(row))] for row in rows], np.int64)


class _Message(NamedTuple):
    """What a conversion sends, or a reduction that is combined at once."""

    value: int
    held: Held
    source: int
    """Version."""
    target: int
    """Version; -1 for a reduction."""
    axes: tuple[int, ...]
    """Of a reduction."""
    how: str
    grows: bool

    def sent(self, setting: Setting) -> Iterable:
        """Its collectives in a setting."""
        value, held, program = self.value, self.held, setting.program
        size, dtype = program.itemsize[value], program.program.values[value].dtype
        if self.target >= 0:
            return collectives(setting.steps(value, held, self.source, held.layouts[self.target]), size, dtype)
        names = tuple([name for axis in self.axes for name in setting.axes[axis].names])
        shape = setting.local_shape(value, held.layouts[self.source], held.lazy)
        return (combined(setting.axes, names, self.how, shape, size, dtype),)


@dataclass(frozen=True, eq=False)
class _Program:
    """What a program's peaks are made of."""

    tallies: Sequence[Tally]
    made: tuple[tuple[int, ...], ...]
    """Per instruction, the measures of what it makes."""
    lifetimes: Lifetimes
    named: Callable[[Sequence[Tally]], Named]
    """From tallies of other sizes."""
    values: np.ndarray
    """Measures of its values. int64[values]"""
    grows: tuple[bool, ...]
    """Per value."""

    @classmethod
    def of(
        cls,
        tallies: Sequence[Tally],
        made: tuple[tuple[int, ...], ...],
        lifetimes: Lifetimes,
        named: Callable[[Sequence[Tally]], Named],
    ) -> _Program:
        places = lifetimes.made_at(lambda: named(tallies))
        values = np.array([made[index][place] for index, place in places], np.int64)
        return cls(tallies, made, lifetimes, named, values, tuple([tallies[i].made[p][2] for i, p in places]))

    def peaks(self, sizes: np.ndarray) -> list[Amount]:
        """Bytes in memory whenever they may be most."""

        def program() -> Named:
            return self.named(
                [
                    tally._replace(
                        made=tuple(
                            [(v, float(sizes[n]), grows) for (v, _, grows), n in zip(tally.made, numbers, strict=True)]
                        )
                    )
                    for tally, numbers in zip(self.tallies, self.made, strict=True)
                ]
            )

        values = list(zip(sizes[self.values].tolist(), self.grows, strict=True))
        return self.lifetimes.peaks_at(values, self.tallies, program)


@dataclass(frozen=True, eq=False)
class _Phase:
    """What a pass's counts are made of."""

    program: _Program
    sums: _Sums
    """What moves, of what stays and of what grows; and FLOPs."""
    sent: tuple[_Message, ...]
    counts: Counts
    """At the sizes planned."""
    through: _Program | None = None
    """Behind forward, where the layer ends in the loss."""
    scattered: Mapping[int, int] = field(default_factory=dict)
    """Measures of parameters' gradients that leave scattered, by port, in the order in which they are made."""

    def at(self, sizes: np.ndarray, messages: Callable[[_Message], tuple[Sent, ...]]) -> Counts:
        """The counts at other sizes."""
        stays, grows, work, more = self.sums.at(sizes)
        return Counts(
            sent=tuple([each for message in self.sent for each in messages(message)]),
            flops=(work, more),
            moved=(stays, grows),
            peaks=largest([(0.0, 0.0), *self.program.peaks(sizes)]),
            operations=self.counts.operations,
            read=self.counts.read,
            through_peaks=largest(self.through.peaks(sizes)) if self.through is not None else (),
            unscattered_bytes=self._unscattered_bytes(sizes),
        )

    def _unscattered_bytes(self, sizes: np.ndarray) -> int:
        gradients = {port: int(sizes[measure]) for port, measure in self.scattered.items()}
        return sum([gradients[port] for port in scattered_late(gradients)])


@dataclass(frozen=True, eq=False)
class _Recipe:
    """What is counted of both passes."""

    forward: _Phase
    backward: _Phase
    residuals: _Sums
    """Of what stays and of what grows."""
    kept_inputs: tuple[tuple[int, int, bool], ...]
    """Input port, measure, and whether it grows."""


class _Share(NamedTuple):
    """What one operation adds to a pass."""

    outcome: Outcome
    made: tuple[tuple[int, ...], ...]
    """Per instruction, the measures of what it makes."""
    moved: tuple[list[int], list[int]]
    """Measures of what it reads and does not fuse with: of what stays, and of what grows."""
    sent: tuple[_Message, ...]


class Recipes:
    """What the passes in a context count for, at any sizes."""

    def __init__(self, setting: Setting, inputs: Sequence[int]) -> None:
        """Nothing is known yet.

        Args:
            setting: of the context.
            inputs: the values at the layer's input ports.
        """
        self.setting, self.inputs, self.measures = setting, inputs, _Measures(setting)
        self._phases: dict[int, tuple[Counts, _Phase]] = {}
        self._recipes: dict[int, tuple[Passes, _Recipe]] = {}
        self._shares: dict[int, _Share] = {}
        """By the identity of what was planned of an operation."""

    def of(self, passes: Passes) -> _Recipe:
        """The recipe of both passes."""
        if id(passes) not in self._recipes:
            self._recipes[id(passes)] = passes, self._recipe(passes)
        return self._recipes[id(passes)][1]

    def _recipe(self, passes: Passes) -> _Recipe:
        forward, backward = passes.forward, passes.backward
        there, _ = passes.counted.counts
        if id(there) not in self._phases:
            self._phases[id(there)] = there, self._phase(forward, there)
        ahead = self._phases[id(there)][1]
        residuals: tuple[list[int], list[int]] = [], []
        for value, number, _ in passes.kept:
            residuals[forward.grows(value)].append(self.measures.value(value, forward.held[value], number))
        kept = []
        for port, _, _ in passes.counted.kept_inputs:
            value = self.inputs[port]
            number, grows = self.measures.value(value, backward.held[value], 0), backward.grows(value)
            residuals[grows].append(number)
            kept.append((port, number, grows))
        return _Recipe(ahead, self._backward(passes), _Sums.of(*residuals), tuple(kept))

    def _backward(self, passes: Passes) -> _Phase:
        forward, backward, about = passes.forward, passes.backward, passes.about
        phase = self._phase(backward, passes.counted.counts[1], about.given, about.handed_on, about.at_once)
        scattered = {port: self.measures.value(value, backward.held[value], 0) for port, value in about.scattered}
        through = None
        if about.in_a_row is not None:
            pair = about.in_a_row
            shares = self._shares_of(forward) + self._shares_of(backward)
            made = tuple(chain.from_iterable([share.made for share in shares]))
            through = _Program.of(pair.tallies, made, pair.lifetimes, pair.named)
        return replace(phase, through=through, scattered=scattered)

    def _phase(
        self,
        run: Pass,
        counts: Counts,
        given: Sequence[Tally] = (),
        handed_on: frozenset[Version] = frozenset(),
        at_once: frozenset[Version] = frozenset(),
    ) -> _Phase:
        tallies, outlines = run.tallies, self.setting.outlines
        results, _ = outlines.moving(tallies, run.forms)
        shares = self._shares_of(run)
        made = [*self._made(run, given), *chain.from_iterable([share.made for share in shares])]
        moved: tuple[list[int], list[int]] = [], []
        for index, place in results:
            moved[tallies[index].made[place][2]].append(made[len(given) + index][place])
        for share in shares:
            moved[False].extend(share.moved[False])
            moved[True].extend(share.moved[True])
        flops: tuple[list[int], list[int]] = [], []
        for operation, axes in run.work:
            grows = self.setting.points(self.setting.program.operations[operation])[1]
            flops[grows].append(self.measures.work(operation, axes))
        known = outlines.lifetimes((outlines.number(given), *run.forms), handed_on, at_once)
        program = _Program.of(
            [*given, *tallies], tuple(made), known, lambda resized: Named(resized, handed_on, at_once)
        )
        sent = tuple(chain.from_iterable([share.sent for share in shares]))
        return _Phase(program, _Sums.of(*moved, *flops), sent, counts)

    def _shares_of(self, run: Pass) -> list[_Share]:
        """What each operation adds to a pass."""
        known = self._shares
        return [known.get(id(outcome)) or self._share(run, outcome) for outcome in run.outcomes]

    def _share(self, run: Pass, outcome: Outcome) -> _Share:
        """What an operation adds to a pass: the same in all, which share outcomes."""
        moved: tuple[list[int], list[int]] = [], []
        for value, version in chain.from_iterable([tally.read for tally in outcome.tallies if not tally.fused]):
            moved[run.grows(value)].append(self.measures.value(value, run.held[value], version))
        sent = tuple([self._message(run, tally) for tally in outcome.tallies if tally.sent])
        share = self._shares[id(outcome)] = _Share(outcome, self._made(run, outcome.tallies), moved, sent)
        return share

    def _made(self, run: Pass, tallies: Sequence[Tally]) -> tuple[tuple[int, ...], ...]:
        held, number = run.held, self.measures.value
        return tuple([tuple([number(v, held[v], n) for (v, n), _, _ in tally.made]) for tally in tallies])

    def _message(self, run: Pass, tally: Tally) -> _Message:
        (value, version), _, grows = tally.made[0]
        if tally.read[0][0] == value:
            return _Message(value, run.held[value], tally.read[0][1], version, (), "", grows)
        names, axes = set(tally.sent[0][0].axes), self.setting.axes
        over = tuple(i for i, axis in enumerate(axes) if axis.role is not Role.STORAGE and set(axis.names) <= names)
        return _Message(value, run.held[value], version, -1, over, tally.sent[0][0].combine, grows)
