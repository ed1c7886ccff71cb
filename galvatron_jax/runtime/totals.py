"""Gradients of several micro-batches, added up in place while layers run backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax import lax

from galvatron_jax.runtime.packing import Flats, Packing

Gradients = dict[tuple[int, int], Any]
"""Local gradients by (run, port), stacked over the run's layers, sums over data axes still pending."""
Arrays = Any
"""What a program may change: some of the totals' arrays."""


@dataclass
class Totals:
    """Sums in arrays of the gradients' own shapes; none yet where there is no array."""

    gradients: Gradients

    def holds(self, run: int, port: int) -> bool:
        """Whether there is something to add to, so that a loop adds its layers' parts one by one."""
        return (run, port) in self.gradients

    def of_run(self, run: int) -> Arrays:
        """The arrays that change when this run's gradients are added."""
        return {place: x for place, x in self.gradients.items() if place[0] == run}

    def put(self, arrays: Arrays) -> None:
        """Takes arrays that `of_run` gave, changed."""
        self.gradients |= arrays

    def add(self, run: int, port: int, x: Any) -> None:
        """Adds the gradient of a port, of all the run's layers."""
        place = run, port
        self.gradients[place] = self.gradients[place] + x if place in self.gradients else x

    def with_row(self, arrays: Arrays, run: int, port: int, layer: Any, x: Any) -> Arrays:
        """What `of_run` gave, with the gradient of one layer added, whose number may be traced."""
        total = arrays[run, port]
        row = lax.dynamic_index_in_dim(total, layer, keepdims=False)
        return {**arrays, (run, port): lax.dynamic_update_index_in_dim(total, row + x, layer, 0)}


class PackedTotals(Totals):
    """Sums in the flat arrays of a group of devices."""

    def __init__(self, packing: Packing[tuple[int, int, int]], flats: Flats, *, case: int, stage: int) -> None:
        super().__init__({})
        self.packing, self.flats, self.case, self.stage = packing, flats, case, stage

    def holds(self, run: int, port: int) -> bool:
        """Whether the port has a gradient at all: the flat arrays begin as zeros."""
        return (self.stage, run, port) in self.packing.places[self.case]

    def of_run(self, run: int) -> Arrays:
        """The flat arrays."""
        return self.flats

    def put(self, arrays: Arrays) -> None:
        """Takes the flat arrays, changed."""
        self.flats = arrays

    def add(self, run: int, port: int, x: Any) -> None:
        """Adds the gradient of a port, of all the run's layers."""
        self.flats = self.packing.add(self.case, self.flats, (self.stage, run, port), x)

    def with_row(self, arrays: Arrays, run: int, port: int, layer: Any, x: Any) -> Arrays:
        """The flat arrays with the gradient of one layer added, whose number may be traced."""
        return self.packing.add(self.case, arrays, (self.stage, run, port), x, row=layer)
