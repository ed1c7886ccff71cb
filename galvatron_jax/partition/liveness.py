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
        if isinstance(instruction, Convert):
            made, read = [(instruction.value, instruction.target)], [(instruction.value, instruction.source)]
        else:
            made, read = list(instruction.results), list(instruction.operands)
        if wanted.intersection(made):
            kept.append(instruction)
            wanted.update(read)
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
    values = _number(tallies)
    if not values.size:
        return [amount for tally in tallies for amount in tally.inner_peaks]
    values.at_once = {values.number[v] for v in at_once if v in values.number}
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
    reordered: set[int] = field(default_factory=set)
    """Those that are brought into the order of what they are read with."""
    at_once: set[int] = field(default_factory=set)
    """See `peaks`."""
    first: list[int] = field(default_factory=list)
    """When each is first read by what is really done then; fused work is done in its readers. In half steps: what is
    fused but in memory is made at an even one, just before the instruction that reads it first, which has the next."""
    last: list[int] = field(default_factory=list)


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
            largest = max([size[value] for value in read])
            values.reordered.update(
                number[version]
                for version in tally.read
                if version in number and version not in turned and size[number[version]] == largest
            )
            turned.update(version for version, _, _ in tally.made)
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
        if tallies[index].place is Where.FUSED and value not in staying and value not in values.reordered:
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


def _sweep(tallies: Sequence[Tally], values: _Values, stored: Sequence[bool]) -> list[Amount]:
    """Bytes in memory at each birth."""
    size, maker = values.size, values.maker
    born: dict[int, list[int]] = defaultdict(list)
    dying: dict[int, list[int]] = defaultdict(list)
    for value, index in enumerate(maker):
        if stored[value]:
            fused = tallies[index].place is Where.FUSED
            born[values.first[value] & ~1 if fused else 2 * index + 1].append(value)
            dying[values.last[value]].append(value)
    copied = {values.first[v] & ~1: size[v] for v in values.reordered if tallies[maker[v]].place is not Where.FUSED}
    live, found = [0.0, 0.0], []
    for step in range(2 * len(tallies)):
        if step in copied:
            amount, grows = copied[step]
            found.append((live[0] + (0.0 if grows else amount), live[1] + (amount if grows else 0.0)))
        if step % 2:
            for stays, grows in tallies[step // 2].inner_peaks:
                found.append((live[0] + stays, live[1] + grows))
        here, leaving = born.get(step, ()), dying.get(step, ())
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
