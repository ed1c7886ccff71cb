"""Which operations run forward and which backward, and which values cross, under a rematerialisation policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from galvatron_jax.partition.static import StaticKind, StaticOp, prepare_kind
from galvatron_jax.spec.model import LayerKind
from galvatron_jax.spec.program import FactorRole
from galvatron_jax.spec.strategy import Remat


@dataclass(frozen=True)
class Split:
    """A layer's joint program, taken apart."""

    forward: tuple[StaticOp, ...]
    backward: tuple[StaticOp, ...]
    saved: tuple[int, ...]
    """Values that forward keeps for backward."""
    forward_key: tuple[int, ...]
    """The forward operations' indices."""
    key: tuple[tuple[int, ...], ...]
    """All of it."""


def split(static: StaticKind, remat: Remat) -> Split:
    """Operations of the forward and of the backward program, and the values that cross."""
    return static.memo.splits.get(remat, lambda: _split(static, remat))


def plainest(static: StaticKind, remat: Remat) -> Remat:
    """The first policy that keeps and repeats the same.

    Without rematerialisation values are kept in all their layouts, with it in the smallest. So where any are kept, a
    policy that would repeat no work is not yet the same as none.
    """
    known = static.memo.plainest
    if remat not in known:
        parts = split(static, remat)
        known[remat] = next(
            policy
            for policy in Remat
            if split(static, policy).key == parts.key
            and (not parts.saved or (policy is Remat.NONE) == (remat is Remat.NONE))
        )
    return known[remat]


def distinct_remats(kind: LayerKind, policies: Sequence[Remat]) -> tuple[Remat, ...]:
    """Of some policies, those that differ in what a layer keeps and repeats; of equal ones the first."""
    static, found = prepare_kind(kind), dict[Remat, Remat]()
    for policy in policies:
        found.setdefault(plainest(static, policy), policy)
    return tuple(found.values())


def _split(static: StaticKind, remat: Remat) -> Split:
    gradients = [p.gradient for p in static.kind.inputs if p.gradient is not None]
    candidates = _candidates(static, remat)
    backward, leaves = _needed(static, gradients, stop=candidates)
    saved = tuple(v for v in sorted(leaves) if v in candidates)
    forward, _ = _needed(static, [*(p.value for p in static.kind.outputs), *saved], stop=set())
    operations, forward_key = static.program.operations, tuple(sorted(forward))
    return Split(
        forward=tuple(operations[index] for index in forward_key),
        backward=tuple(operations[index] for index in sorted(backward)),
        saved=saved,
        forward_key=forward_key,
        key=(forward_key, tuple(sorted(backward)), saved),
    )


def _candidates(static: StaticKind, remat: Remat) -> set[int]:
    """Values that may be kept for the backward program."""
    operations, gradient = static.program.operations, static.gradient_operations
    if not gradient or remat is Remat.FULL:
        return set()
    inputs = {p.value for p in static.kind.inputs} | set(static.program.program.constants)
    recomputed = {r for op in operations if op.recomputed for r in op.results}
    dependent = {r for i in gradient for r in operations[i].results}
    if remat is Remat.DOTS:
        kept = {
            r
            for op in operations
            if op.index not in gradient and op.primitive in ("dot_general", "conv_general_dilated")
            for r in op.results
        }
    else:
        kept = {v for i in gradient for v in operations[i].operands} - dependent
    if remat is Remat.ATTENTION:
        kept = {v for v in kept if not _is_quadratic(static, v)}
    seeds = {p.cotangent for p in static.kind.outputs}
    return kept - inputs - static.fixed - static.indices - recomputed - seeds


def _is_quadratic(static: StaticKind, value: int) -> bool:
    """Whether two of the value's dims are sequences: attention scores and weights."""
    program = static.program
    places = zip(program.dim_of[value], program.positions[value], strict=True)
    return len({dim for dim, factor in places if program.roles[factor] is FactorRole.SEQUENCE}) >= 2


def _needed(static: StaticKind, outputs: Iterable[int], stop: set[int]) -> tuple[set[int], set[int]]:
    """Operations that some outputs need, and the values at which the walk stopped."""
    todo = list(outputs)
    operations: set[int] = set()
    leaves: set[int] = set()
    while todo:
        value = todo.pop()
        if value in stop or value not in static.producer:
            leaves.add(value)
            continue
        index = static.producer[value]
        if index not in operations:
            operations.add(index)
            todo += static.program.operations[index].operands
    return operations, leaves
