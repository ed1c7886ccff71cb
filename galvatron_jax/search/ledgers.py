"""Bytes of the stages placed so far, kept beside their seconds while layers are cut into stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from galvatron_jax.search.fronts import StageFront
from galvatron_jax.search.pipeline import Pipeline


class Ledger(Protocol):
    """What must be known of placed stages' bytes. All columns are to be small."""

    @property
    def width(self) -> int:
        """Columns."""

    def add(self, columns: np.ndarray, stage: int, front: StageFront) -> None:
        """Adds every choice of the next stage, in place. `columns` is float64[beginnings, choices, width]."""

    def fits(self, columns: np.ndarray) -> np.ndarray:
        """Beginnings that are within the budget. bool[beginnings], of float64[beginnings, width]."""


@dataclass(frozen=True)
class StagesAlone:
    """Every group has one stage, and no choice of a front is over the budget."""

    width: int = 0

    def add(self, columns: np.ndarray, stage: int, front: StageFront) -> None:
        """Nothing."""

    def fits(self, columns: np.ndarray) -> np.ndarray:
        """All do."""
        return np.ones(len(columns), bool)


@dataclass(frozen=True)
class Groups:
    """Stages that share a group: what they hold adds up, and one of them at a time works."""

    degree: int
    budget_bytes: float

    @property
    def width(self) -> int:
        """Held and passing bytes of every group."""
        return 2 * self.degree

    def add(self, columns: np.ndarray, stage: int, front: StageFront) -> None:
        """Adds to the stage's group."""
        resident, passing = stage % self.degree, self.degree + stage % self.degree
        columns[..., resident] += front.resident_bytes
        columns[..., passing] = np.maximum(columns[..., passing], front.passing_bytes)

    def fits(self, columns: np.ndarray) -> np.ndarray:
        """Where every group does."""
        return np.asarray((columns[:, : self.degree] + columns[:, self.degree :] <= self.budget_bytes).all(1))


@dataclass(frozen=True, eq=False)
class Program:
    """One program for all groups: of every part, it has as much as the group that needs most of it.

    As `cost.pipeline` predicts it: flat arrays, slots of micro-batches in flight, and what passes through one stage at
    a time.
    """

    budget_bytes: float
    """Without what is the same on every device."""
    first_group_bytes: np.ndarray
    """In its flat arrays, whatever its layers: parameters that nothing reads. float64[arrays]"""


@dataclass(frozen=True, eq=False)
class OneProgram:
    """The largest of every part so far; where stages share a group, the parts of every group."""

    program: Program
    degree: int
    num_chunks: int

    @classmethod
    def of(cls, program: Program, problem: Pipeline) -> OneProgram:
        """The ledger of a problem."""
        return cls(program, problem.degree, problem.num_chunks)

    @property
    def width(self) -> int:
        """Flat arrays, slots, residuals outside of them, what passes; of every group if they have several stages."""
        return (len(self.program.first_group_bytes) + 3) * (self.degree if self.num_chunks > 1 else 1)

    def add(self, columns: np.ndarray, stage: int, front: StageFront) -> None:
        """Adds to the stage's group; or, where that is all that the group has, to what the others have at most."""
        assert front.program is not None
        own = front.program.copy()
        if stage == 0:
            own[:, :-3] += self.program.first_group_bytes
        if self.num_chunks == 1:
            # Outside of slots and passing are held together.
            own[:, -1] += own[:, -2]
            own[:, -2] = 0.0
            np.maximum(columns, own, out=columns)
            return
        size = own.shape[1]
        group = columns[..., stage % self.degree * size : (stage % self.degree + 1) * size]
        group[..., :-1] += own[:, :-1]
        group[..., -1] = np.maximum(group[..., -1], own[:, -1])

    def fits(self, columns: np.ndarray) -> np.ndarray:
        """Where the program does."""
        parts = columns.reshape(len(columns), -1, len(self.program.first_group_bytes) + 3)
        held, passing = parts[..., :-2].max(1).sum(1), parts[..., -2:].sum(2).max(1)
        return np.asarray(held + passing <= self.program.budget_bytes)
