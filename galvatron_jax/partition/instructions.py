"""Instructions of a planned local program: what the runtime executes, and what the cost model counts."""

from __future__ import annotations

from dataclasses import dataclass

from galvatron_jax.partition.layout import Layout, Step

Version = tuple[int, int]
"""A value of the program and one of its layouts, numbered in order of appearance."""


@dataclass(frozen=True, slots=True)
class Convert:
    """Brings a value into another layout."""

    value: int
    source: int
    """Version read."""
    target: int
    """Version made."""
    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    """Local shape of the result, dim by dim."""


@dataclass(frozen=True, slots=True)
class IndexShift:
    """Indices into a sharded dim are made relative to the local shard."""

    names: tuple[str, ...]
    """Mesh axes of the dim, major to minor."""
    dim: int
    """Dim of the indexed operand."""
    size: int
    """Whole size of the dim."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Applies an operation of the program to local arrays."""

    operation: int
    operands: tuple[Version, ...]
    results: tuple[Version, ...]
    materialise: tuple[tuple[int, ...] | None, ...]
    """Per operand, the local shape to broadcast it to first; None: as it is."""
    shapes: tuple[tuple[int, ...], ...]
    """Local shape per result."""
    shifts: tuple[IndexShift, ...] = ()
    combine: tuple[tuple[str, ...], str] | None = None
    """Mesh axes over which the result is combined at once, and how (`max`, `min`)."""
    zeroed: tuple[str, ...] = ()
    """Mesh axes on which a scatter's operand is zero, so that its results are summands."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Runs a scan's body on local arrays, once a trip."""

    operation: int
    operands: tuple[Version, ...]
    results: tuple[Version, ...]
    materialise: tuple[tuple[int, ...] | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Local shape per result."""
    body: tuple[Instruction, ...]
    """The body's program; its inputs are version 0 of the body's input values."""
    outputs: tuple[Version, ...]
    """What the body hands out, carried values first."""
    output_shapes: tuple[tuple[int, ...], ...]
    trips: int


Instruction = Convert | Apply | Loop


def operands_of(instruction: Instruction) -> tuple[Version, ...]:
    """Versions that an instruction reads."""
    if isinstance(instruction, Convert):
        return ((instruction.value, instruction.source),)
    return instruction.operands


def results_of(instruction: Instruction) -> tuple[Version, ...]:
    """Versions that an instruction makes."""
    if isinstance(instruction, Convert):
        return ((instruction.value, instruction.target),)
    return instruction.results


@dataclass(frozen=True, slots=True)
class Decision:
    """Why an operation is sharded as it is; kept for people who look."""

    operation: int
    primitive: str
    axis: int
    factor: int | None
    cost_bytes: float


@dataclass(frozen=True, slots=True)
class Residual:
    """A value that crosses from the forward to the backward program, in the versions that backward reads."""

    value: int
    version: int
    """Its number in the forward program."""
    backward_version: int
    """Its number in the backward program."""
    layout: Layout
    lazy: frozenset[int]
    shape: tuple[int, ...]
    bytes: int
