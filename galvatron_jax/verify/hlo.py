"""Compiled programs read from their text: computations, their instructions in order of the schedule, and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
_NARROW_FLOAT = re.compile(r"f(\d+)e\d+m\d+")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Shape:
    """An array's element type, as HLO names it, and its dims."""

    element: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of the array; bits of small types are packed."""
        narrow = _NARROW_FLOAT.match(self.element)
        return self.elements * (int(narrow[1]) if narrow else _ITEM_BITS[self.element]) // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of the result; the arrays of a tuple one by one."""
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """All that follows the operands."""
    root: bool = False

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs, but for the condition of a loop."""
        branches = [
            name.strip().lstrip("%") for group in _BRANCHES.findall(self.attributes) for name in group.split(",")
        ]
        return (*_CALLED.findall(self.attributes), *branches)

    @property
    def trips(self) -> int | None:
        """How often a loop turns; None where the compiler does not know."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        """The text of an attribute in braces, such as `lhs_contracting_dims={1}`."""
        found = re.search(rf"\b{name}=\{{([^}}]*)\}}", self.attributes)
        return found[1] if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """An attribute that lists numbers; empty where there is none."""
        return tuple(int(n) for n in re.findall(r"\d+", self.attribute(name) or ""))


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def readers(self) -> Mapping[str, tuple[Instruction, ...]]:
        """By name, the instructions that read a result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return {name: tuple(readers) for name, readers in found.items()}

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in self.instructions if i.root)

    @cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """Its arguments in order."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.attributes.split(")")[0])))

    def operands_of(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results one reads."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: Mapping[str, Computation]
    entry: str
    scheduled: bool
    """Whether instructions stand in the order in which they run."""

    @property
    def main(self) -> Computation:
        """Where it begins."""
        return self.computations[self.entry]


def read_module(text: str) -> Module:
    """Reads a module as XLA prints it.

    Args:
        text: of `compiled.as_text()`.

    Raises:
        ValueError: when there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        begin = _COMPUTATION.match(line)
        if begin:
            name, lines = begin[2], []
            entry = name if begin[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, tuple(i for i in map(_instruction, lines) if i is not None))
            name = ""
        elif name:
            lines.append(line)
    if not entry:
        raise ValueError(f"no HLO module with an entry computation: {text[:200]!r}")
    return Module(computations, entry, "is_scheduled=true" in text[: text.find("\n")])


def _instruction(line: str) -> Instruction | None:
    begin = _INSTRUCTION.match(line)
    if begin is None:
        return None
    end = _closing(line, begin.end()) + 1 if line[begin.end()] == "(" else begin.end()
    opcode = _OPCODE.search(line, end - 1 if end > begin.end() else begin.end())
    if opcode is None:
        return None
    shapes = tuple(shape(element, dims) for element, dims in _SHAPE.findall(line[begin.end() : opcode.start()]))
    close = _closing(line, opcode.end() - 1)
    inner = line[opcode.end() : close]
    literal = opcode[1] in ("parameter", "constant")
    operands = () if literal else tuple(_NAME.findall(inner))
    attributes = line[opcode.end() :] if literal else line[close + 1 :]
    return Instruction(begin[2], opcode[1], shapes, operands, attributes, root=bool(begin[1]))


def shape(element: str, dims: str) -> Shape:
    """A shape from what stands before and within the brackets of `bf16[4,8]`."""
    return Shape(element, tuple(int(n) for n in dims.split(",") if n))


def _closing(line: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for at in range(start, len(line)):
        if line[at] == "(":
            depth += 1
        elif line[at] == ")":
            depth -= 1
            if depth == 0:
                return at
    return len(line)
