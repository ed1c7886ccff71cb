"""Forward and backward in a row, as a layer that ends in the loss runs them: what both make alike is there once."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from galvatron_jax.partition.counts import Amount, Tally, largest
from galvatron_jax.partition.instructions import Version
from galvatron_jax.partition.liveness import Lifetimes, Named
from galvatron_jax.partition.planner import Pass


class InARow:
    """Two passes, the second right behind the first."""

    def __init__(self, forward: Pass, backward: Pass, handed_on: AbstractSet[Version]) -> None:
        """Both passes are planned.

        Args:
            forward: the first.
            backward: the second.
            handed_on: versions in backward that stay until its end.
        """
        self.forward, self.backward, self.handed_on = forward, backward, frozenset(handed_on)
        self.tallies = forward.tallies + backward.tallies

    @property
    def lifetimes(self) -> Lifetimes:
        """When values come and go."""
        forms = (*self.forward.forms, -1, *self.backward.forms)
        return self.forward.setting.outlines.lifetimes(forms, self.handed_on, self._same())

    def peaks(self) -> tuple[Amount, ...]:
        """Bytes of live temporaries when they are most, at one micro-batch or another."""
        return largest(self.lifetimes.peaks(self.tallies, lambda: self.named(self.tallies)))

    def named(self, tallies: Sequence[Tally]) -> Named:
        """The program, of tallies that differ from its own in sizes alone; versions go by layout, not by number."""
        first, backward = len(self.forward.tallies), self.backward
        staying = frozenset((value, backward.held[value].layouts[number]) for value, number in self.handed_on)
        return Named([*_by_layout(self.forward, tallies[:first]), *_by_layout(backward, tallies[first:])], staying)

    def _same(self) -> tuple[tuple[int, int, int], ...]:
        """Values with the numbers of versions of theirs that have one layout in forward and in backward."""
        return tuple(
            [
                (value, there.layouts.index(layout), number)
                for value, held in self.backward.held.items()
                if (there := self.forward.held.get(value)) is not None
                for number, layout in enumerate(held.layouts)
                if layout in there.layouts
            ]
        )


def _by_layout(run: Pass, tallies: Sequence[Tally]) -> list[Tally]:
    """Tallies of a pass with its versions by layout, not by number."""

    def known(version: Version) -> tuple:
        return version[0], run.held[version[0]].layouts[version[1]]

    return [
        tally._replace(
            read=tuple([known(version) for version in tally.read]),
            made=tuple([(known(version), size, grows) for version, size, grows in tally.made]),
        )
        for tally in tallies
    ]
