"""What of a local program is needed, and how much of it is in memory at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from galvatron_jax.partition.instructions import Convert, Instruction, Version

if TYPE_CHECKING:
    from galvatron_jax.partition.counts import Amount, Tally


class Where(IntEnum):
    """Where the compiler puts what an instruction makes."""

    SEEN = 0
    """Nowhere: its operand, seen otherwise (a reshape; a transpose, which its reader takes as a layout)."""
    FUSED = 1
    """In what reads it, done anew in each reader; in memory where that would not do."""
    REDUCED = 2
    """In memory. Its operands may be fused into it."""
    WHOLE = 3
    """In memory, and so must its operands be: matrix products, collectives, loops."""
    IN_PLACE = 4
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
        if isinstance(instruction, Convert):
            made, read = [(instruction.value, instruction.target)], [(instruction.value, instruction.source)]
        else:
            made, read = list(instruction.results), list(instruction.operands)
        if wanted.intersection(made):
            kept.append(instruction)
            wanted.update(read)
    return tuple(kept[::-1])


def peaks(tallies: Sequence[Tally], handed_on: AbstractSet = frozenset()) -> list[Amount]:
    """Bytes in memory during a program, inputs excluded, whenever something is made.

    XLA fuses elementwise work into what reads it, and repeats it in several readers where it reads no more than it
    makes (a bfloat16 array, say, for its float32 copy). What matrix products and collectives read is in memory, and so
    is what a reader could only repeat by keeping more. Results die with their last reader: gradients of parameters at
    once, since they are written to where they add up.

    Args:
        tallies: the program's instructions.
        handed_on: versions that stay until its end.
    """
    values = _number(tallies)
    if not values.size:
        return [amount for tally in tallies for amount in tally.inner_peaks]
    stored = _stored(tallies, values, {values.number[v] for v in handed_on if v in values.number})
    return _sweep(tallies, values, stored)


@dataclass(slots=True)
class _Values:
    """A program's values by number; those that are seen as others have theirs."""

    number: dict = field(default_factory=dict)
    """By version."""
    size: list[tuple[float, bool]] = field(default_factory=list)
    maker: list[int] = field(default_factory=list)
    """Index of the instruction that makes each."""
    readers: list[list[int]] = field(default_factory=list)
    """Indices of those that read it."""
    reads: list[list[int]] = field(default_factory=list)
    """Per instruction."""
    made: list[list[int]] = field(default_factory=list)
    """Per instruction."""
    first: list[int] = field(default_factory=list)
    """When each is first read by what is really done then; fused work is done in its readers."""
    last: list[int] = field(default_factory=list)


def _number(tallies: Sequence[Tally]) -> _Values:
    values = _Values()
    number, size, maker, readers = values.number, values.size, values.maker, values.readers
    for index, tally in enumerate(tallies):
        read, made = [number[version] for version in tally.read if version in number], []
        values.reads.append(read)
        values.made.append(made)
        if tally.place is Where.SEEN:
            if read:
                number[tally.made[0][0]] = read[0]
            continue
        for value in read:
            readers[value].append(index)
        for version, bytes_, grows in tally.made:
            if version not in number:
                number[version] = len(size)
                made.append(len(size))
                size.append((bytes_, grows))
                maker.append(index)
                readers.append([])
    return values


def _stored(tallies: Sequence[Tally], values: _Values, staying: AbstractSet[int]) -> list[bool]:
    """Which values are in memory; and, in `values`, when they are read first and last."""
    size, readers = values.size, values.readers
    stored, roots = [True] * len(size), []
    for value, index in enumerate(values.maker):
        own = (value,)
        if tallies[index].place is Where.FUSED and value not in staying:
            reading, whole = readers[value], False
            for reader in reading:
                if tallies[reader].place >= Where.WHOLE:
                    whole = True
                    break
            if not whole:
                below = {root for operand in values.reads[index] for root in roots[operand]}
                if len(reading) < 2 or sum([size[root][0] for root in below]) <= size[value][0]:
                    stored[value], own = False, tuple(below)
        roots.append(own)
    _date(tallies, values, stored, staying)
    return stored


def _date(tallies: Sequence[Tally], values: _Values, stored: Sequence[bool], staying: AbstractSet[int]) -> None:
    first, last, made = list(values.maker), list(values.maker), values.made
    for value in range(len(first) - 1, -1, -1):
        reading = values.readers[value]
        if reading:
            begins, ends = len(tallies), -1
            for reader in reading:
                results = made[reader] if tallies[reader].place is Where.FUSED else ()
                if not results:
                    begins, ends = min(begins, reader), max(ends, reader)
                for result in results:
                    begins = min(begins, first[result])
                    ends = max(ends, first[result] if stored[result] else last[result])
            first[value], last[value] = begins, ends
        if value in staying:
            last[value] = len(tallies)
    values.first, values.last = first, last


def _sweep(tallies: Sequence[Tally], values: _Values, stored: Sequence[bool]) -> list[Amount]:
    """Bytes in memory at each birth."""
    size, maker = values.size, values.maker
    born: dict[int, list[int]] = defaultdict(list)
    dying: dict[int, list[int]] = defaultdict(list)
    for value, index in enumerate(maker):
        if stored[value]:
            born[values.first[value] if tallies[index].place is Where.FUSED else index].append(value)
            dying[values.last[value]].append(value)
    live, found = [0.0, 0.0], []
    for index, tally in enumerate(tallies):
        for stays, grows in tally.inner_peaks:
            found.append((live[0] + stays, live[1] + grows))
        here, leaving = born.get(index, ()), dying.get(index, ())
        free = [size[value] for value in leaving if value not in here]
        for value in here:
            amount, grows = size[value]
            if tallies[maker[value]].place in _REUSING and size[value] in free:
                free.remove(size[value])
            else:
                live[grows] += amount
        if here:
            found.append((live[0], live[1]))
        for amount, grows in free:
            live[grows] -= amount
        for value in leaving:
            if value in here:
                live[size[value][1]] -= size[value][0]
    return found
