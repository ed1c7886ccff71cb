"""The live devices as a `ClusterSpec`."""

import jax
import pytest

from galvatron_jax.profiler.cluster import fit_link, live_cluster
from galvatron_jax.profiler.timing import Sampling
from galvatron_jax.spec.profile import CollectiveKind, CollectiveTiming, Timing

QUICK = Sampling(window_s=0.001, budget_s=0.001, min_samples=1, max_samples=1)


def all_reduces(latency_s, bandwidth, *, level="intra"):
    for size in (2, 4, 8):
        for count in (4096, 131072, 4194304):
            seconds = (1 + 2 * (size - 1)) * latency_s + 2 * (size - 1) / size * count / bandwidth
            timing = Timing(median_s=seconds)
            yield CollectiveTiming(
                kind=CollectiveKind.ALL_REDUCE, axis_size=size, level=level, bytes=count, timing=timing
            )


@pytest.mark.parametrize(("latency_s", "bandwidth"), [(5e-6, 4e11), (2e-5, 1e9), (0.0, 1e10)])
def test_the_fit_finds_the_link_that_made_the_timings(latency_s, bandwidth):
    link = fit_link(list(all_reduces(latency_s, bandwidth)), level="intra")
    assert link.latency_s == pytest.approx(latency_s, abs=1e-12)
    assert link.bandwidth_bytes_per_s == pytest.approx(bandwidth)


def test_the_fit_never_turns_negative():
    shrinking = [
        CollectiveTiming(
            kind=CollectiveKind.ALL_REDUCE, axis_size=2, level="intra", bytes=count, timing=Timing(median_s=seconds)
        )
        for count, seconds in ((4096, 3e-4), (131072, 2e-4), (4194304, 1e-4))
    ]
    link = fit_link(shrinking, level="intra")
    assert link.latency_s >= 0
    assert 0 < link.bandwidth_bytes_per_s < float("inf")


def test_levels_are_fitted_apart():
    timings = [*all_reduces(1e-6, 1e11), *all_reduces(1e-4, 1e8, level="inter")]
    assert fit_link(timings, level="inter").bandwidth_bytes_per_s == pytest.approx(1e8)
    assert fit_link(timings[:9], level="inter") is None


def test_the_live_cluster_describes_all_devices_and_is_cached(tmp_path, monkeypatch):
    cluster = live_cluster(cache_dir=tmp_path, progress=False, sampling=QUICK)
    assert (cluster.num_nodes, cluster.devices_per_node, cluster.inter) == (1, 8, None)
    assert cluster.device.name == "cpu"
    assert cluster.device.memory_bytes > 0
    assert set(cluster.device.peak_flops_per_s) == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in cluster.device.peak_flops_per_s.values())
    assert cluster.device.memory_bandwidth_bytes_per_s > 0
    assert cluster.intra.bandwidth_bytes_per_s > 0
    assert "8 live devices" in cluster.source
    monkeypatch.setattr("galvatron_jax.profiler.bench.time_everywhere", None)
    assert live_cluster(cache_dir=tmp_path, progress=False, sampling=QUICK) == cluster


def test_a_single_device_has_no_links(tmp_path):
    cluster = live_cluster(jax.devices()[:1], cache_dir=tmp_path, progress=False, sampling=QUICK)
    assert cluster.num_devices == 1
    assert cluster.intra.latency_s == 0
