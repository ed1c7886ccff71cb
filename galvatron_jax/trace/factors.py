"""Factor analysis: every dim of every value as a product of factors, by union-find through the sharding rules.

Equal factors are merged along each relation of a rule, and *refined* (split) where a reshape regroups them: a fused
`qkv` dim of `3 · heads · head_dim` becomes three factors once a reshape takes it apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from galvatron_jax.spec.program import Factor, FactorKind, Operation, Place, Program, RuleFactor, Value
from galvatron_jax.trace.flat import FlatOp, FlatProgram
from galvatron_jax.trace.rules import Application, Ref, Relation, Rule, find_rule


class Atom:
    """A node of the union-find: merged into `parent`, or split into `parts`, or a factor by itself."""

    __slots__ = ("parent", "parts", "size")

    def __init__(self, size: int) -> None:
        self.size = int(size)
        self.parent: Atom | None = None
        self.parts: list[Atom] | None = None


Dim = list[Atom]


def expand(dim: Sequence[Atom]) -> Dim:
    """The dim's present factors, from major to minor; factors of size 1 are left out."""
    found: Dim = []
    for atom in dim:
        while atom.parent is not None:
            atom = atom.parent
        if atom.parts is not None:
            found += expand(atom.parts)
        elif atom.size != 1:
            found.append(atom)
    return found


def _split(atom: Atom, major: int) -> list[Atom]:
    atom.parts = [Atom(major), Atom(atom.size // major)]
    return atom.parts


def merge(left: Sequence[Atom], right: Sequence[Atom]) -> bool:
    """Makes two dims of one size the same product of factors; False where their factors do not nest."""
    a, b = expand(left), expand(right)
    while a and b:
        x, y = a[0], b[0]
        if x is y:
            a, b = a[1:], b[1:]
        elif x.size == y.size:
            y.parent = x
            a, b = expand(a[1:]), expand(b[1:])
        elif x.size < y.size and y.size % x.size == 0:
            _split(y, x.size)
            a, b = expand(a), expand(b)
        elif y.size < x.size and x.size % y.size == 0:
            _split(x, y.size)
            a, b = expand(a), expand(b)
        else:
            return False
    return not a and not b


def minor_piece(dim: Sequence[Atom], size: int) -> Dim | None:
    """The minor factors of a dim whose product is `size`, splitting one if need be."""
    atoms = expand(dim)
    taken: Dim = []
    product = 1
    while atoms and product < size:
        atom = atoms.pop()
        if product * atom.size > size:
            want = size // product
            if size % product or atom.size % want:
                return None
            return expand([_split(atom, atom.size // want)[1], *taken])
        product *= atom.size
        taken.insert(0, atom)
    return taken if product == size else None


def major_piece(dim: Sequence[Atom], size: int) -> Dim | None:
    """The major factors of a dim whose product is `size`, splitting one if need be."""
    atoms = expand(dim)
    taken: Dim = []
    product = 1
    while atoms and product < size:
        atom = atoms.pop(0)
        if product * atom.size > size:
            want = size // product
            if size % product or atom.size % want:
                return None
            return expand([*taken, _split(atom, want)[0]])
        product *= atom.size
        taken.append(atom)
    return taken if product == size else None


class FactorAnalysis:
    """Dims of the values of a flat program, and of the bodies of its loops."""

    def __init__(self, program: FlatProgram) -> None:
        self.program = program
        self.dims: list[list[Dim]] = [[[Atom(n)] for n in aval.shape] for aval in program.avals]
        self.bodies: dict[int, FactorAnalysis] = {}
        self.rules: list[Rule] = []
        self._size_table: list[int] | None = None
        for index, op in enumerate(program.operations):
            if op.loop is not None:
                self.bodies[index] = self._loop(op, op.loop)
                self.rules.append(Rule())
                continue
            rule = find_rule(application_of(op, program))
            self.rules.append(rule)
            for relation in rule.relations:
                self._merge_relation(op, relation)

    def tie(self, a: int, b: int) -> None:
        """States that two values of one shape have the same factors (a parameter and its gradient)."""
        for x, y in zip(self.dims[a], self.dims[b], strict=True):
            merge(x, y)

    def _merge_relation(self, op: FlatOp, relation: Relation) -> None:
        first: Dim | None = None
        for ref, value in self._refs(op, relation):
            piece = self._piece(ref, value)
            if piece is None:
                continue
            if first is None:
                first = piece
            elif math.prod(a.size for a in expand(first)) == math.prod(a.size for a in expand(piece)):
                merge(first, piece)

    def _refs(self, op: FlatOp, relation: Relation) -> list[tuple[Ref, int]]:
        pairs = list(zip(relation.operands, op.operands, strict=True))
        pairs += list(zip(relation.results, op.results, strict=True))
        return [(ref, value) for ref, value in pairs if ref is not None]

    def _piece(self, ref: Ref, value: int) -> Dim | None:
        whole = [atom for dim in ref.dims for atom in self.dims[value][dim]]
        if ref.piece is None:
            return expand(whole)
        side, size = ref.piece
        return minor_piece(whole, size) if side == "suffix" else major_piece(whole, size)

    def _loop(self, op: FlatOp, loop: tuple[int, int, int]) -> FactorAnalysis:
        """A scan: constants and carry as outside, scanned operands and stacked results without their leading dim."""
        consts, carry, length = loop
        body = FactorAnalysis(op.bodies[0])
        lead = [Atom(length)]
        for position, (outer, inner) in enumerate(zip(op.operands, op.bodies[0].inputs, strict=True)):
            dims = self.dims[outer]
            if position >= consts + carry:
                merge(lead, dims[0])
                dims = dims[1:]
            for x, y in zip(dims, body.dims[inner], strict=True):
                merge(x, y)
        for position, (outer, inner) in enumerate(zip(op.results, op.bodies[0].outputs, strict=True)):
            dims = self.dims[outer]
            if position >= carry:
                merge(lead, dims[0])
                dims = dims[1:]
            for x, y in zip(dims, body.dims[inner], strict=True):
                merge(x, y)
        for position in range(carry):
            body.tie(op.bodies[0].inputs[consts + position], op.bodies[0].outputs[position])
        return body

    # -------------------------------------------------------------------------------------------- to a Program

    def factor_numbers(self) -> dict[Atom, int]:
        """Numbers of all factors, loops' bodies included."""
        numbers: dict[Atom, int] = {}
        for dims in self.dims:
            for dim in dims:
                for atom in expand(dim):
                    numbers.setdefault(atom, len(numbers))
        for body in self.bodies.values():
            for atom in body.factor_numbers():
                numbers.setdefault(atom, len(numbers))
        return numbers

    def to_program(self, numbers: Mapping[Atom, int] | None = None) -> Program:
        """The program as data, with roles still to be given to its factors."""
        if numbers is None:
            numbers = self.factor_numbers()
        factors = tuple(Factor(size=atom.size) for atom in numbers)
        program = self.program
        values = tuple(
            Value.model_construct(
                dims=tuple(tuple(numbers[a] for a in expand(dim)) for dim in dims),
                dtype=str(aval.dtype),
                zero=_is_zero(program.constants.get(index)),
            )
            for index, (dims, aval) in enumerate(zip(self.dims, program.avals, strict=True))
        )
        operations = tuple(
            self._operation(index, op, rule, numbers)
            for index, (op, rule) in enumerate(zip(program.operations, self.rules, strict=True))
        )
        return Program.model_construct(
            factors=factors,
            values=values,
            inputs=program.inputs,
            constants=tuple(program.constants),
            outputs=program.outputs,
            operations=operations,
        )

    def _operation(self, index: int, op: FlatOp, rule: Rule, numbers: Mapping[Atom, int]) -> Operation:
        factors = tuple(f for relation in rule.relations for f in self._rule_factors(op, relation, numbers))
        points = math.prod(self.program.avals[op.results[0]].shape) if op.results else 0
        points *= math.prod(
            math.prod(self.program.avals[op.operands[0]].shape[d] for d in relation.operands[0].dims)
            for relation in rule.relations
            if relation.kind is FactorKind.REDUCE and relation.operands[0] is not None
        )
        sharded = math.prod(self._sizes(numbers)[f.factor] for f in factors)
        return Operation.model_construct(
            primitive=op.primitive.name,
            operands=op.operands,
            results=op.results,
            factors=factors,
            linearity=rule.linearity,
            combine=rule.combine,
            elementwise=rule.elementwise,
            flops_per_point=rule.flops_per_point * points / max(sharded, 1),
            known=rule.known,
            barrier=op.recomputed,
            bodies=(self.bodies[index].to_program(numbers),) if op.loop is not None else (),
            loop=op.loop,
        )

    def _sizes(self, numbers: Mapping[Atom, int]) -> list[int]:
        if self._size_table is None:
            self._size_table = [atom.size for atom in numbers]
        return self._size_table

    def _rule_factors(self, op: FlatOp, relation: Relation, numbers: Mapping[Atom, int]) -> list[RuleFactor]:
        """The relation factor by factor, where all its dims are made of the same ones."""
        placed: list[list[tuple[Atom, Place]] | None] = []
        refs = list(zip(relation.operands, op.operands, strict=True))
        refs += list(zip(relation.results, op.results, strict=True))
        for ref, value in refs:
            placed.append(None if ref is None else self._places(ref, value))
        lists = [p for p in placed if p is not None]
        if not lists or any([a for a, _ in p] != [a for a, _ in lists[0]] for p in lists):
            return []
        width = len(op.operands)
        found = []
        for position, (atom, _) in enumerate(lists[0]):
            places = tuple(None if p is None else p[position][1] for p in placed)
            found.append(
                RuleFactor.model_construct(
                    kind=relation.kind, factor=numbers[atom], operands=places[:width], results=places[width:]
                )
            )
        return found

    def _places(self, ref: Ref, value: int) -> list[tuple[Atom, Place]]:
        whole = [
            (atom, Place(int(dim), index))  # Dimension numbers of a convolution's gradient are NumPy's.
            for dim in ref.dims
            for index, atom in enumerate(expand(self.dims[value][dim]))
        ]
        if ref.piece is None:
            return whole
        side, size = ref.piece
        order = whole[::-1] if side == "suffix" else whole
        taken, product = [], 1
        for atom, place in order:
            if product == size:
                break
            taken.append((atom, place))
            product *= atom.size
        if product != size:
            return []
        return taken[::-1] if side == "suffix" else taken


def application_of(op: FlatOp, program: FlatProgram) -> Application:
    """The application as a rule sees it."""
    return Application(
        op.primitive.name,
        op.params,
        tuple(program.avals[v].shape for v in op.operands),
        tuple(program.avals[v].shape for v in op.results),
        tuple(v in program.constants and not program.avals[v].shape for v in op.operands),
    )


def _is_zero(constant: Any) -> bool:
    """Whether a constant is a scalar zero (random keys are not)."""
    # NumPy does not know bfloat16 as a number.
    if constant is None or np.ndim(constant) or not jax.dtypes.issubdtype(getattr(constant, "dtype", float), np.number):
        return False
    return bool(constant == 0)
