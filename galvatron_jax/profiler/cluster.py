"""The live devices described as a `ClusterSpec`, every figure measured on all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from galvatron_jax.profiler.bench import Bench
from galvatron_jax.profiler.cache import TimingCache, default_cache_dir, environment
from galvatron_jax.profiler.collectives import collective_points, measure_collective, message_sizes
from galvatron_jax.profiler.devices import axis_groups, live_mesh, memory_bytes, num_nodes
from galvatron_jax.profiler.processes import least
from galvatron_jax.profiler.progress import progress_bar
from galvatron_jax.profiler.rates import MATMUL_DTYPES, measure_matmul, measure_memory
from galvatron_jax.profiler.timing import DEFAULT_SAMPLING, Sampling
from galvatron_jax.spec.cluster import ClusterSpec, DeviceSpec, Link
from galvatron_jax.spec.profile import CollectiveKind, CollectiveTiming


def live_cluster(
    devices: Sequence[jax.Device] | None = None,
    *,
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> ClusterSpec:
    """Measures the live devices; a second call on the same ones is served from the cache.

    Rates are what one device sustains while all are busy, so virtual devices that share cores get their share.
    Each process counts as one node.

    Args:
        devices: Devices to measure; all there are by default.
        cache_dir: Where timings are kept; `default_cache_dir()` by default.
        progress: Whether to draw a progress bar on stderr; by default only on a terminal.
        sampling: Effort per point.

    Raises:
        InputError: when the processes hold unlike numbers of devices.
    """
    mesh = live_mesh(devices)
    cache = TimingCache(Path(cache_dir) if cache_dir else default_cache_dir(), environment(mesh))
    points = tuple(
        collective_points(
            axis_groups(mesh), message_sizes(mesh.devices.flat[0].platform), kinds=(CollectiveKind.ALL_REDUCE,)
        )
    )
    with progress_bar("Measuring devices", total=len(points) + len(MATMUL_DTYPES) + 1, show=progress) as step:
        bench = Bench(mesh=mesh, cache=cache, sampling=sampling, step=step)
        device = measure_device(bench)
        timings = [measure_collective(bench, point) for point in points]
    nodes = num_nodes(list(mesh.devices.flat))
    # Larger groups across nodes also use the links inside them, and say nothing of the network alone.
    inter = fit_link([t for t in timings if t.axis_size <= nodes], level="inter")
    intra = fit_link(timings, level="intra")
    if intra is None:
        intra = Link(name="none", latency_s=0.0, bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s)
    return ClusterSpec(
        name=f"live-{mesh.size}x{device.name}".replace(" ", "-").lower(),
        num_nodes=nodes,
        devices_per_node=mesh.size // nodes,
        device=device,
        intra=intra,
        inter=inter,
        source=(
            f"Measured on all {mesh.size} live devices at once with JAX {jax.__version__}: matrix products, an array "
            "scaled in memory, and a ring model fitted to all-reduces in float32."
        ),
    )


def measure_device(bench: Bench) -> DeviceSpec:
    """One device: the least memory of any, and the rates it sustains while the others work too."""
    device = bench.mesh.devices.flat[0]
    if device.process_index != jax.process_index():
        device = jax.local_devices()[0]
    return DeviceSpec(
        name=device.device_kind,
        memory_bytes=int(least(memory_bytes(device))),
        peak_flops_per_s={dtype: measure_matmul(bench, dtype=dtype) for dtype in MATMUL_DTYPES},
        memory_bandwidth_bytes_per_s=measure_memory(bench),
    )


def fit_link(timings: Sequence[CollectiveTiming], *, level: str) -> Link | None:
    """Latency and bandwidth of the links of a level, from its all-reduces.

    A ring all-reduce of B bytes over n devices takes 2 (n - 1) steps, each with the link's latency, one latency
    more to start, and moves 2 (n - 1) / n B bytes per device (Patarasuk & Yuan, 2009): the cost model's formula.
    Relative errors are minimised, neither figure can be negative.

    Returns:
        None when no group of that level was timed.
    """
    chosen = [t for t in timings if t.kind is CollectiveKind.ALL_REDUCE and t.level == level]
    if not chosen:
        return None
    seconds = np.array([t.timing.median_s for t in chosen])
    steps = np.array([1.0 + 2.0 * (t.axis_size - 1) for t in chosen])
    moved = np.array([2.0 * (t.axis_size - 1) / t.axis_size * t.bytes for t in chosen])
    scale = np.array([steps.max(), moved.max()])
    latency, per_byte = _non_negative(np.stack([steps, moved], axis=1) / scale / seconds[:, None])
    largest = int(moved.argmax())
    # Where size makes no difference the fit sees no bandwidth; the largest message bounds it from below.
    per_byte = per_byte / scale[1] or seconds[largest] / moved[largest]
    return Link(name="measured", latency_s=float(latency / scale[0]), bandwidth_bytes_per_s=float(1 / per_byte))


def _non_negative(rows: np.ndarray) -> np.ndarray:
    """The non-negative weights of two columns whose sum is nearest to one everywhere. float64[2].

    A minimum with both free to be negative that is not has one of them at zero, as the sum of squares is convex: here
    by hand, for SciPy's takes a quarter of a second to load.

    Args:
        rows: float64[samples, 2]
    """
    wanted = np.ones(len(rows))
    both = np.linalg.lstsq(rows, wanted)[0]
    if (both >= 0).all():
        return both
    alone = np.diag(np.maximum(rows.sum(axis=0) / (rows**2).sum(axis=0), 0.0))
    return min(alone, key=lambda weights: float(((rows @ weights - wanted) ** 2).sum()))
