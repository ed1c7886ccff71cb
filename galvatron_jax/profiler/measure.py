"""The whole profile of a model on the live devices: layers, collectives, optimizer update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from galvatron_jax.errors import InputError
from galvatron_jax.profiler.bench import Bench
from galvatron_jax.profiler.cache import TimingCache, default_cache_dir, environment, software_versions
from galvatron_jax.profiler.collectives import collective_points, measure_collective, message_sizes
from galvatron_jax.profiler.devices import axis_groups, live_mesh
from galvatron_jax.profiler.layers import LayerPrograms, profile_layers
from galvatron_jax.profiler.progress import progress_bar
from galvatron_jax.profiler.rates import measure_update
from galvatron_jax.profiler.timing import DEFAULT_SAMPLING, Sampling
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.profile import Profile, Provenance


def profile(
    model: ModelSpec,
    programs: LayerPrograms,
    *,
    cluster: ClusterSpec | None = None,
    mesh: Mesh | None = None,
    message_bytes: Sequence[int] | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Profile:
    """Measures a model's layers and the collectives of the live devices.

    Every point is stored when it is measured: an interrupted run loses at most one, and a second one is served
    from the cache.

    Args:
        model: The model that the layers belong to.
        programs: Layers to time at local shapes, from `choose_points` and the runtime.
        cluster: When given, must have as many devices as are live.
        mesh: Devices; all live ones by default.
        message_bytes: Payloads of the collectives; the platform's by default.
        cache_dir: Where timings are kept; `default_cache_dir()` by default.
        progress: Whether to draw a progress bar on stderr; by default only on a terminal.
        sampling: Effort per point.

    Raises:
        InputError: when `cluster` is not the live one, or the processes hold unlike numbers of devices.
    """
    mesh = mesh or live_mesh()
    if cluster is not None and cluster.num_devices != mesh.size:
        raise InputError(
            f"Cluster {cluster.name!r} has {cluster.num_devices} devices but {mesh.size} are live. Measure with the "
            "cluster `live`, or derive a profile from the cluster's figures."
        )
    programs = list(programs)
    platform = mesh.devices.flat[0].platform
    points = list(collective_points(axis_groups(mesh), message_bytes or message_sizes(platform)))
    cache = TimingCache(Path(cache_dir) if cache_dir else default_cache_dir(), environment(mesh))
    with progress_bar(f"Profiling {model.name}", total=len(points) + len(programs) + 1, show=progress) as step:
        bench = Bench(mesh=mesh, cache=cache, sampling=sampling, step=step)
        layers = profile_layers(programs, bench=bench)
        collectives = tuple(measure_collective(bench, point) for point in points)
        update = measure_update(bench)
    return Profile(
        provenance=Provenance.MEASURED,
        device=mesh.devices.flat[0].device_kind,
        num_devices=mesh.size,
        model_fingerprint=model.fingerprint,
        layers=layers,
        collectives=collectives,
        update_bytes_per_s=update,
        software=software_versions(),
    )
