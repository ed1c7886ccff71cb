"""A layer's operations as data: values, factors, sharding rules, FLOPs. No JAX is needed to plan with them.

Every dim of every value is an ordered product of *factors* (Shardy's word), given by index into
`Program.factors`. A dim of size 1 has no factor. Two dims that share a factor are sharded alike.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from galvatron_jax.spec.document import Record

FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Types in which gradients may be summed, with the bytes of an element."""


def sum_dtype(own: str, asked: str | None) -> str:
    """The type in which gradients of a type are summed over devices: the one asked for where that is narrower.

    Example:
        >>> sum_dtype("float32", "bfloat16"), sum_dtype("bfloat16", "float32"), sum_dtype("float32", None)
        ('bfloat16', 'bfloat16', 'float32')
    """
    return own if asked is None or FLOAT_BYTES.get(own, 0) <= FLOAT_BYTES[asked] else asked


class FactorRole(StrEnum):
    """What a factor means to the model."""

    BATCH = "batch"
    SEQUENCE = "sequence"
    """On the layer's boundary activations, on none of its parameters."""
    EMBEDDING = "embedding"
    """On the layer's boundary activations and on its parameters."""
    HIDDEN = "hidden"
    """On parameters and not on the boundary: heads, MLP, experts, vocabulary. Sharding it is tensor parallelism."""
    INNER = "inner"
    """Everything else."""


class Factor(Record):
    """One indivisible piece of dims, shared by all the dims that must be sharded alike."""

    size: int
    role: FactorRole = FactorRole.INNER


class Value(Record):
    """An array of the program."""

    dims: tuple[tuple[int, ...], ...]
    """Per dim, its factors from major to minor."""
    dtype: str
    zero: bool = False
    """Whether this is a literal whose elements are all zero."""


class FactorKind(StrEnum):
    """What happens when an operation's factor is sharded."""

    PARALLEL = "parallel"
    """Each shard is computed independently."""
    REDUCE = "reduce"
    """The shards' results are summed (or maximised, by the operation's `combine`) over the axis."""
    INDEX = "index"
    """A gather's indexed dim: each shard looks up what it holds and gives zero elsewhere; results are summed."""
    SCATTER_INDEX = "scatter_index"
    """A scatter's indexed dim: each shard takes the updates that fall into it."""
    ZERO_REDUCE = "zero_reduce"
    """Summed over shards, provided that the first operand is zero (scatter-add onto zeros)."""


class Place(NamedTuple):
    """Where a factor sits in a value."""

    dim: int
    index: int
    """Position among the dim's factors, from major to minor."""


class RuleFactor(Record):
    """One factor of an operation's sharding rule, with its place in each operand and result (None: not there)."""

    kind: FactorKind
    factor: int
    operands: tuple[Place | None, ...]
    results: tuple[Place | None, ...]


class Linearity(StrEnum):
    """Through which operands a pending sum may pass an operation unresolved."""

    NONE = "none"
    UNARY = "unary"
    """Linear in its first operand; the others are not summands (convert, reshape, transpose, reduce_sum, ...)."""
    ADDITIVE = "additive"
    """Linear in all operands together (add, sub, concatenate): all must be pending, or zero."""
    SCALE = "scale"
    """Linear in one operand when the others are scalars, or the result has no batch (mul; div in its first)."""
    LAST = "last"
    """Linear in its last operand when the first is zero or pending with it (scatter-add onto zeros)."""


class Operation(Record):
    """One primitive application."""

    primitive: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    factors: tuple[RuleFactor, ...] = ()
    linearity: Linearity = Linearity.NONE
    combine: str = "sum"
    """How shards of a REDUCE factor combine: `sum`, `max` or `min`."""
    elementwise: bool = False
    """Whether operands broadcast elementwise, so that lazily broadcast dims may stay of size 1."""
    flops_per_point: float = 0.0
    """FLOPs per point of the iteration space, the product of all factors of operands and results."""
    known: bool = True
    """Whether a sharding rule exists; without one the operands are gathered and the work is repeated."""
    barrier: bool = False
    """Whether the operation only separates recomputation from the forward pass."""
    bodies: tuple[Program, ...] = ()
    """Programs of a loop or a branch."""
    loop: tuple[int, int, int] | None = None
    """For a scan: number of constants, number of carried values, trip count."""


class Program(Record):
    """A flat list of operations in execution order."""

    factors: tuple[Factor, ...]
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    constants: tuple[int, ...] = ()
    """Values known when the program was traced (array constants and literals)."""
    outputs: tuple[int, ...]
    operations: tuple[Operation, ...]
