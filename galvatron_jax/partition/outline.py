"""Programs without sizes: what is found once for all that are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from galvatron_jax.partition.counts import NONE, Amount, Tally, largest
from galvatron_jax.partition.instructions import Version
from galvatron_jax.partition.liveness import Lifetimes, Named
from galvatron_jax.partition.recent import Recent

MAX_OUTLINES = 1024
"""Programs of a layer kind that are remembered."""
Forms = tuple[int, ...]
"""A program without sizes: the numbers of its runs of instructions."""


class Traffic(NamedTuple):
    """What moves through memory, and what lives in it, during a pass."""

    moved: Amount
    peaks: tuple[Amount, ...]
    read: AbstractSet[Version]


class Moving(NamedTuple):
    """What a program without sizes moves."""

    results: tuple[tuple[int, int], ...]
    """What goes through memory: the instruction, and the place among what it makes."""
    read: frozenset[Version]
    """Versions read."""


@dataclass(frozen=True, eq=False)
class Outlines:
    """What was found of a layer kind's programs.

    They are put together from runs of instructions that are met again and again, so they are told apart by the numbers
    of those.
    """

    _numbers: dict[tuple, int] = field(default_factory=lambda: {(): 0})
    _moving: Recent[Moving] = field(default_factory=lambda: Recent(MAX_OUTLINES))
    _lifetimes: Recent[Lifetimes] = field(default_factory=lambda: Recent(MAX_OUTLINES))

    def number(self, tallies: Sequence[Tally]) -> int:
        """The number of a run of instructions: runs that differ in sizes alone have the same."""
        numbers = self._numbers
        key = tuple(
            [
                (read, tuple([version for version, _, _ in made]), place, fused, bool(inner))
                for read, made, fused, _, inner, _, place in tallies
            ]
        )
        return numbers.setdefault(key, len(numbers))

    def traffic(
        self,
        tallies: Sequence[Tally],
        forms: Forms,
        handed_on: AbstractSet[Version] = frozenset(),
        given: Sequence[Tally] = (),
        at_once: AbstractSet[Version] = frozenset(),
    ) -> Traffic:
        """Bytes that unfused operations read and write, the peaks of live results, and the versions read.

        Elementwise operations fuse into their neighbours; what they make moves only when several operations read it.

        Args:
            tallies: of a pass.
            forms: of the same.
            handed_on: versions that stay until its end.
            given: what is there before it and lives in memory beside what it makes.
            at_once: versions of fused work that is done with the product it reads.
        """
        results, read = self.moving(tallies, forms)
        moved = [0.0, 0.0]
        for index, place in results:
            _, size, grows = tallies[index].made[place]
            moved[grows] += size
        for stays, grows in [tally.moved for tally in tallies if tally.moved is not NONE]:
            moved[0] += stays
            moved[1] += grows
        program = Named([*given, *tallies], handed_on, at_once)
        known = self.lifetimes((self.number(given), *forms), handed_on, at_once)
        peaks = known.peaks(program.tallies, lambda: program)
        return Traffic((moved[0], moved[1]), largest([(0.0, 0.0), *peaks]), read)

    def moving(self, tallies: Sequence[Tally], forms: Forms) -> Moving:
        """What goes through memory in programs of some form."""
        return self._moving.get(forms, lambda: _moving(tallies))

    def lifetimes(self, forms: Forms, *about: Hashable) -> Lifetimes:
        """When values come and go in programs of some form, alike in what else that depends on."""
        return self._lifetimes.get((forms, *about), Lifetimes)


def _moving(tallies: Sequence[Tally]) -> Moving:
    left = Counter(chain.from_iterable([tally.read for tally in tallies]))
    read, results = frozenset(left), []
    for index, tally in enumerate(tallies):
        for place, (version, _, _) in enumerate(tally.made):
            if not tally.fused or left[version] > 1:
                results.append((index, place))
        for version in tally.read:
            left[version] -= 1
    return Moving(tuple(results), read)
