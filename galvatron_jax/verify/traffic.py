"""Collectives of a compiled program: who takes part, how much moves, and what it takes on a cluster's links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from galvatron_jax import _compat
from galvatron_jax.cost.links import Group, ring_seconds
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.verify.hlo import Computation, Instruction, Module

_KINDS = {
    "all-reduce": CollectiveKind.ALL_REDUCE,
    "all-gather": CollectiveKind.ALL_GATHER,
    "reduce-scatter": CollectiveKind.REDUCE_SCATTER,
    "all-to-all": CollectiveKind.ALL_TO_ALL,
    "ragged-all-to-all": CollectiveKind.ALL_TO_ALL,
    "collective-permute": CollectiveKind.PERMUTE,
    "collective-broadcast": CollectiveKind.ALL_GATHER,
}


@dataclass(frozen=True, order=True)
class Traffic:
    """A collective: two that are equal cost the same."""

    operation: str
    """As HLO names it."""
    bytes: int
    """Of the operands on one device, all arrays of a combined one together."""
    inside: int
    """Members within each node."""
    nodes: int

    @property
    def members(self) -> int:
        """Devices of a group."""
        return self.inside * self.nodes

    @property
    def wire_bytes(self) -> float:
        """That each device sends, by the algorithms of `cost.links`: what unlike operations can be compared by."""
        kind, others = _KINDS[self.operation], self.members - 1
        if kind is CollectiveKind.PERMUTE:
            return self.bytes
        if kind is CollectiveKind.ALL_GATHER:
            return self.bytes * others
        return self.bytes * others / self.members * (2 if kind is CollectiveKind.ALL_REDUCE else 1)


def collective_of(
    module: Module, computation: Computation, instruction: Instruction, *, per_node: int
) -> Traffic | None:
    """The collective that an instruction starts; None where it starts none.

    Args:
        module: the program.
        computation: where the instruction stands.
        instruction: any.
        per_node: devices of a node; the program's partitions lie on them in order.
    """
    if instruction.opcode == "async-start":
        inner = module.computations[instruction.called[0]]
        return collective_of(module, inner, inner.root, per_node=per_node)
    operation = instruction.opcode.removesuffix("-start")
    if operation not in _KINDS:
        return None
    count = sum(operand.bytes for operand in computation.operands_of(instruction))
    return Traffic(operation, count, *_members(instruction, per_node))


def traffic_seconds(one: Traffic, cluster: ClusterSpec) -> float:
    """Duration of a collective, alone on the machine, by ring formulas."""
    kind = _KINDS[one.operation]
    payload = one.bytes * one.members if kind is CollectiveKind.ALL_GATHER else one.bytes
    return ring_seconds(kind, Group(one.inside, one.nodes), payload_bytes=payload, cluster=cluster)


def _members(instruction: Instruction, per_node: int) -> tuple[int, int]:
    """Members of the most scattered group: in each node, and nodes."""
    if instruction.opcode.startswith("collective-permute"):
        groups = _compat.compiled_pairs(instruction.attributes)
        return (1, 2) if any(_nodes(pair, per_node) > 1 for pair in groups) else (2, 1)
    groups = _compat.compiled_groups(instruction.attributes)
    if not groups:
        raise ValueError(f"cannot read the groups of {instruction.name}: {instruction.attributes[:300]}")
    group = max(groups, key=lambda one: (len(one), _nodes(one, per_node)))
    nodes = _nodes(group, per_node)
    return len(group) // nodes, nodes


def _nodes(group: Sequence[int], per_node: int) -> int:
    return len({device // per_node for device in group})
