"""What of a local program is needed, and how much of it is in memory at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from galvatron_jax.partition.instructions import Instruction, Version, operands_of, results_of

if TYPE_CHECKING:
    from galvatron_jax.partition.counts import Amount, Tally


class Where(IntEnum):
    """Where the compiler puts what an instruction makes."""

    SEEN = 0
    """Nowhere: its operand, seen otherwise (a reshape; a transpose, which its reader takes as a layout)."""
    TURNED = 1
    """As `SEEN`, with another dim last: elementwise work that reads it goes on in its operand's order."""
    FUSED = 2
    """In what reads it, done anew in each reader; in memory where that would not do."""
    REDUCED = 3
    """In memory. Its operands may be fused into it."""
    WHOLE = 4
    """In memory, and so must its operands be: matrix products, collectives, loops."""
    IN_PLACE = 5
    """As `WHOLE`, in the memory of its first operand if nothing reads that later."""


_REUSING = (Where.FUSED, Where.IN_PLACE)
"""What may take the place of an operand of its size that dies: elementwise results, and what is done in place."""


def needed(instructions: Sequence[Instruction], versions: Iterable[Version]) -> tuple[Instruction, ...]:
    """The instructions without which some versions of values cannot be made, in order.

    Args:
        instructions: a program.
        versions: what is wanted of it.
    """
    wanted = set(versions)
    kept = []
    for instruction in reversed(instructions):
        if wanted.intersection(results_of(instruction)):
            kept.append(instruction)
            wanted.update(operands_of(instruction))
    return tuple(kept[::-1])


def peaks(
    tallies: Sequence[Tally], handed_on: AbstractSet = frozenset(), at_once: AbstractSet = frozenset()
) -> list[Amount]:
    """Bytes in memory during a program, inputs excluded, whenever something is made.

    XLA fuses elementwise work into what reads it, and repeats it in several readers where it reads no more than it
    makes (a bfloat16 array, say, for its float32 copy). What matrix products and collectives read is in memory, and so
    is what a reader could only repeat by keeping more. Elementwise work has one order of dims: what is read in it with
    something of its size in another order is brought into that one. Results die with their last reader: gradients of
    parameters at once, since they are written to where they add up.

    Args:
        tallies: the program's instructions.
        handed_on: versions that stay until its end.
        at_once: versions of fused work that is done with the product it reads, not with what reads it.
    """
    return Lifetimes().peaks(tallies, lambda: Named(tallies, handed_on, at_once))


class Named(NamedTuple):
    """A program by its versions."""

    tallies: Sequence[Tally]
    handed_on: AbstractSet = frozenset()
    """Versions that stay until its end."""
    at_once: AbstractSet = frozenset()
    """See `peaks`."""


Size = tuple[float, bool]
"""Bytes, and whether they are proportional to the micro-batch."""
Answer = TypeVar("Answer", bound=Hashable)
Asked = tuple[Callable[..., Hashable], tuple]
"""A question about sizes of values: a function of the sizes and of what it is about, and that."""


class Lifetimes:
    """When values come and go in programs that differ in sizes alone.

    What lives when depends on sizes through few questions, such as whether work is done anew in each of its readers.
    So what was found for one program holds for all with the same answers: these make a tree.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._made_at: list[tuple[int, int]] | None = None
        self._answers: dict[Hashable, _Question | _Calendar] = {}

    def peaks(self, tallies: Sequence[Tally], program: Callable[[], Named]) -> list[Amount]:
        """See `peaks`; at least whenever they may be most.

        Args:
            tallies: the program's instructions, whatever the names of their versions.
            program: gives them with versions named, where that is needed.
        """
        sizes = [tallies[index].made[place][1:] for index, place in self.made_at(program)]
        return self.peaks_at(sizes, tallies, program)

    def made_at(self, program: Callable[[], Named]) -> list[tuple[int, int]]:
        """Per value, the instruction that makes it, and the place among what that makes."""
        if self._made_at is None:
            self._find(program())
        assert self._made_at is not None
        return self._made_at

    def peaks_at(self, sizes: Sequence[Size], tallies: Sequence[Tally], program: Callable[[], Named]) -> list[Amount]:
        """The same with values of some sizes; of `tallies` only what loops' bodies hold is read."""
        found = self._answers.get(None)
        while isinstance(found, _Question):
            ask, about = found.asked
            found = found.answers.get(ask(sizes, *about))
        return (found or self._find(program())).peaks(tallies, sizes)

    def _find(self, program: Named) -> _Calendar:
        values = _number(program.tallies)
        values.at_once = {values.number[v] for v in program.at_once if v in values.number}
        staying = {values.number[v] for v in program.handed_on if v in values.number}
        calendar = _calendar(program.tallies, values, _stored(program.tallies, values, staying))
        answers, answer = self._answers, None
        for asked, given in values.asked:
            question = answers.setdefault(answer, _Question(asked, {}))
            assert isinstance(question, _Question)
            answers, answer = question.answers, given
        answers[answer] = calendar
        self._made_at = values.made_at
        return calendar


class _Question(NamedTuple):
    """What is asked, and what follows from each answer."""

    asked: Asked
    answers: dict[Hashable, _Question | _Calendar]


def _no_more(sizes: Sequence[Size], read: Sequence[int], made: int) -> bool:
    """Whether some values take no more bytes together than another."""
    return sum([sizes[value][0] for value in read]) <= sizes[made][0]


def _largest(sizes: Sequence[Size], values: Sequence[int]) -> tuple[int, ...]:
    """The largest of some values: all that are equal."""
    largest = max([sizes[value] for value in values])
    return tuple([value for value in values if sizes[value] == largest])


@dataclass(slots=True)
class _Values:
    """A program's values by number; those that are seen as others have theirs."""

    number: dict = field(default_factory=dict)
    """By version."""
    size: list[Size] = field(default_factory=list)
    made_at: list[tuple[int, int]] = field(default_factory=list)
    """The instruction that makes each, and the place among what it makes."""
    maker: list[int] = field(default_factory=list)
    """Index of the instruction that makes each."""
    readers: list[list[int]] = field(default_factory=list)
    """Indices of those that read it."""
    reads: list[list[int]] = field(default_factory=list)
    """Per instruction."""
    made: list[list[int]] = field(default_factory=list)
    """Per instruction."""
    reordered: set[int] = field(default_factory=set)
    """Those that are brought into the order of what they are read with."""
    at_once: set[int] = field(default_factory=set)
    """See `peaks`."""
    first: list[int] = field(default_factory=list)
    """When each is first read by what is really done then; fused work is done in its readers. In half steps: what is
    fused but in memory is made at an even one, just before the instruction that reads it first, which has the next."""
    last: list[int] = field(default_factory=list)
    asked: list[tuple[Asked, Hashable]] = field(default_factory=list)
    """Questions about sizes so far, with their answers."""

    def ask(self, question: Callable[..., Answer], *about: object) -> Answer:
        """The answer to a question about sizes; nothing else may be decided by them."""
        answer = question(self.size, *about)
        self.asked.append(((question, about), answer))
        return answer


def _number(tallies: Sequence[Tally]) -> _Values:
    values = _Values()
    number, size, maker, readers = values.number, values.size, values.maker, values.readers
    turned: set[Version] = set()
    for index, tally in enumerate(tallies):
        read, made = [number[version] for version in tally.read if version in number], []
        values.reads.append(read)
        values.made.append(made)
        if tally.place <= Where.TURNED:
            if read:
                number[tally.made[0][0]] = read[0]
                if (tally.place is Where.TURNED) != (tally.read[0] in turned):
                    turned.add(tally.made[0][0])
            continue
        if turned and tally.place is Where.FUSED and not turned.isdisjoint(tally.read):
            # Few instructions: those that go on in another order than the program's.
            largest = values.ask(_largest, tuple(read))
            values.reordered.update(
                number[version]
                for version in tally.read
                if version in number and version not in turned and number[version] in largest
            )
            turned.update(version for version, _, _ in tally.made)
        for value in read:
            readers[value].append(index)
        for place, (version, bytes_, grows) in enumerate(tally.made):
            if version not in number:
                number[version] = len(size)
                made.append(len(size))
                size.append((bytes_, grows))
                values.made_at.append((index, place))
                maker.append(index)
                readers.append([])
    return values


def _stored(tallies: Sequence[Tally], values: _Values, staying: AbstractSet[int]) -> list[bool]:
    """Which values are in memory; and, in `values`, when they are read first and last."""
    readers = values.readers
    stored, roots = [True] * len(values.size), []
    for value, index in enumerate(values.maker):
        own = (value,)
        if tallies[index].place is Where.FUSED and value not in staying and value not in values.reordered:
            reading, whole = readers[value], False
            for reader in reading:
                if tallies[reader].place >= Where.WHOLE:
                    whole = True
                    break
            if not whole:
                below = tuple({root for operand in values.reads[index] for root in roots[operand]})
                if len(reading) < 2 or values.ask(_no_more, below, value):
                    stored[value], own = False, below
        roots.append(own)
    _date(tallies, values, stored, staying)
    return stored


def _date(tallies: Sequence[Tally], values: _Values, stored: Sequence[bool], staying: AbstractSet[int]) -> None:
    made, end = values.made, 2 * len(tallies)
    first = [2 * maker + 1 for maker in values.maker]
    last = list(first)
    for value in range(len(first) - 1, -1, -1):
        reading = values.readers[value]
        if reading:
            begins, ends = end, -1
            for reader in reading:
                results = made[reader] if tallies[reader].place is Where.FUSED else ()
                if not results:
                    begins, ends = min(begins, 2 * reader + 1), max(ends, 2 * reader + 1)
                for result in results:
                    done = first[result] & ~1 if stored[result] else None
                    begins = min(begins, first[result] if done is None else done)
                    ends = max(ends, last[result] if done is None else done)
            if value not in values.at_once:
                first[value] = begins
            last[value] = ends
        if value in staying:
            last[value] = end
    values.first, values.last = first, last


def _calendar(tallies: Sequence[Tally], values: _Values, stored: Sequence[bool]) -> _Calendar:
    maker = values.maker
    born: dict[int, list[int]] = defaultdict(list)
    dying: dict[int, list[int]] = defaultdict(list)
    for value, index in enumerate(maker):
        if stored[value]:
            fused = tallies[index].place is Where.FUSED
            born[values.first[value] & ~1 if fused else 2 * index + 1].append(value)
            dying[values.last[value]].append(value)
    copied = {values.first[v] & ~1: v for v in values.reordered if tallies[maker[v]].place is not Where.FUSED}
    looping = {2 * index + 1 for index, tally in enumerate(tallies) if tally.inner_peaks}
    steps = []
    for step in sorted({*born, *dying, *copied, *looping}):
        here, leaving = born.get(step, ()), dying.get(step, ())
        steps.append(
            _Step(
                copied.get(step),
                step // 2 if step in looping else None,
                tuple([(value, tallies[maker[value]].place in _REUSING) for value in here]),
                tuple([value for value in leaving if value not in here]),
                tuple([value for value in leaving if value in here]),
            )
        )
    return _Calendar(steps)


class _Step(NamedTuple):
    """What happens just before an instruction, or during it."""

    copied: int | None
    """A value that is brought into another order."""
    loop: int | None
    """The instruction's index where it has a body."""
    born: tuple[tuple[int, bool], ...]
    """Values that come into memory, and whether they may take the place of others."""
    dying: tuple[int, ...]
    """Those that were there before and go."""
    passing: tuple[int, ...]
    """Those that come and go."""


class _Calendar:
    """When values come and go."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        # While nothing goes, what is there later is more.
        rising = [not step.dying and not step.passing and bool(after.born) for step, after in pairwise(steps)]
        self._steps = list(zip(steps, [*rising, False], strict=False))

    def peaks(self, tallies: Sequence[Tally], sizes: Sequence[Size]) -> list[Amount]:
        """Bytes in memory whenever they may be most.

        Args:
            tallies: the program.
            sizes: of its values.
        """
        live, found = [0.0, 0.0], []
        for (copied, loop, born, dying, passing), rising in self._steps:
            if copied is not None:
                amount, grows = sizes[copied]
                found.append((live[0] + (0.0 if grows else amount), live[1] + (amount if grows else 0.0)))
            if loop is not None:
                found += [(live[0] + stays, live[1] + grows) for stays, grows in tallies[loop].inner_peaks]
            free = [sizes[value] for value in dying]
            for value, reuses in born:
                size = sizes[value]
                if reuses and free and size in free:
                    free.remove(size)
                else:
                    live[size[1]] += size[0]
            if born and not rising:
                found.append((live[0], live[1]))
            for amount, grows in free:
                live[grows] -= amount
            for value in passing:
                amount, grows = sizes[value]
                live[grows] -= amount
        return found
