"""Seconds of a collective: by ring formulas over a `ClusterSpec`, or from a `Profile`'s measurements.

Payload bytes are those of `Collective.bytes`. With `n` devices in a group, a ring moves per device
`2 (n - 1) / n` of the array in an all-reduce and `(n - 1) / n` in an all-gather or a reduce-scatter
(Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009;
Thakur et al., "Optimization of collective communication operations in MPICH", 2005, which also gives
the pairwise all-to-all). Starting a collective costs one latency more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from galvatron_jax.cost.lines import RisingFit, fit_rising
from galvatron_jax.errors import InputError
from galvatron_jax.partition.layer_plan import Collective
from galvatron_jax.spec.cluster import ClusterSpec, Link
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.profile import CollectiveKind, CollectiveTiming, Profile, Provenance

INTRA, INTER = "intra", "inter"

_PASSES = {CollectiveKind.ALL_REDUCE: 2, CollectiveKind.ALL_GATHER: 1, CollectiveKind.REDUCE_SCATTER: 1}
"""How often a ring passes the array round."""


class Links(Protocol):
    """Seconds of collectives on one mesh."""

    def seconds(self, collective: Collective) -> float:
        """Duration of one collective, alone on the machine."""
        ...


@dataclass(frozen=True)
class Group:
    """The devices that take part in a collective, by the links that they use."""

    inside: int
    """Members within each node."""
    nodes: int

    @property
    def size(self) -> int:
        """All members."""
        return self.inside * self.nodes

    @property
    def level(self) -> str:
        """`inter` when the group crosses nodes."""
        return INTER if self.nodes > 1 else INTRA


def group_of(axes: Sequence[str], mesh: Sequence[MeshAxis]) -> Group:
    """The group that some axes of the mesh form.

    Raises:
        InputError: when an axis is not of the mesh.
    """
    by_name = {axis.name: axis for axis in mesh}
    unknown = [name for name in axes if name not in by_name]
    if unknown:
        raise InputError(f"The mesh {', '.join(by_name) or '(empty)'} has no axis {', '.join(unknown)}.")
    chosen = [by_name[name] for name in axes]
    return Group(
        inside=math.prod(axis.size for axis in chosen if axis.level != INTER),
        nodes=math.prod(axis.size for axis in chosen if axis.level == INTER),
    )


def ring_seconds(kind: CollectiveKind, group: Group, *, payload_bytes: float, cluster: ClusterSpec) -> float:
    """Alpha-beta time of a collective.

    Across nodes, the rings run through every member inside a node, each over its own network link, so the network
    carries `1 / group.inside` of the traffic per link (NCCL's multi-ring layout); the slower level bounds the whole.

    Args:
        kind: the operation.
        group: its members.
        payload_bytes: as `Collective.bytes`.
        cluster: latencies and bandwidths per device and direction.

    Raises:
        InputError: when the group crosses nodes and the cluster has one node only.
    """
    if group.size <= 1:
        return 0.0
    intra, inter = cluster.intra, _network(cluster) if group.nodes > 1 else cluster.intra
    n, inside, nodes = group.size, group.inside, group.nodes
    if kind is CollectiveKind.PERMUTE:
        link = inter if nodes > 1 else intra
        return 2 * link.latency_s + payload_bytes / link.bandwidth_bytes_per_s
    if kind is CollectiveKind.ALL_TO_ALL:
        hops = (inside - 1) * intra.latency_s + (n - inside) * inter.latency_s
        within, across = (inside - 1) / n * payload_bytes, (n - inside) / n * payload_bytes
    else:
        passes = _PASSES[kind]
        hops = passes * ((inside - 1) * intra.latency_s + (nodes - 1) * inter.latency_s)
        moved = passes * (n - 1) / n * payload_bytes
        within, across = moved if inside > 1 else 0.0, moved / inside if nodes > 1 else 0.0
    start = inter.latency_s if nodes > 1 else intra.latency_s
    return start + hops + max(within / intra.bandwidth_bytes_per_s, across / inter.bandwidth_bytes_per_s)


def _network(cluster: ClusterSpec) -> Link:
    if cluster.inter is None:
        raise InputError(
            f"The mesh has an axis across nodes, but cluster {cluster.name!r} has no link between nodes: "
            "give it `inter`, or mark the axis `intra`."
        )
    return cluster.inter


@dataclass(frozen=True)
class RingLinks:
    """Collectives priced by ring formulas."""

    cluster: ClusterSpec
    mesh: tuple[MeshAxis, ...]

    def seconds(self, collective: Collective) -> float:
        """Duration of one collective, alone on the machine."""
        group = group_of(collective.axes, self.mesh)
        return ring_seconds(collective.kind, group, payload_bytes=collective.bytes, cluster=self.cluster)


@dataclass(frozen=True)
class ProfiledLinks:
    """Collectives priced by a profile: piecewise linear in bytes for each (operation, group size, level).

    More bytes never take less time, whatever was measured. Beyond the largest message the last slope holds; below the
    smallest, its time (latency). A group size that was
    not measured takes the nearest measured one (same level first), scaled by the ratio of the ring formulas.
    """

    profile: Profile
    cluster: ClusterSpec
    mesh: tuple[MeshAxis, ...]
    _tables: dict[tuple[CollectiveKind, int, str], RisingFit] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        groups: dict[tuple[CollectiveKind, int, str], list[CollectiveTiming]] = defaultdict(list)
        for timing in self.profile.collectives:
            groups[timing.kind, timing.axis_size, timing.level].append(timing)
        for key, timings in groups.items():
            timings.sort(key=lambda timing: timing.bytes)
            self._tables[key] = fit_rising(
                np.array([timing.bytes for timing in timings], float),
                np.array([timing.timing.median_s for timing in timings], float),
            )

    def seconds(self, collective: Collective) -> float:
        """Duration of one collective, alone on the machine.

        Raises:
            InputError: when the profile holds no timing of that operation at all.
        """
        group = group_of(collective.axes, self.mesh)
        if group.size <= 1:
            return 0.0
        kind, count = collective.kind, collective.bytes
        table = self._tables.get((kind, group.size, group.level))
        if table is not None:
            return table(count)
        size, level = self._nearest(kind, group)
        measured = self._tables[kind, size, level](count)
        near = Group(inside=1, nodes=size) if level == INTER else Group(inside=size, nodes=1)
        ratio = ring_seconds(kind, group, payload_bytes=count, cluster=self.cluster)
        return measured * ratio / ring_seconds(kind, near, payload_bytes=count, cluster=self.cluster)

    def _nearest(self, kind: CollectiveKind, group: Group) -> tuple[int, str]:
        measured = [(size, level) for (have, size, level) in self._tables if have is kind and size > 1]
        if not measured:
            raise InputError(
                f"The profile of {self.profile.device!r} has no timing of {kind} (wanted: group of {group.size}, "
                f"{group.level}). Profile the mesh again, or search with a profile derived from the cluster."
            )
        return min(measured, key=lambda key: (key[1] != group.level, abs(math.log(key[0] / group.size)), key))


def links_for(profile: Profile | None, *, cluster: ClusterSpec, mesh: tuple[MeshAxis, ...]) -> Links:
    """Measured collectives where a profile has them, ring formulas otherwise."""
    if profile is None or profile.provenance is Provenance.DERIVED:
        return RingLinks(cluster, mesh)
    return ProfiledLinks(profile, cluster, mesh)
