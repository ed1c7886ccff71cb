"""Seconds of computation: roofline, measured curves, and scaling where nothing was measured."""

import pytest

from galvatron_jax.cost.compute import ProfiledCompute, Roofline, compute_dtype, local_shape
from galvatron_jax.spec.profile import LayerTiming, LocalShape, Profile, Provenance, Timing
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel
from tests.search.fake import FakePlanner, cluster, toy_model

MODEL = toy_model(1)
BLOCK = MODEL.kinds[1]
MESH = {"a": 2, "b": 2}


def timing(batch: int, forward: float, *, tp: int = 1, remat: Remat = Remat.NONE) -> LayerTiming:
    return LayerTiming(
        kind="block",
        shape=LocalShape(batch=batch, tp=tp),
        remat=remat,
        forward=Timing(median_s=forward),
        backward=Timing(median_s=2 * forward),
    )


def priced(strategy: LayerStrategy, microbatch: int, *timings: LayerTiming):
    profile = Profile(
        provenance=Provenance.MEASURED,
        device="toy",
        num_devices=4,
        model_fingerprint="toy",
        layers=timings,
        collectives=(),
    )
    planner = FakePlanner()
    compute = ProfiledCompute(profile, Roofline(cluster().device), planner, MODEL.microbatch)
    plan = planner.plan_layer(BLOCK, strategy, mesh=MESH, microbatch=microbatch, model_microbatch=MODEL.microbatch)
    shape = local_shape(strategy, mesh=MESH, microbatch=microbatch)
    return compute.layer(BLOCK, plan, strategy=strategy, shape=shape)


def test_the_roofline_takes_the_larger_of_flops_and_bytes() -> None:
    plan = FakePlanner().plan_layer(BLOCK, LayerStrategy(), mesh={}, microbatch=8, model_microbatch=8)
    roofline = Roofline(cluster().device)
    found = roofline.layer(BLOCK, plan, strategy=LayerStrategy(), shape=LocalShape(batch=8))
    assert found.forward_s == pytest.approx(plan.forward.flops / 0.5e12)
    assert found.estimated


def test_a_program_without_flops_counts_as_float32() -> None:
    assert compute_dtype(BLOCK) == "float32"


def test_measured_times_are_linear_between_local_batches() -> None:
    found = priced(LayerStrategy(dp=("a",)), 12, timing(4, 1.0), timing(8, 3.0))
    assert (found.forward_s, found.backward_s, found.estimated) == (2.0, 4.0, False)


def test_a_batch_beyond_the_measurements_is_scaled_and_flagged() -> None:
    found = priced(LayerStrategy(), 16, timing(4, 1.0), timing(8, 3.0))
    assert found.estimated
    assert found.forward_s == pytest.approx(6.0)


def test_a_degree_that_was_not_measured_is_scaled_from_the_nearest() -> None:
    strategy = LayerStrategy(tp=("a", "b"))
    found = priced(strategy, 8, timing(8, 4.0), timing(8, 2.0, tp=2))
    assert found.estimated
    assert found.forward_s == pytest.approx(1.0)


def test_remat_that_was_not_measured_keeps_forward_and_lengthens_backward() -> None:
    found = priced(LayerStrategy(remat=Remat.FULL), 8, timing(8, 4.0))
    assert found.forward_s == pytest.approx(4.0)
    assert found.backward_s == pytest.approx(8.0 * 3.0 / 2.0)


def test_remat_that_was_measured_once_grows_with_the_batch_as_without() -> None:
    strategy, again = LayerStrategy(remat=Remat.FULL), timing(16, 60.0, remat=Remat.FULL)
    plain = [timing(4, 10.0), timing(8, 20.0), timing(16, 50.0)]  # A cache that 16 do not fit in.
    found = priced(strategy, 8, *plain, again)
    assert found.estimated
    assert (found.forward_s, found.backward_s) == pytest.approx((24.0, 48.0))
    # Beyond what was measured without, its roofline says how it grows.
    assert priced(strategy, 8, *plain[2:], again).forward_s == pytest.approx(30.0)


def test_a_kind_that_was_not_measured_takes_the_roofline() -> None:
    other = LayerTiming(**{**dict(timing(8, 4.0)), "kind": "other"})
    assert priced(LayerStrategy(), 8, other).forward_s < 1e-3


def test_the_local_shape_follows_the_strategy() -> None:
    ulysses = LayerStrategy(dp=("a",), sp=("b",), sp_kind=SequenceParallel.ULYSSES)
    shape = local_shape(ulysses, mesh=MESH, microbatch=8)
    assert (shape.batch, shape.tp, shape.sp, shape.sp_kind) == (4, 1, 2, SequenceParallel.ULYSSES)
