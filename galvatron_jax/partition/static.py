"""A layer program prepared for planning: everything that does not depend on the strategy, in fast plain data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np

from galvatron_jax.partition.liveness import Where
from galvatron_jax.partition.outline import Outlines
from galvatron_jax.partition.recent import Recent
from galvatron_jax.spec.model import LayerKind, PortRole
from galvatron_jax.spec.program import FactorKind, FactorRole, Linearity, Operation, Place, Program, sum_dtype
from galvatron_jax.spec.strategy import Remat

MAX_CONTEXTS = 256
"""Pairs of logical axes and micro-batch that are remembered for a kind."""
MAX_STRUCTURES = 64
"""Structures of logical axes of which models are remembered for a kind."""
LOCAL_ITEMSIZE = {"bool": 1, "bfloat16": 2, "float0": 0}


def itemsize(dtype: str) -> int:
    """Bytes of one element; random keys count as 8."""
    if dtype in LOCAL_ITEMSIZE:
        return LOCAL_ITEMSIZE[dtype]
    if dtype.startswith("key<"):
        return 8
    if dtype.startswith("float8"):
        return 1
    return np.dtype(dtype).itemsize


@dataclass(frozen=True, slots=True)
class StaticFactor:
    """A rule factor with flat positions (-1: not there)."""

    kind: FactorKind
    factor: int
    operands: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StaticOp:
    """An operation with its rule in flat positions."""

    index: int
    primitive: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    factors: tuple[StaticFactor, ...]
    linearity: Linearity
    combine: str
    elementwise: bool
    flops: float
    """Per point of the product of its factors."""
    known: bool
    recomputed: bool
    free: bool
    """Whether it moves no data (a reshape, a broadcast)."""
    loop: tuple[int, int, int] | None = None
    """For a scan: constants, carried values, trip count."""
    body: StaticProgram | None = None
    asks: frozenset[int] = frozenset()
    """Factors of which it matters whether they may be sharded."""
    scatter_rows: tuple[StaticFactor, ...] = ()
    """For a scatter-add, the factors of the rows into which it adds."""
    scatter_alike: tuple[StaticFactor, ...] = ()
    """For a scatter-add, the factors of the dims that it treats alike."""
    place: Where = Where.WHOLE
    """Where its result lies."""
    looks_up: bool = False
    """Whether it gathers from what nothing else reads and no example changes."""


_SEEN = frozenset({"reshape", "squeeze", "expand_dims", "transpose", "copy", "stop_gradient"})
_FUSED = frozenset({"slice", "pad", "rev", "select_n", "concatenate", "split", "convert_element_type"})
_READING = frozenset({"gather", "dynamic_slice", "argmax", "argmin"})
"""What reads through fused work, as reductions do."""
_FREE = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "iota", "copy", "stop_gradient"})


@dataclass(frozen=True)
class StaticProgram:
    """A `Program` in flat positions."""

    program: Program
    positions: tuple[tuple[int, ...], ...]
    """Per value, the factor at each flat position."""
    dim_of: tuple[tuple[int, ...], ...]
    """Per value, the dim of each flat position."""
    rank: tuple[int, ...]
    """Per value, its number of dims."""
    itemsize: tuple[int, ...]
    ascending: tuple[tuple[bool, ...], ...]
    """Per value and position, whether axes stand in mesh order there (batch factors)."""
    has_batch: tuple[bool, ...]
    operations: tuple[StaticOp, ...]
    roles: tuple[FactorRole, ...]

    @cached_property
    def row_factors(self) -> frozenset[int]:
        """Factors of the rows that some scatter-add adds into."""
        return frozenset(f.factor for op in self.operations for f in op.scatter_rows)

    @cached_property
    def stored_rows(self) -> frozenset[int]:
        """Factors of rows that lookups read, or gradients are added to, where they may be stored."""
        looked_up = (
            f.factor for op in self.operations if op.looks_up for f in op.factors if f.kind is FactorKind.INDEX
        )
        return self.row_factors.union(looked_up)

    def sizes(self, batch_factor: int | None, microbatch: int, traced_at: int) -> tuple[int, ...]:
        """Sizes of all factors at another micro-batch."""
        sizes = [f.size for f in self.program.factors]
        for index in self.growing(batch_factor, traced_at):
            sizes[index] = max(1, sizes[index] * microbatch // traced_at)
        return tuple(sizes)

    def growing(self, batch_factor: int | None, traced_at: int) -> frozenset[int]:
        """Factors that grow with the micro-batch.

        A batch dim that the layer takes apart grows in one of its factors; whole ones are the batch each.
        """
        key = batch_factor, traced_at
        if key not in self._growing:
            self._growing[key] = frozenset(
                index
                for index, factor in enumerate(self.program.factors)
                if factor.role is FactorRole.BATCH and (factor.size == traced_at or index == batch_factor)
            )
        return self._growing[key]

    @cached_property
    def _growing(self) -> dict[tuple[int | None, int], frozenset[int]]:
        return {}


def prepare(program: Program) -> StaticProgram:
    """Flattens a program's dims and rules."""
    offsets, positions, dim_of = [], [], []
    for value in program.values:
        flat, dims, starts = [], [], []
        for dim, factors in enumerate(value.dims):
            starts.append(len(flat))
            flat += factors
            dims += [dim] * len(factors)
        offsets.append(starts)
        positions.append(tuple(flat))
        dim_of.append(tuple(dims))
    roles = tuple(f.role for f in program.factors)

    def flat_place(value: int, place: Place | Sequence[int] | None) -> int:
        return -1 if place is None else offsets[value][place[0]] + place[1]

    has_batch = tuple(any(roles[f] is FactorRole.BATCH for f in flat) for flat in positions)
    readers = _readers(program)
    operations = []
    for index, op in enumerate(program.operations):
        factors = tuple(
            StaticFactor(
                f.kind,
                f.factor,
                tuple(flat_place(v, p) for v, p in zip(op.operands, f.operands, strict=True)),
                tuple(flat_place(v, p) for v, p in zip(op.results, f.results, strict=True)),
            )
            for f in op.factors
        )
        operations.append(
            StaticOp(
                index, op.primitive, tuple(op.operands), tuple(op.results), factors, op.linearity, op.combine,
                op.elementwise, op.flops_per_point, op.known, op.barrier, op.primitive in _FREE, op.loop,
                prepare(op.bodies[0]) if op.loop is not None else None,
                _asks(op, factors, positions, len(roles)),
                _scattered(op.primitive, factors, FactorKind.SCATTER_INDEX),
                _scattered(op.primitive, factors, FactorKind.PARALLEL),
                _place(op, factors, positions),
                op.primitive == "gather" and readers[op.operands[0]] == 1 and not has_batch[op.operands[0]],
            )
        )  # fmt: skip
    return StaticProgram(
        program=program,
        positions=tuple(positions),
        dim_of=tuple(dim_of),
        rank=tuple(len(v.dims) for v in program.values),
        itemsize=tuple(itemsize(v.dtype) for v in program.values),
        ascending=tuple(tuple(roles[f] is FactorRole.BATCH for f in flat) for flat in positions),
        has_batch=has_batch,
        operations=tuple(operations),
        roles=roles,
    )


def _readers(program: Program) -> Counter[int]:
    """How often each value is read or handed out."""
    return Counter(chain(program.outputs, *(op.operands for op in program.operations)))


def _asks(
    op: Operation, factors: Sequence[StaticFactor], positions: Sequence[tuple[int, ...]], every: int
) -> frozenset[int]:
    if op.loop is not None:
        return frozenset(range(every))
    return frozenset(f.factor for f in factors).union(*(positions[value] for value in op.results[:1]))


def _place(op: Operation, factors: Sequence[StaticFactor], positions: Sequence[tuple[int, ...]]) -> Where:
    if op.primitive in _SEEN:
        return Where.TURNED if op.primitive == "transpose" and _turns(op, factors, positions) else Where.SEEN
    if op.elementwise or op.primitive in _FREE or op.primitive in _FUSED:
        return Where.FUSED
    if op.primitive.startswith("scatter") or op.primitive == "dynamic_update_slice":
        return Where.IN_PLACE
    return Where.REDUCED if op.primitive.startswith("reduce_") or op.primitive in _READING else Where.WHOLE


def _scattered(primitive: str, factors: Sequence[StaticFactor], kind: FactorKind) -> tuple[StaticFactor, ...]:
    """A scatter-add's factors of one kind that its result has."""
    if primitive not in ("scatter-add", "scatter_add"):
        return ()
    return tuple(f for f in factors if f.kind is kind and f.results[0] >= 0)


@dataclass(frozen=True, eq=False)
class Memo:
    """What was planned for a kind; it goes when the kind goes."""

    tensor_plans: Recent = field(default_factory=lambda: Recent(64))
    """Hidden factors by tensor axes."""
    splits: Recent = field(default_factory=lambda: Recent(len(Remat)))
    """Forward and backward programs by remat policy."""
    plainest: dict[Remat, Remat] = field(default_factory=dict)
    """By remat policy, the first that comes to the same."""
    affine: dict[frozenset[int], bool] = field(default_factory=dict)
    """Whether all grows in proportion to the micro-batch or not at all, by growing factors."""
    contexts: Recent = field(default_factory=lambda: Recent(MAX_CONTEXTS))
    """What strategies with the same logical axes share, by axes and micro-batch."""
    models: Recent = field(default_factory=lambda: Recent(MAX_STRUCTURES))
    """Contexts that others follow, by structure."""
    outlines: Outlines = field(default_factory=Outlines)
    """What was found of its programs."""


@dataclass(frozen=True, eq=False)
class StaticKind:
    """A layer kind prepared for planning."""

    kind: LayerKind
    program: StaticProgram
    parameters: tuple[int, ...]
    """Input ports that are parameters."""
    parameter_values: frozenset[int]
    """Their values."""
    gradient_operations: frozenset[int]
    """Operations that depend on a cotangent."""
    fixed: frozenset[int]
    """Values that depend on parameters and constants alone: never worth keeping."""
    indices: frozenset[int]
    """Integers that work which fuses with what reads them makes of the batch's: no more worth keeping."""
    producer: dict[int, int]
    """Operation that makes each value."""
    table_gradients: dict[int, int]
    """Per operation, the port of the parameter whose gradient it makes: by adding up rows, or of such a sum another
    type."""
    memo: Memo = field(default_factory=Memo, repr=False)
    """What was planned before."""

    @cached_property
    def bias_tables(self) -> frozenset[int]:
        """Parameters in which rows of no embedding are looked up (relative positions, say), trained ones.

        What is looked up in embeddings may be another layer's weights, which must lay it out alike.
        """
        roles, positions = self.program.roles, self.program.positions
        looked_up = {self.kind.inputs[port].value for port in self.table_gradients.values()}
        return frozenset(v for v in looked_up if all(roles[f] is not FactorRole.EMBEDDING for f in positions[v]))

    def sum_dtypes(self, dtype: str | None) -> dict[int, str]:
        """Gradients of parameters that are summed in another type than their own, with that."""
        if dtype is None:
            return {}
        gradients = [port.gradient for port in self.kind.inputs if port.role is PortRole.PARAMETER]
        own = {value: self.program.program.values[value].dtype for value in gradients if value is not None}
        found = {value: sum_dtype(its, dtype) for value, its in own.items()}
        return {value: narrower for value, narrower in found.items() if narrower != own[value]}

    def is_affine(self, growing: frozenset[int]) -> bool:
        """Whether every value and all work is fixed or proportional to the micro-batch, and parameters are fixed."""
        if growing not in self.memo.affine:
            positions = self.program.positions
            fixed = not any(factor in growing for value in self.parameter_values for factor in positions[value])
            self.memo.affine[growing] = fixed and _is_affine(self.program, growing)
        return self.memo.affine[growing]


def _is_affine(program: StaticProgram, growing: frozenset[int]) -> bool:
    sets = [*program.positions, *([f.factor for f in op.factors] for op in program.operations)]
    bodies = [op.body for op in program.operations if op.body is not None]
    return all(sum(map(growing.__contains__, factors)) <= 1 for factors in sets) and all(
        _is_affine(body, growing) for body in bodies
    )


def _prepare_kind(kind: LayerKind) -> StaticKind:
    program = prepare(kind.program)
    seeds = {p.cotangent for p in kind.outputs if p.cotangent is not None}
    varying = {p.value for p in kind.inputs if p.role is not PortRole.PARAMETER} | seeds
    dependent, gradient = set(seeds), set()
    producer: dict[int, int] = {}
    fixed: set[int] = set()
    for op in program.operations:
        producer.update(dict.fromkeys(op.results, op.index))
        if any(v in dependent for v in op.operands):
            gradient.add(op.index)
            dependent.update(op.results)
        if any(v in varying for v in op.operands):
            varying.update(op.results)
        else:
            fixed.update(op.results)
    parameters = tuple(i for i, p in enumerate(kind.inputs) if p.role is PortRole.PARAMETER)
    return StaticKind(
        kind=kind,
        program=program,
        parameters=parameters,
        parameter_values=frozenset(kind.inputs[i].value for i in parameters),
        gradient_operations=frozenset(gradient),
        fixed=frozenset(fixed),
        indices=_indices(kind, program),
        producer=producer,
        table_gradients=_table_gradients(kind, program.operations, producer),
    )


def _indices(kind: LayerKind, program: StaticProgram) -> frozenset[int]:
    """As `StaticKind.indices`; work that mixes examples may have to move them, and is not repeated."""
    values, constants = kind.program.values, frozenset(kind.program.constants)
    integers = {index for index, value in enumerate(values) if value.dtype == "bool" or "int" in value.dtype}
    given = [port.value for port in kind.inputs if port.role is PortRole.BATCH]
    known = integers & {*given, *constants}

    def batches(operands: Iterable[int]) -> set[frozenset[int]]:
        return {frozenset(f for f in program.positions[v] if program.roles[f] is FactorRole.BATCH) for v in operands}

    for op in program.operations:
        made_of = [v for v in op.operands if v not in constants]
        alike = len(batches([*made_of, *op.results])) == 1
        if alike and op.place <= Where.FUSED and known.issuperset(op.operands) and integers.issuperset(op.results):
            known.update(op.results)
    return frozenset(known)


def _table_gradients(kind: LayerKind, operations: Sequence[StaticOp], producer: dict[int, int]) -> dict[int, int]:
    readers, found = _readers(kind.program), {}
    for index, port in enumerate(kind.inputs):
        if port.role is not PortRole.PARAMETER or port.gradient is None:
            continue
        made, value = [], port.gradient
        while value in producer and readers[value] == 1:
            op = operations[producer[value]]
            made.append(op.index)
            if op.primitive != "convert_element_type":
                break
            value = op.operands[0]
        if made and operations[made[-1]].scatter_rows:
            found.update(dict.fromkeys(made, index))
    return found


_PREPARED: dict[int, StaticKind] = {}
"""By the identity of living kinds, since hashing a whole document is slow."""


def prepare_kind(kind: LayerKind) -> StaticKind:
    """Prepares a kind once; later calls with the same object are free."""
    found = _PREPARED.get(id(kind))
    if found is None:
        # A copy, which shares all parts: holding the kind itself would keep it alive for ever.
        found = _PREPARED[id(kind)] = _prepare_kind(kind.model_copy())
        weakref.finalize(kind, _PREPARED.pop, id(kind), None)
    return found


def _turns(op: Operation, factors: Sequence[StaticFactor], positions: Sequence[tuple[int, ...]]) -> bool:
    """Whether a transpose's last dim is not that of its operand."""
    ends = len(positions[op.operands[0]]) - 1, len(positions[op.results[0]]) - 1
    return all((factor.operands[0], factor.results[0]) != ends for factor in factors)
