"""What the comparison with Hetu-Galvatron rests on: the schedule without a common tick, prices of plans, the search."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.parts.galvatron_plans import DegreesPlan, price
from benchmarks.parts.galvatron_search import pipeline, search, settings, strategies
from benchmarks.parts.one_f_one_b import order, step_seconds
from galvatron_jax.cost.galvatron import GalvatronProfile, usable_bytes
from galvatron_jax.cost.schedules import makespan, tick_kinds
from galvatron_jax.errors import InfeasibleError
from galvatron_jax.spec.galvatron import Degrees
from galvatron_jax.spec.galvatron.reading import MB
from galvatron_jax.spec.plan import Plan, Schedule
from galvatron_jax.spec.strategy import SequenceParallel

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "galvatron"
NONE, MEGATRON, ULYSSES = SequenceParallel.NONE, SequenceParallel.MEGATRON, SequenceParallel.ULYSSES
MS = 1e-3


@pytest.fixture(scope="module")
def profile() -> GalvatronProfile:
    """Four layers; forward of each: 1 ms per example and 0.5 ms; 64 MB of parameters."""
    return GalvatronProfile.load(DATA, model="toy", hardware_dir=DATA / "hardware")


class TestOneFOneB:
    def test_stages_begin_with_as_many_forwards_as_stages_follow(self) -> None:
        orders = [order(stage, num_stages=3, num_microbatches=3) for stage in range(3)]
        words = ["".join(f"{'FB'[backward]}{microbatch}" for backward, microbatch in each) for each in orders]
        assert words == ["F0F1F2B0B1B2", "F0F1B0F2B1B2", "F0B0F1B1F2B2"]

    @given(stages=st.integers(1, 8), count=st.integers(1, 20))
    def test_a_stage_holds_as_many_micro_batches_as_stages_are_left(self, stages: int, count: int) -> None:
        for stage in range(stages):
            steps = [-1 if backward else 1 for backward, _ in order(stage, num_stages=stages, num_microbatches=count)]
            assert max(itertools.accumulate(steps)) == min(count, stages - stage)
            assert sum(steps) == 0

    @pytest.mark.parametrize(
        ("forward", "backward", "count", "seconds"),
        [
            ([2.0], [3.0], 4, 20.0),
            ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 1, 6.0),
            # The second stage works from 1 to 13, then the first one's last backward.
            ([1.0, 3.0], [1.0, 3.0], 2, 14.0),
            # The first stage never waits.
            ([3.0, 1.0], [3.0, 1.0], 2, 12.0),
            # F0 0-1, F1 1-2 | F0 1-3, B0 3-4, F1 4-6, B1 6-7 | B0 4-9, B1 9-14.
            ([1.0, 2.0], [5.0, 1.0], 2, 14.0),
        ],
    )
    def test_small_cases_take_what_they_take_by_hand(
        self, forward: list[float], backward: list[float], count: int, seconds: float
    ) -> None:
        assert step_seconds(forward, backward, [0.0] * len(forward), num_microbatches=count) == seconds

    @pytest.mark.parametrize(("stages", "count"), [(1, 3), (2, 1), (2, 8), (4, 4), (4, 32), (8, 8)])
    def test_equal_stages_take_the_closed_form(self, stages: int, count: int) -> None:
        found = step_seconds([1.0] * stages, [2.0] * stages, [0.0] * stages, num_microbatches=count)
        assert found == (count + stages - 1) * 3.0

    def test_what_follows_the_last_backward_hides_behind_that_of_earlier_stages(self) -> None:
        seconds = [step_seconds([1.0, 1.0], [1.0, 1.0], [0.0, once], num_microbatches=1) for once in (0.5, 2.0)]
        assert seconds == [4.0, 5.0]

    @given(data=st.data(), stages=st.integers(2, 6))
    def test_it_is_no_slower_than_in_lockstep_and_no_faster_than_its_busiest_stage(
        self, data: st.DataObject, stages: int
    ) -> None:
        count = data.draw(st.integers(stages, 12))
        times = st.lists(st.integers(0, 20).map(float), min_size=stages, max_size=stages)
        forward, backward = data.draw(times), data.draw(times)
        found = step_seconds(forward, backward, [0.0] * stages, num_microbatches=count)
        kinds = tick_kinds(Schedule.ONE_F_ONE_B_STASH, num_stages=stages, num_microbatches=count)
        assert found <= makespan(kinds, forward, backward)
        assert found >= max(sum(forward) + sum(backward), count * float(np.add(forward, backward).max()))


def one_stage(*blocks: Degrees, ends: Degrees, count: int = 1) -> DegreesPlan:
    return DegreesPlan(8 * count, count, ends, ends, (blocks,))


class TestPrices:
    def test_one_stage_takes_the_sum_of_its_parts(self, profile: GalvatronProfile) -> None:
        plain = Degrees(1, 1, NONE, 8, 0, checkpoint=False)
        priced = price(profile, one_stage(*[plain] * 4, ends=plain, count=2))
        # Four layers of 4.5 ms and 9 ms for the ends, twice; and what shows of reducing gradients.
        once = 4 * 0.25 * 56 / 160 + (1 - 1 / 1.25) * 0.5 * 50 / 160 * 7 / 8
        assert priced.lockstep_s == pytest.approx((2 * (4 * 4.5 + 9) + once) * MS)
        assert priced.asynchronous_s == pytest.approx(priced.lockstep_s)
        assert priced.stage_bytes == ((4 * (256 + 40) + 400 + 80 + 1024) * MB,)

    def test_tensor_parallelism_anywhere_takes_one_buffer_everywhere(self, profile: GalvatronProfile) -> None:
        plain, shared = Degrees(2, 1, NONE, 4, 2, False), Degrees(2, 2, MEGATRON, 2, 2, False)
        without = DegreesPlan(32, 4, plain, plain, ((plain, plain), (plain, plain)))
        held = [price(profile, plan).stage_bytes for plan in (without, replace(without, head=shared))]
        # A group of two works on 4 of 8 examples, 1 MB each.
        assert held[1][0] - held[0][0] == 4 * MB

    def test_neighbours_that_unlike_groups_share_move_activations_both_ways(self, profile: GalvatronProfile) -> None:
        narrow, wide = Degrees(1, 2, MEGATRON, 4, 2, False), Degrees(1, 4, MEGATRON, 2, 2, False)
        apart = one_stage(narrow, narrow, wide, wide, ends=wide)
        mixed = one_stage(narrow, wide, narrow, wide, ends=wide)
        # 3/4 of 4 examples' activations at 200 GB/s; two boundaries more.
        added = price(profile, mixed).lockstep_s - price(profile, apart).lockstep_s
        assert added == pytest.approx(2 * 2 * 3 / 4 * 4 * MB / 200e9)

    def test_imported_plans_keep_their_stages(self, profile: GalvatronProfile) -> None:
        plan = DegreesPlan.of(Plan.from_galvatron(DATA / "plans" / "toy_8gpu_16GB_batch32.json"))
        assert plan.describe() == ("4 micro-batches: 1 x 2-1-4-c | 1 x 2-2*-2f, 1 x 2-4*-1, 1 x 2-4-1-sp; ends 2-2*-2f")
        assert plan.largest_group == 4
        priced = price(profile, plan)
        assert len(priced.stage_bytes) == 2
        assert priced.asynchronous_s <= priced.lockstep_s


def every_plan(profile: GalvatronProfile, *, num_devices: int, global_batch: int):
    """Every plan for two layers."""
    for pp, count in itertools.product((1, 2), (1, 2, 4)):
        if count < pp or global_batch % count:
            continue
        size = {"pp": pp, "stage_devices": num_devices // pp, "microbatch": global_batch // count}
        blocks = list(strategies(profile, **size))
        ends = [degrees for degrees in blocks if not degrees.checkpoint]
        for first, second, embedding in itertools.product(blocks, blocks, ends):
            for head in ends if pp > 1 else [embedding]:
                stages = ((first,), (second,)) if pp > 1 else ((first, second),)
                yield DegreesPlan(global_batch, count, embedding, head, stages)


class TestSearch:
    def test_eight_devices_have_its_fifty_strategies(self, profile: GalvatronProfile) -> None:
        every = [
            {d for s in settings(whole, num_devices=8, global_batch=64) if s.pp == pp for d in s.blocks.degrees}
            for whole in [replace(profile, num_layers=8, hardware=with_transfers(profile, 8))]
            for pp in (1, 2, 4, 8)
        ]
        assert [len(each) for each in every] == [24, 16, 8, 2]

    def test_it_finds_the_brute_force_optimum_of_every_budget(self, profile: GalvatronProfile) -> None:
        small = replace(profile, num_layers=2)
        priced = [(price(small, plan), plan) for plan in every_plan(small, num_devices=4, global_batch=4)]
        needed = sorted({max(each.stage_bytes) for each, _ in priced})
        seconds = []
        for budget in needed[:: max(1, len(needed) // 12)]:
            fitting = [each for each, _ in priced if max(each.stage_bytes) <= budget]
            found = search(small, num_devices=4, global_batch=4, usable_bytes=budget)
            assert found.seconds == pytest.approx(min(each.lockstep_s for each in fitting), rel=1e-9)
            assert found.bound_s == pytest.approx(found.seconds)
            seconds.append(found.seconds)
        assert seconds == sorted(seconds, reverse=True)
        assert len(set(seconds)) > 3

    def test_what_it_finds_costs_what_it_says(self, profile: GalvatronProfile) -> None:
        found = search(profile, num_devices=8, global_batch=32, usable_bytes=2000 * MB)
        priced = price(profile, found.plan)
        assert priced.lockstep_s == pytest.approx(found.seconds)
        assert max(priced.stage_bytes) <= 2000 * MB

    def test_nothing_that_fits_is_said(self, profile: GalvatronProfile) -> None:
        with pytest.raises(InfeasibleError, match="No plan for 32 examples on 8 devices fits 1000.00 MiB of each"):
            search(profile, num_devices=8, global_batch=32, usable_bytes=1000 * MB)

    def test_stages_hold_the_micro_batches_of_its_rule(self, profile: GalvatronProfile) -> None:
        made = [pipeline(s) for s in settings(profile, num_devices=8, global_batch=32) if s.pp == 4]
        assert {problem.in_flight for problem in made} == {(4, 3, 2, 1)}


def with_transfers(profile: GalvatronProfile, pp: int):
    known = profile.hardware.p2p_bytes_per_s
    return replace(profile.hardware, p2p_bytes_per_s={**known, pp: min(known.values())})


PUBLISHED = Path(os.environ.get("GALVATRON_PROFILES", "/nonexistent"))
"""Holds `galvatron_profiles` and `galvatron_plans`, with what Hetu-Galvatron published and found for Llama-2-7B."""


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="GALVATRON_PROFILES names no folder")
@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("galvatron_plans/*.json")), ids=lambda path: path.stem)
def test_ours_is_at_least_as_fast_as_each_published_plan(path: Path) -> None:
    profile = GalvatronProfile.load(PUBLISHED / "galvatron_profiles", model="llama2-7b")
    usable = usable_bytes(json.loads(path.read_text())["mem_gb"] * 1024 * MB)
    theirs = DegreesPlan.of(Plan.from_galvatron(path))
    found = search(profile, num_devices=8, global_batch=theirs.global_batch, usable_bytes=usable)
    before, after = price(profile, theirs), price(profile, found.plan)
    assert max(*before.stage_bytes, *after.stage_bytes) <= usable
    assert after.lockstep_s <= before.lockstep_s * (1 + 1e-9)
    assert after.asynchronous_s <= before.asynchronous_s * (1 + 1e-9)


def run_script(*options: str) -> subprocess.CompletedProcess:
    script = ROOT / "benchmarks" / "search_vs_galvatron.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, env=environment)


class TestScript:
    def test_it_prints_a_row_per_plan_and_one_object(self) -> None:
        done = run_script("--profiles", str(DATA), "--plans", str(DATA / "plans"), "--model", "toy", "--json")
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout.splitlines()[-1])
        assert [row["memory_gb"] for row in record["results"]] == [16, 16]
        assert all(row["faster_lockstep"] >= 1 for row in record["results"])
        assert "16 GB, ours (the optimum): " in done.stdout

    def test_missing_folders_are_named(self, tmp_path: Path) -> None:
        done = run_script("--profiles", str(tmp_path / "none"), "--plans", str(DATA / "plans"))
        assert done.returncode == 2
        assert f"argument --profiles: {tmp_path / 'none'}: no such folder" in done.stderr

    def test_missing_plans_and_profiles_are_named(self, tmp_path: Path) -> None:
        done = run_script("--profiles", str(DATA), "--plans", str(tmp_path), "--model", "toy")
        assert done.returncode == 1
        assert "holds no plans. Expected files that name their memory" in done.stderr
        done = run_script("--profiles", str(tmp_path), "--plans", str(DATA / "plans"), "--model", "toy")
        assert done.returncode == 1
        assert "no such folder of Hetu-Galvatron profiles" in done.stderr
