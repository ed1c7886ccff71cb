"""Names of clusters made into `ClusterSpec`s: a preset, a document, or the devices at hand."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import jax

from galvatron_jax.errors import InputError
from galvatron_jax.profiler import live_cluster
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.presets import cluster_preset

LIVE = "live"


def resolve_cluster(
    cluster: ClusterSpec | str | PathLike[str], *, cache_dir: str | None = None, progress: bool | None = None
) -> ClusterSpec:
    """Finds the cluster meant.

    Args:
        cluster: a `ClusterSpec`, the path of one (`.json` or `.toml`), a preset's name, or `live`, which measures the
            devices of this process (cached).
        cache_dir: where measurements are kept.
        progress: whether to draw progress; by default only on a terminal.

    Raises:
        DocumentError: when the document is missing or faulty.
        InputError: when there is no such preset.
    """
    if isinstance(cluster, ClusterSpec):
        return cluster
    if cluster == LIVE:
        return live_cluster(cache_dir=cache_dir, progress=progress)
    if Path(cluster).suffix in (".json", ".toml"):
        return ClusterSpec.load(cluster)
    return cluster_preset(str(cluster))


def check_live(cluster: ClusterSpec) -> None:
    """Makes sure that as many devices are here as the cluster has.

    Raises:
        InputError: when not.
    """
    if cluster.num_devices != jax.device_count():
        raise InputError(
            f"Cluster {cluster.name!r} has {cluster.num_devices} devices, but {jax.device_count()} are here. Use the "
            "cluster 'live' to train on these, or find_plan (galvatron-jax search) to plan for a cluster elsewhere."
        )
