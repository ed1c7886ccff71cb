"""From a `LayerStrategy` to logical axes and the factors each may shard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from galvatron_jax.partition.choice import KEEP_TENSOR_SHARDS
from galvatron_jax.partition.layout import NOWHERE, Axis, Layout, Role, StepKind, step_bytes
from galvatron_jax.partition.planner import Pass, steps_of
from galvatron_jax.partition.setting import Keep, Setting
from galvatron_jax.partition.static import StaticKind
from galvatron_jax.spec.program import FactorRole
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel

REPEATED_WORK = 0.1
"""Hidden factors are chosen for least communication among those that save all but this share of the FLOPs that the
best of them saves."""

SMALL_PARAMETER_ELEMENTS = 256
"""ZeRO leaves smaller parameters whole: a gather's latency costs more than their bytes."""
SMALL_TABLE_ELEMENTS = 4096
"""Tables in which rows of no embedding are looked up (relative positions) stay whole below this: to gather one, or to
look up where its rows are stored, takes longer than its bytes. Gradients are summed by collectives of their own."""


@dataclass(frozen=True)
class AxisPlan:
    """Logical axes with what each may shard."""

    axes: tuple[Axis, ...]
    allowed: tuple[frozenset[int], ...]

    def of(self, *roles: Role) -> tuple[int, ...]:
        """Indices of the axes of some roles."""
        if roles not in self._known:
            self._known[roles] = tuple(i for i, axis in enumerate(self.axes) if axis.role in roles)
        return self._known[roles]

    @cached_property
    def _known(self) -> dict[tuple[Role, ...], tuple[int, ...]]:
        return {}


def plan_axes(static: StaticKind, strategy: LayerStrategy, mesh: Mapping[str, int], sizes: Sequence[int]) -> AxisPlan:
    """Logical axes of a strategy: groups of mesh axes, taken apart where a factor is too small for the group."""
    roles = static.program.roles
    batch = _with_role(roles, FactorRole.BATCH)
    sequence = _with_role(roles, FactorRole.SEQUENCE)
    hidden = _with_role(roles, FactorRole.HIDDEN)
    tensor = tensor_factors(static, strategy.tp, mesh)
    seq_tensor = sequence if strategy.sp_kind is SequenceParallel.MEGATRON else frozenset()
    ulysses = strategy.sp if strategy.sp_kind is SequenceParallel.ULYSSES else ()
    axes: list[Axis] = []
    allowed: list[frozenset[int]] = []

    def add(role: Role, names: Sequence[str], factors: frozenset[int], needed: frozenset[int]) -> None:
        """Axes that may shard `factors`: one group, taken apart where one of those `needed` has too little room."""
        for group in _groups(names, mesh, [sizes[f] for f in needed]):
            axes.append(_axis(role, group, mesh))
            allowed.append(factors)

    add(Role.DATA, strategy.dp, batch, batch)
    # Where the sequence is whole, hidden dims are sharded as tensor parallelism would: heads, not the halves of one.
    heads = frozenset().union(*[factors for _, factors in tensor_factors(static, ulysses, mesh)])
    others = frozenset({f for f in hidden if sizes[f] > 2})
    add(Role.SEQUENCE, ulysses, sequence | heads | others, sequence | heads)
    for names, factors in tensor:
        add(Role.TENSOR, names, factors | seq_tensor, factors | seq_tensor)
    # There at every ZeRO stage, so that all stages share passes: where nothing is stored over them they change nothing.
    for index, axis in [(i, a) for i, a in enumerate(axes) if a.role in (Role.DATA, Role.SEQUENCE)]:
        axes.append(Axis(Role.STORAGE, axis.names, axis.size, axis.rank, mirror=index))
        allowed.append(frozenset())
    if any(port.summands for port in (*static.kind.inputs, *static.kind.outputs)):
        used = {name for axis in axes for name in axis.names}
        for name in [name for name, size in mesh.items() if size > 1 and name not in used]:
            axes.append(_axis(Role.IDLE, (name,), mesh))
            allowed.append(frozenset())
    return AxisPlan(tuple(axes), tuple(allowed))


def _axis(role: Role, names: Sequence[str], mesh: Mapping[str, int]) -> Axis:
    order = list(mesh)
    names = tuple(sorted(names, key=order.index))
    return Axis(role, names, math.prod(mesh[n] for n in names), order.index(names[0]))


def _with_role(roles: Sequence[FactorRole], role: FactorRole) -> frozenset[int]:
    return frozenset(i for i, r in enumerate(roles) if r is role)


def _groups(names: Sequence[str], mesh: Mapping[str, int], sizes: Iterable[int]) -> list[tuple[str, ...]]:
    """One group, or single axes where some factor can take a part of the group only."""
    total = math.prod(mesh[n] for n in names)
    if total == 1:
        return []
    if any(size % total and math.gcd(size, total) > 1 for size in sizes):
        return [(n,) for n in names]
    return [tuple(names)]


# ------------------------------------------------------------------------------------------------ tensor parallelism

TensorPlan = tuple[tuple[tuple[str, ...], frozenset[int]], ...]
"""Groups of tensor axes with the hidden factors each shards."""


def tensor_factors(static: StaticKind, names: Sequence[str], mesh: Mapping[str, int]) -> TensorPlan:
    """Which hidden factors the tensor axes shard: one choice for each cluster of factors that share parameters.

    Query heads, key-value heads and head dim form one cluster (they meet in the same projections), the MLP's width
    another. Per cluster every factor alone and every ordered pair (key-value heads first, the rest on query groups,
    where there are fewer key-value heads than tensor shards) is planned, and the cheapest taken.
    """
    # What the axes are called does not matter, only their sizes and order: meshes of all stages share choices.
    order = {name: str(rank) for rank, name in enumerate(sorted(names, key=list(mesh).index))}
    renamed, sizes = tuple(order[name] for name in names), {order[name]: mesh[name] for name in mesh if name in order}
    found = static.memo.tensor_plans.get(
        (renamed, tuple(sizes.values())), lambda: _tensor_factors(static, renamed, sizes)
    )
    back = {new: name for name, new in order.items()}
    return tuple((tuple(back[name] for name in group), factors) for group, factors in found)


def _tensor_factors(static: StaticKind, names: Sequence[str], mesh: Mapping[str, int]) -> TensorPlan:
    if not names:
        return ()
    sizes = [f.size for f in static.program.program.factors]
    clusters = _clusters(static, math.prod(mesh[n] for n in names), sizes)
    assignment: dict[str, set[int]] = {n: set() for n in names}
    settings: dict[tuple[Axis, ...], Setting] = {}
    for cluster in clusters:
        options = _options(static, cluster, list(names), mesh, sizes)
        if len(options) > 1:
            priced = [
                (*_option_cost(static, assignment, option, mesh, settings), i) for i, option in enumerate(options)
            ]
            least = min(flops for flops, _, _ in priced)
            whole, _ = _option_cost(static, assignment, {}, mesh, settings)
            enough = least + REPEATED_WORK * (whole - least)
            _, best_index = min((sent, i) for flops, sent, i in priced if flops <= enough)
            best = options[best_index]
        else:
            best = options[0]
        for name, factors in best.items():
            assignment[name] |= factors
    grouped: dict[frozenset[int], list[str]] = {}
    for name, factors in assignment.items():
        grouped.setdefault(frozenset(factors), []).append(name)
    return tuple((tuple(group), factors) for factors, group in grouped.items())


def _clusters(static: StaticKind, shards: int, sizes: Sequence[int]) -> list[list[int]]:
    """Hidden factors that tensor axes can shard, grouped by shared parameters, largest parameters first."""
    program = static.program
    weight: dict[int, float] = {}
    members: list[set[int]] = []
    for port in static.parameters:
        value = static.kind.inputs[port].value
        factors = [f for f in program.positions[value] if program.roles[f] is FactorRole.HIDDEN]
        usable = {f for f in factors if factors.count(f) == 1 and math.gcd(sizes[f], shards) > 1}
        size = math.prod(sizes[f] for f in program.positions[value])
        for factor in usable:
            weight[factor] = weight.get(factor, 0.0) + size
        if usable:
            members.append(usable)
    merged: list[set[int]] = []
    for group in members:
        touching = [m for m in merged if m & group]
        merged = [m for m in merged if not m & group] + [set().union(group, *touching)]
    merged.sort(key=lambda m: -sum(weight[f] for f in m))
    return [sorted(m, key=lambda f: (-weight[f], f))[:5] for m in merged]


def _options(
    static: StaticKind, cluster: Sequence[int], names: Sequence[str], mesh: Mapping[str, int], sizes: Sequence[int]
) -> list[dict[str, set[int]]]:
    """Ways to spread the tensor axes over a cluster: one factor, or two one after the other.

    Only those that place most shards; and nothing at all where the cluster's parameters are a small part.
    """
    options: list[dict[str, set[int]]] = []
    for first in cluster:
        placed, rest = _fill(names, mesh, sizes[first])
        options.append({n: {first} for n in placed})
        for second in cluster if rest else ():
            more, _ = _fill(rest, mesh, sizes[second])
            if second != first and more:
                options.append({n: {first} for n in placed} | {n: {second} for n in more})
    most = max(math.prod(mesh[n] for n in option) for option in options)
    best = [option for option in options if math.prod(mesh[n] for n in option) == most]
    if _share(static, cluster, sizes) < MINOR_SHARE:
        best.append({})
    return [option for i, option in enumerate(best) if option not in best[:i]]


MINOR_SHARE = 0.2
"""Share of a layer's parameters below which a cluster may stay whole under tensor parallelism."""


def _share(static: StaticKind, cluster: Sequence[int], sizes: Sequence[int]) -> float:
    program, total, touched = static.program, 0, 0
    for port in static.parameters:
        positions = program.positions[static.kind.inputs[port].value]
        size = math.prod(sizes[f] for f in positions)
        total += size
        touched += size if set(positions) & set(cluster) else 0
    return touched / max(total, 1)


def _fill(names: Sequence[str], mesh: Mapping[str, int], size: int) -> tuple[list[str], list[str]]:
    """Axes that a factor of this size can take, and the others."""
    placed, rest = [], []
    for name in names:
        if size % mesh[name] == 0:
            placed.append(name)
            size //= mesh[name]
        else:
            rest.append(name)
    return placed, rest


def _option_cost(
    static: StaticKind,
    assignment: Mapping[str, set[int]],
    option: Mapping[str, set[int]],
    mesh: Mapping[str, int],
    settings: dict[tuple[Axis, ...], Setting],
) -> tuple[float, float]:
    """Local FLOPs, and bytes sent, of the layer under tensor axes alone.

    Options differ in few factors: over the same axes they share what they plan alike, by `settings`.
    """
    together: dict[frozenset[int], list[str]] = {}
    for name, factors in assignment.items():
        together.setdefault(frozenset(factors | option.get(name, set())), []).append(name)
    axes = tuple(_axis(Role.TENSOR, names, mesh) for names in together.values())
    plan = AxisPlan(axes, tuple(together))
    if axes not in settings:
        sizes = [f.size for f in static.program.program.factors]
        settings[axes] = Setting(static.program, sizes, axes, plan.allowed, keep=Keep.STEPS)
    planner = Pass(settings[axes].allowing(plan.allowed))
    for port in static.kind.inputs:
        planner.hold(port.value, parameter_layout(static, port.value, plan))
    for port in static.kind.outputs:
        if port.cotangent is not None:
            planner.hold(port.cotangent, planner.setting.nowhere)
    planner.run(static.program.operations)
    sent = sum(
        step_bytes(step, static.program.itemsize[value])
        * (1.0 if static.program.has_batch[value] or step.kind is not StepKind.ALL_GATHER else KEEP_TENSOR_SHARDS)
        for value, step in steps_of(planner.instructions)
    )
    return sum(planner.flops), sent


def parameter_layout(static: StaticKind, value: int, plan: AxisPlan) -> Layout:
    """Where the tensor axes sit in a parameter (nowhere in anything else than a parameter)."""
    layout = [NOWHERE] * len(plan.axes)
    if value not in static.parameter_values:
        return tuple(layout)
    positions = static.program.positions[value]
    for index in plan.of(Role.TENSOR):
        hidden = [
            p
            for p, f in enumerate(positions)
            if f in plan.allowed[index] and static.program.roles[f] is FactorRole.HIDDEN and positions.count(f) == 1
        ]
        if hidden:
            layout[index] = hidden[0]
    return tuple(layout)
