import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from galvatron_jax.cost.galvatron import (
    CONTEXT_BYTES,
    GalvatronProfile,
    degrees_of,
    ends_cost,
    global_buffer_bytes,
    in_flight,
    layer_cost,
    published_step_seconds,
    reshard_seconds,
    state_ratio,
    usable_bytes,
)
from galvatron_jax.errors import InputError
from galvatron_jax.spec import LayerStrategy, Plan
from galvatron_jax.spec.galvatron import Degrees
from galvatron_jax.spec.galvatron.reading import MB
from galvatron_jax.spec.mesh import mesh_shape
from galvatron_jax.spec.strategy import Remat, SequenceParallel

DATA = Path(__file__).parent.parent / "data" / "galvatron"
NONE, MEGATRON, ULYSSES = SequenceParallel.NONE, SequenceParallel.MEGATRON, SequenceParallel.ULYSSES
MS = 1e-3
GIB = 1024 * MB


@pytest.fixture(scope="module")
def profile():
    """Forward of a layer: 1 ms per example and 0.5 ms; 64 MB of parameters; messages of 1 MB per example."""
    return GalvatronProfile.load(DATA, model="toy", hardware_dir=DATA / "hardware")


def degrees(pp=1, group=1, kind=NONE, dp=1, zero=0, checkpoint=False):
    return Degrees(pp, group, kind, dp, zero, checkpoint)


class TestLayer:
    def test_data_parallelism_hides_its_reduction_and_slows_the_backward_down(self, profile):
        cost = layer_cost(profile, degrees(dp=8), microbatch=8, num_microbatches=1)
        assert cost.forward_s == pytest.approx(1.5 * MS)
        assert cost.backward_s == pytest.approx(3 * MS)
        # 2 * 7/8 of 32 MB at 160 MB/ms, a quarter of which shows.
        assert cost.synchronisation_s == pytest.approx(0.25 * 56 / 160 * MS)
        assert cost.static_bytes == 4 * 64 * MB
        assert cost.activation_bytes == 40 * MB
        assert cost.microbatch_s == pytest.approx(4.5 * MS)

    def test_a_reduction_longer_than_the_backward_shows_the_rest(self, profile):
        slow = replace(profile.hardware, allreduce_bytes_per_s={(8, True): 8e9})
        cost = layer_cost(replace(profile, hardware=slow), degrees(dp=8), microbatch=8, num_microbatches=1)
        assert cost.synchronisation_s == pytest.approx((56 / 8 - 3 + 0.25 * 3) * MS)

    def test_tensor_parallelism_with_zero3_and_recomputation(self, profile):
        strategy = degrees(group=4, kind=MEGATRON, dp=2, zero=3, checkpoint=True)
        cost = layer_cost(profile, strategy, microbatch=4, num_microbatches=2)
        compute, gather, reduce = 1.0, 0.05, 8 / 100
        assert cost.forward_s == pytest.approx((compute + 4 * gather + reduce / 2) * MS)
        assert cost.backward_s == pytest.approx((3 * compute + 5 * gather) * MS)
        assert cost.synchronisation_s == pytest.approx(0.25 * reduce * MS)
        assert cost.static_bytes == pytest.approx(4 * 16 * MB * (7 / 8 * 0.503 + 1 / 8))
        assert cost.activation_bytes == 2 * 8 / 4 * MB

    def test_ulysses_exchanges_and_keeps_whole_parameters(self, profile):
        cost = layer_cost(profile, degrees(group=4, kind=ULYSSES, dp=2, zero=2), microbatch=4, num_microbatches=2)
        exchange = 0.05
        assert cost.forward_s == pytest.approx((1.0 + 2 * exchange) * MS)
        assert cost.backward_s == pytest.approx((2.0 + 2 * exchange) * MS)
        # All eight devices repeat the parameters.
        assert cost.synchronisation_s == pytest.approx(0.25 * 56 / 160 * MS)
        assert cost.static_bytes == pytest.approx(4 * 64 * MB * (6 / 8 * 0.128 + 2 / 8))
        assert cost.activation_bytes == 2 * 10 * MB

    def test_ulysses_alone_reduces_nothing_there(self, profile):
        cost = layer_cost(profile, degrees(group=8, kind=ULYSSES), microbatch=1, num_microbatches=1)
        assert cost.synchronisation_s == 0

    def test_pipeline_transfers_are_spread_over_the_layers(self, profile):
        alone = layer_cost(profile, degrees(dp=2), microbatch=4, num_microbatches=4)
        staged = layer_cost(profile, degrees(pp=4, dp=2), microbatch=4, num_microbatches=4)
        # 4 stages * 2 ways * 2 MB at 50 MB/ms over 4 layers, half of it on each way.
        assert staged.forward_s - alone.forward_s == pytest.approx(16 / 50 / 4 / 2 * MS)
        assert staged.backward_s - alone.backward_s == pytest.approx(16 / 50 / 4 / 2 * MS)

    def test_sizes_between_measurements_lie_on_the_fit(self, profile):
        cost = layer_cost(profile, degrees(group=2, kind=MEGATRON), microbatch=3, num_microbatches=1)
        assert cost.forward_s == pytest.approx((1.5 + 0.5 + 4 * 0.5 * (0.02 + 0.01 * 3 * 2)) * MS)

    def test_one_measured_batch_scales_in_proportion(self, profile):
        only = replace(profile.computation.layers[0], seconds_per_example={4: 1 * MS})
        static = replace(profile, computation=replace(profile.computation, layers=(only,)))
        cost = layer_cost(static, degrees(group=2, kind=ULYSSES), microbatch=3, num_microbatches=1)
        assert cost.forward_s == pytest.approx((1.5 + 2 * 0.5 * (0.02 + 0.01 * 3 * 2)) * MS)

    def test_without_sequence_parallelism_the_kept_input_is_whole(self, profile):
        plain = replace(profile, memory=replace(profile.memory, sequence_parallel=False))
        cost = layer_cost(plain, degrees(group=4, checkpoint=True), microbatch=2, num_microbatches=1)
        assert cost.activation_bytes == 2 * 8 * MB


@pytest.mark.parametrize(
    ("zero", "num_microbatches", "mixed", "async_reduce", "expected"),
    [
        (0, 1, True, True, 1),
        (2, 1, True, True, 7 / 8 * 0.253 + 1 / 8),
        (3, 1, True, True, 0.253),
        (2, 2, True, True, 6 / 8 * 0.253 + 2 / 8),
        (3, 2, True, True, 7 / 8 * 0.253 + 1 / 8),
        (2, 2, True, False, (7 / 8 * 0.253 + 1 / 8) * 5 / 4),
        (3, 2, True, False, 0.253 * 5 / 4),
        (2, 1, False, True, 3 / 4 * 0.253 + 1 / 4),
        (3, 1, False, True, 0.253),
        (2, 2, False, True, 2 / 4 * 0.253 + 2 / 4),
        (3, 2, False, True, 3 / 4 * 0.253 + 1 / 4),
        (2, 2, False, False, 3 / 4 * 0.253 + 1 / 4),
        (3, 2, False, False, 0.253 * 5 / 4),
    ],
)
def test_states_under_zero_are_the_published_share(profile, zero, num_microbatches, mixed, async_reduce, expected):
    setting = replace(profile, mixed_precision=mixed, async_grad_reduce=async_reduce)
    ratio = state_ratio(setting, degrees(dp=4, zero=zero), num_microbatches=num_microbatches)
    assert ratio == pytest.approx(expected)


class TestEnds:
    def test_one_stage_holds_both(self, profile):
        strategy = degrees(group=2, kind=MEGATRON, dp=4)
        cost = ends_cost(profile, strategy, stage=0, microbatch=8, num_microbatches=2)
        compute, gather, comm = 3.0, 0.5 * (0.02 + 0.01 * 2 * 2), 200 / 4 / 2 / 100 * 3 / 4
        assert cost.forward_s == pytest.approx((compute + 2 * gather) * MS)
        assert cost.backward_s == pytest.approx(2 * compute * MS)
        # Communication runs at full speed and slows computation down.
        assert cost.synchronisation_s == pytest.approx((1 - 1 / 1.25) * comm / 2 * MS)
        assert cost.static_bytes == 200 * MB
        assert cost.activation_bytes == 2 * 40 * MB

    def test_first_and_last_stage_take_half_the_time_each(self, profile):
        strategy = degrees(pp=4, dp=2, zero=3)
        first, middle, _, last = (
            ends_cost(profile, strategy, stage=stage, microbatch=4, num_microbatches=4) for stage in range(4)
        )
        comm = 160 / 4 / 2 / 200 / 2
        assert first.forward_s == pytest.approx((2.5 + (1 - 1 / 1.25) * comm / 2) * MS)
        assert first.static_bytes == pytest.approx(160 * MB * (7 / 8 * 0.503 + 1 / 8))
        assert (middle.microbatch_s, middle.static_bytes) == (0, 0)
        assert last.activation_bytes == 2 * 64 * MB
        assert last.backward_s > first.backward_s

    def test_communication_beyond_the_computation_shows_whole(self, profile):
        slow = replace(profile.hardware, allreduce_bytes_per_s={(8, True): 1e9})
        cost = ends_cost(
            replace(profile, hardware=slow), degrees(dp=8, zero=3), stage=0, microbatch=8, num_microbatches=1
        )
        comm = 400 / 4 / 2 * 7 / 8
        assert cost.forward_s == pytest.approx(comm / 2 * MS)
        assert cost.synchronisation_s == pytest.approx(comm / 2 * MS)

    def test_a_profile_without_their_time_counts_none(self, profile):
        silent = replace(profile, computation=replace(profile.computation, other=None))
        assert ends_cost(silent, degrees(), stage=0, microbatch=1, num_microbatches=1).forward_s == 0


class TestStep:
    def test_in_flight_is_the_way_to_the_last_stage(self):
        assert [in_flight(4, stage) for stage in range(4)] == [4, 3, 2, 1]
        with pytest.raises(InputError, match="Stage 4 is none of 4 stages"):
            in_flight(4, 4)

    def test_budgets_above_twenty_gigabytes_lose_a_fifth(self):
        assert usable_bytes(20 * GIB) == 20 * GIB
        assert usable_bytes(21 * GIB) == 21 * GIB - 4300 * MB

    def test_the_buffer_holds_what_a_group_works_on(self, profile):
        size = {"microbatch": 8, "stage_devices": 4}
        assert global_buffer_bytes(profile, max_group=2, **size) == 4 * MB
        assert global_buffer_bytes(profile, max_group=None, **size) == 0

    def test_resharding_moves_bytes_at_the_measured_bandwidth(self, profile):
        before, after = degrees(group=2, kind=MEGATRON, dp=4), degrees(group=4, kind=MEGATRON, dp=2)
        expected = 3 / 4 * 4 * MB / 200e9
        assert reshard_seconds(profile, before, after, microbatch=8) == pytest.approx(expected)
        assert reshard_seconds(profile, after, before, microbatch=8) == pytest.approx(expected)
        assert reshard_seconds(profile, before, before, microbatch=8) == 0

    def test_the_reported_time_of_even_stages_is_the_pipelines(self, profile):
        layer = layer_cost(profile, degrees(pp=2), microbatch=1, num_microbatches=4)
        ends = ends_cost(profile, degrees(), stage=0, microbatch=1, num_microbatches=4)
        none = replace(ends, forward_s=0.0, backward_s=0.0)
        seconds = published_step_seconds([[layer], [layer]], [none, none], num_microbatches=4)
        assert seconds == pytest.approx(5 * layer.microbatch_s)

    def test_it_adds_synchronisation_that_sticks_out(self, profile):
        layer = layer_cost(profile, degrees(dp=8), microbatch=8, num_microbatches=1)
        none = replace(layer, forward_s=0.0, backward_s=0.0, synchronisation_s=0.0)
        seconds = published_step_seconds([[layer]], [none], num_microbatches=3)
        assert seconds == pytest.approx(3 * layer.microbatch_s + layer.synchronisation_s)


MESH = {"a": 2, "b": 2, "c": 2}


class TestStrategies:
    def test_layer_strategies_become_degrees(self):
        megatron = LayerStrategy(dp=("a",), tp=("b", "c"), sp=("b", "c"), sp_kind=MEGATRON, zero=3, remat=Remat.FULL)
        assert degrees_of(megatron, MESH, pp=2) == Degrees(2, 4, MEGATRON, 2, 3, True)
        ulysses = LayerStrategy(dp=("a", "b"), sp=("c",), sp_kind=ULYSSES)
        assert degrees_of(ulysses, MESH) == Degrees(1, 2, ULYSSES, 4, 0, False)
        assert degrees_of(LayerStrategy(dp=("a", "b", "c")), MESH) == Degrees(1, 1, NONE, 8, 0, False)

    @pytest.mark.parametrize(
        ("strategy", "why"),
        [
            (LayerStrategy(dp=("a", "b", "c"), zero=1), "ZeRO-1; it knows ZeRO 0, 2 and 3"),
            (LayerStrategy(dp=("a", "b", "c"), remat=Remat.DOTS), "recomputation of 'dots'; it knows none and full"),
            (LayerStrategy(dp=("a",), tp=("c",), sp=("b",), sp_kind=ULYSSES), "tensor parallelism beside Ulysses"),
            (LayerStrategy(dp=("a",)), "mesh axes that serve nothing"),
        ],
    )
    def test_what_the_formulas_do_not_know_is_refused(self, strategy, why):
        with pytest.raises(InputError, match=why):
            degrees_of(strategy, MESH)


class TestErrors:
    def test_batches_are_never_rounded_down(self, profile):
        with pytest.raises(InputError, match="A micro-batch of 12 examples does not divide over dp 8"):
            layer_cost(profile, degrees(dp=8), microbatch=12, num_microbatches=1)

    @pytest.mark.parametrize(
        ("strategy", "what"),
        [
            (degrees(group=16, kind=MEGATRON), "no allreduce times .* of groups of 16; it has 2, 4, 8"),
            (degrees(dp=3), "no all-reduce bandwidth of groups of 3 .consec 1.; it has 2 .consec 0., 2 .consec 1."),
            (degrees(pp=8), "no p2p bandwidth of 8 stages; it has 2, 4"),
            (degrees(dp=2, zero=1), "know ZeRO 0, 2 and 3, not 1"),
        ],
    )
    def test_what_was_not_measured_is_named(self, profile, strategy, what):
        dp = strategy.dp
        with pytest.raises(InputError, match=what):
            layer_cost(profile, strategy, microbatch=dp, num_microbatches=1)

    def test_a_missing_table_of_all_to_alls_is_named(self, profile):
        poor = replace(profile, hardware=replace(profile.hardware, alltoall_seconds={}))
        with pytest.raises(InputError, match="no all2all times .* of groups of 8; it has no group size"):
            layer_cost(poor, degrees(group=8, kind=ULYSSES), microbatch=1, num_microbatches=1)

    def test_memory_that_was_not_measured_is_named(self, profile):
        layer = replace(profile.memory.layers[0], activation_bytes={1: 1.0}, checkpoint_bytes=None)
        poor = replace(profile, memory=replace(profile.memory, layers=(layer,)))
        size = {"microbatch": 1, "num_microbatches": 1}
        with pytest.raises(InputError, match="no activations at degree 2; it has 1. Profile the model there"):
            layer_cost(poor, degrees(group=2, kind=MEGATRON), **size)
        with pytest.raises(InputError, match="no activations under recomputation"):
            layer_cost(poor, degrees(checkpoint=True), **size)
        ends = replace(profile.memory.whole, state_bytes={})
        poor = replace(profile, memory=replace(profile.memory, whole=ends))
        with pytest.raises(InputError, match="no states of embedding and head at tp 1; it has none"):
            ends_cost(poor, degrees(), stage=0, **size)

    def test_an_unmeasured_overlap_or_sequence_is_named(self, profile):
        poor = replace(profile, hardware=replace(profile.hardware, overlap_slowdown=None))
        with pytest.raises(InputError, match="has no overlap_coefficient.json"):
            layer_cost(poor, degrees(dp=2), microbatch=2, num_microbatches=1)
        sides = {"memory": profile.memory, "computation": profile.computation}
        poor = replace(profile, **{name: replace(side, sequence=None) for name, side in sides.items()})
        with pytest.raises(InputError, match="names no sequence length, on which the size of messages rests"):
            layer_cost(poor, degrees(group=2, kind=MEGATRON), microbatch=2, num_microbatches=1)

    def test_the_models_size_must_be_said(self, tmp_path):
        shutil.copytree(DATA / "toy", tmp_path / "toy")
        (tmp_path / "toy" / "config.json").unlink()
        with pytest.raises(InputError, match="Give `hidden_size` and `num_layers`"):
            GalvatronProfile.load(tmp_path, model="toy", hardware_dir=DATA / "hardware")
        profile = GalvatronProfile.load(
            tmp_path, model="toy", hardware_dir=DATA / "hardware", hidden_size=64, num_layers=2
        )
        assert (profile.hidden_size, profile.num_layers) == (64, 2)


PUBLISHED = Path(os.environ.get("GALVATRON_PROFILES", "/nonexistent"))
"""Holds `galvatron_profiles` and `galvatron_plans`, with what Hetu-Galvatron published and found for Llama-2-7B."""


def reported(profile, plan, division):
    """Step seconds and MB per stage as its search reports them: every layer rounded up to a whole MB."""
    mesh, pp, m = mesh_shape(plan.stage_mesh), plan.pipeline_degree, plan.num_microbatches
    batch = {"microbatch": plan.global_batch // m, "num_microbatches": m}
    end, *blocks, _ = (degrees_of(strategy, mesh, pp=pp) for strategy in plan.strategies)
    kinds = {strategy.kind for strategy in (end, *blocks)}
    shared = [strategy.group for strategy in (end, *blocks) if strategy.kind is not ULYSSES]
    buffer = global_buffer_bytes(
        profile,
        microbatch=batch["microbatch"],
        stage_devices=math.prod(mesh.values()),
        max_group=None if ULYSSES in kinds and MEGATRON not in kinds else max(shared),
    )
    layers, ends, memory = [], [], []
    for stage, count in enumerate(division):
        start = sum(division[:stage])
        costs = [layer_cost(profile, block, **batch) for block in blocks[start : start + count]]
        embedding = ends_cost(profile, end, stage=stage, **batch)
        layers.append(costs)
        ends.append(embedding)
        held = in_flight(pp, stage)
        used = sum(math.ceil((c.static_bytes + held * c.activation_bytes) / MB) for c in costs)
        used += math.ceil((embedding.static_bytes + held * embedding.activation_bytes + CONTEXT_BYTES) / MB)
        memory.append(used + int(buffer / MB))
    return published_step_seconds(layers, ends, num_microbatches=m), memory


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="GALVATRON_PROFILES names no folder")
@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("galvatron_plans/*.json")), ids=lambda path: path.stem)
def test_its_own_figures_come_out(path):
    profile = GalvatronProfile.load(PUBLISHED / "galvatron_profiles", model="llama2-7b")
    figures = json.loads(path.read_text())
    seconds, memory = reported(profile, Plan.from_galvatron(path), figures["pp_division"])
    budget = figures["mem_gb"] * GIB
    memory = [used + (budget - usable_bytes(budget)) // MB for used in memory]
    print(f"{path.stem}: {seconds:.4f} s of {figures['time_cost_s']:.4f} s, {memory} MB of {figures['mem_used_mb']} MB")
    assert seconds == pytest.approx(figures["time_cost_s"], rel=1e-9)
    assert memory == figures["mem_used_mb"]
