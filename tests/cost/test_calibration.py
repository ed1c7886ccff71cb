"""Measured steps correct the numbers that predicted them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.cost.calibration import calibrated_cluster, calibrated_profile, fit_factors
from galvatron_jax.cost.derive import derive_profile
from galvatron_jax.errors import InputError
from galvatron_jax.spec.plan import MemoryBreakdown, Prediction, TimeBreakdown
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.profile import LayerTiming, LocalShape, Timing
from galvatron_jax.spec.run import Run
from galvatron_jax.spec.strategy import Remat
from tests.spec import samples

MEMORY = MemoryBreakdown(
    total_bytes=1, parameter_bytes=1, optimizer_bytes=0, gradient_bytes=0, residual_bytes=0, workspace_bytes=0
)


def run(step_s: float, *, compute: float, communication: float, update: float, bubble: float = 0.0) -> Run:
    total = compute + communication + update + bubble
    time = TimeBreakdown(
        step_s=total,
        compute_s=compute,
        communication_s=communication,
        synchronisation_s=0.0,
        update_s=update,
        bubble_s=bubble,
    )
    return Run(
        model="m",
        model_fingerprint="f",
        device="cpu",
        num_devices=8,
        global_batch=8,
        step_s=step_s,
        step_spread_s=0.0,
        steps=10,
        prediction=Prediction(time=time, memory=(MEMORY,)),
        date="2026-01-01T00:00:00+00:00",
    )


@settings(deadline=None)
@given(factor=st.floats(0.1, 10), compute=st.floats(0.01, 1), communication=st.floats(0, 1), update=st.floats(0, 1))
def test_one_run_scales_all_parts_alike(factor, compute, communication, update):
    total = compute + communication + update
    found = fit_factors([run(factor * total, compute=compute, communication=communication, update=update)])
    assert found.compute == pytest.approx(factor, rel=1e-6)
    assert found.communication == pytest.approx(factor, rel=1e-6)
    assert found.error_after == pytest.approx(0, abs=1e-6)
    assert found.error_before == pytest.approx(abs(1 / factor - 1), rel=1e-6)


@settings(deadline=None)
@given(slower=st.floats(0.5, 3), wider=st.floats(0.5, 3))
def test_unlike_runs_tell_computation_from_communication(slower, wider):
    parts = [(1.0, 0.02), (0.8, 0.4), (0.3, 1.0)]
    runs = [run(slower * c + wider * n, compute=c, communication=n, update=0.0) for c, n in parts]
    found = fit_factors(runs)
    assert found.compute == pytest.approx(slower, rel=0.02)
    assert found.communication == pytest.approx(wider, rel=0.02)
    assert found.error_after < 0.01


def test_waiting_in_a_pipeline_follows_the_work_it_waits_for():
    pipeline = run(2.0 * 3.0, compute=2.0, communication=0.0, update=0.0, bubble=1.0)
    assert fit_factors([pipeline, pipeline]).compute == pytest.approx(2.0)


def test_documents_are_scaled_part_by_part():
    cluster, factors = cluster_preset("h100x16"), fit_factors([run(3.0, compute=1.0, communication=0.5, update=0.0)])
    model = samples.model_spec(2)
    timing = Timing(median_s=1.0, spread_s=0.1)
    layer = LayerTiming(kind="k", shape=LocalShape(batch=1), remat=Remat.NONE, forward=timing, backward=timing)
    profile = derive_profile(model, cluster).model_copy(update={"layers": (layer,)})
    new, fabric = calibrated_profile(profile, factors), calibrated_cluster(cluster, factors)
    assert new.layers[0].forward.median_s == pytest.approx(factors.compute)
    assert new.layers[0].backward.spread_s == pytest.approx(0.1 * factors.compute)
    for before, after in zip(profile.collectives, new.collectives, strict=True):
        assert after.timing.median_s == pytest.approx(before.timing.median_s * factors.communication)
    assert new.update_bytes_per_s == pytest.approx(profile.update_bytes_per_s / factors.update)
    assert fabric.inter.bandwidth_bytes_per_s == pytest.approx(cluster.inter.bandwidth_bytes_per_s / 2)
    assert fabric.intra.latency_s == pytest.approx(cluster.intra.latency_s * 2)
    assert fabric.device.memory_bytes == cluster.device.memory_bytes


def test_runs_without_predictions_are_refused():
    with pytest.raises(InputError, match="no run to calibrate by"):
        fit_factors([])
    with pytest.raises(InputError, match="Runs of m hold no prediction"):
        fit_factors([run(1.0, compute=1.0, communication=0.0, update=0.0).model_copy(update={"prediction": None})])
