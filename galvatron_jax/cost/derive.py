"""A profile for a cluster that is not at hand, from its datasheet alone."""

from __future__ import annotations

from galvatron_jax.cost.links import INTER, INTRA, Group, ring_seconds
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.profile import CollectiveKind, CollectiveTiming, Profile, Provenance, Timing

_SIZES = tuple(4**power for power in range(5, 16))
"""1 KiB to 1 GiB."""


def derive_profile(model: ModelSpec, cluster: ClusterSpec) -> Profile:
    """A profile of provenance `derived`.

    It tabulates the ring formulas for people to read. It holds no layer times: for a derived profile, the cost model
    computes layers (by the roofline of their planned FLOPs and bytes) and collectives from the `ClusterSpec` on demand,
    so that no shape is missing.
    """
    return Profile(
        provenance=Provenance.DERIVED,
        device=cluster.device.name,
        num_devices=cluster.num_devices,
        model_fingerprint=model.fingerprint,
        layers=(),
        collectives=_collectives(cluster),
        update_bytes_per_s=cluster.device.memory_bandwidth_bytes_per_s,
    )


def _collectives(cluster: ClusterSpec) -> tuple[CollectiveTiming, ...]:
    groups = [Group(inside=n, nodes=1) for n in _divisors(cluster.devices_per_node)]
    groups += [Group(inside=1, nodes=n) for n in _divisors(cluster.num_nodes)]
    kinds = [kind for kind in CollectiveKind if kind is not CollectiveKind.PERMUTE]
    return tuple(
        CollectiveTiming(
            kind=kind,
            axis_size=group.size,
            level=INTER if group.nodes > 1 else INTRA,
            bytes=size,
            timing=Timing(median_s=ring_seconds(kind, group, payload_bytes=size, cluster=cluster), samples=0),
        )
        for kind in kinds
        for group in groups
        for size in _SIZES
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(2, number + 1) if number % n == 0]
