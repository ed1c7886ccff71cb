"""Schedule tables: invariants, formulas, and one makespan however it is computed."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_jax.cost.schedule_checks import check_table
from galvatron_jax.cost.schedules import (
    IDLE,
    ScheduleTable,
    TickKinds,
    bubble_share,
    in_flight,
    make_table,
    makespan,
    simulate,
    slots,
    tick_kinds,
)
from galvatron_jax.errors import InputError
from galvatron_jax.spec.plan import Schedule

PIPELINES = [schedule for schedule in Schedule if schedule is not Schedule.NONE]
ONE_F_ONE_B = [Schedule.ONE_F_ONE_B, Schedule.ONE_F_ONE_B_STASH]


@st.composite
def cases(draw: st.DrawFn) -> dict:
    schedule = draw(st.sampled_from(Schedule))
    return {
        "schedule": schedule,
        "num_stages": 1 if schedule is Schedule.NONE else draw(st.integers(2, 8)),
        "num_microbatches": draw(st.integers(1, 24)),
        "num_chunks": draw(st.integers(2, 4)) if schedule is Schedule.INTERLEAVED else 1,
    }


def random_times(case: dict, seed: int) -> np.ndarray:
    """Forward and backward seconds, float64[2, virtual stages], a tenth of them zero."""
    generator = np.random.default_rng(seed)
    times = generator.exponential(size=(2, case["num_stages"] * case["num_chunks"]))
    return times * (generator.random(times.shape) > 0.1)


def folded(table: ScheduleTable) -> dict[bytes, int]:
    """How often each tick occurs, by who works in it."""
    ticks: dict[bytes, int] = {}
    for tick in range(table.num_ticks):
        work = np.zeros((2, table.num_virtual_stages), bool)
        for way, stages in enumerate((table.forward_stage[tick], table.backward_stage[tick])):
            work[way, stages[stages != IDLE]] = True
        ticks[work.tobytes()] = ticks.get(work.tobytes(), 0) + 1
    return ticks


def as_dict(kinds: TickKinds) -> dict[bytes, int]:
    work = np.stack([kinds.forward, kinds.backward], axis=1)
    return {row.tobytes(): int(count) for row, count in zip(work, kinds.count, strict=True)}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_every_table_keeps_its_invariants(case: dict) -> None:
    check_table(make_table(**case))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 2**32 - 1))
def test_the_makespan_of_folded_ticks_equals_the_simulation(case: dict, seed: int) -> None:
    times = random_times(case, seed)
    timeline = simulate(make_table(**case), *times)
    assert makespan(tick_kinds(**case), *times) == pytest.approx(timeline.total_s, rel=1e-12)
    assert all(task.end_s <= timeline.total_s for task in timeline.tasks)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_tick_kinds_are_the_ticks_of_the_whole_table(case: dict) -> None:
    kinds, ticks = tick_kinds(**case), folded(make_table(**case))
    assert as_dict(kinds) == ticks
    assert len(kinds.count) == len(ticks)


@pytest.mark.parametrize("schedule", PIPELINES)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(4, 64), (3, 50), (8, 71)])
def test_tick_kinds_fold_long_schedules(schedule: Schedule, num_stages: int, num_microbatches: int) -> None:
    num_chunks = 3 if schedule is Schedule.INTERLEAVED else 1
    case = {"num_stages": num_stages, "num_microbatches": num_microbatches, "num_chunks": num_chunks}
    assert as_dict(tick_kinds(schedule, **case)) == folded(make_table(schedule, **case))


@pytest.mark.parametrize("schedule", [Schedule.GPIPE, *ONE_F_ONE_B])
def test_the_number_of_kinds_does_not_grow_with_microbatches(schedule: Schedule) -> None:
    few = tick_kinds(schedule, num_stages=16, num_microbatches=64)
    many = tick_kinds(schedule, num_stages=16, num_microbatches=100_000)
    assert len(few.count) == len(many.count) <= 4 * 16
    assert many.count.sum() - few.count.sum() == (100_000 - 64) * (2 if schedule is Schedule.GPIPE else 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(ONE_F_ONE_B), st.integers(2, 8), st.integers(1, 24))
def test_1f1b_follows_its_formula(schedule: Schedule, num_stages: int, num_microbatches: int) -> None:
    table = make_table(schedule, num_stages=num_stages, num_microbatches=num_microbatches)
    assert table.num_ticks == num_microbatches + 2 * (num_stages - 1)
    for tick in range(table.num_ticks):
        for group in range(num_stages):
            forward, backward = tick - group, tick - 2 * (num_stages - 1) + group
            alone = schedule is Schedule.ONE_F_ONE_B and group == num_stages - 1
            runs = 0 <= forward < num_microbatches and not alone
            assert table.forward_microbatch[tick, group] == (forward if runs else IDLE)
            assert table.backward_microbatch[tick, group] == (backward if 0 <= backward < num_microbatches else IDLE)
    held = tuple(min(num_microbatches, 2 * (num_stages - 1 - i) + 1) for i in range(num_stages))
    assert slots(table) == held == in_flight(schedule, num_stages=num_stages, num_microbatches=num_microbatches)


def test_1f1b_slots_go_round_in_a_ring() -> None:
    table = make_table(Schedule.ONE_F_ONE_B, num_stages=4, num_microbatches=20)
    slot = table.forward_slot[:, 1]
    assert slot[slot != IDLE].tolist() == [microbatch % 5 for microbatch in range(20)]


@pytest.mark.parametrize("num_microbatches", [1, 3, 8])
def test_gpipe_does_all_forwards_before_any_backward(num_microbatches: int) -> None:
    table = make_table(Schedule.GPIPE, num_stages=3, num_microbatches=num_microbatches)
    done = num_microbatches + 3 - 1
    assert (table.backward_stage[:done] == IDLE).all()
    assert (table.forward_stage[done:] == IDLE).all()
    assert table.num_ticks == 2 * done
    assert slots(table) == (num_microbatches,) * 3


@pytest.mark.parametrize("schedule", PIPELINES)
def test_phases_are_all_ticks_in_order_and_hold_all_work(schedule: Schedule) -> None:
    chunks = 2 if schedule is Schedule.INTERLEAVED else 1
    table = make_table(schedule, num_stages=3, num_microbatches=6, num_chunks=chunks)
    assert [phase.start for phase in table.phases] == [0, *(phase.stop for phase in table.phases[:-1])]
    assert table.phases[-1].stop == table.num_ticks
    for phase in table.phases:
        for way in ("forward", "backward"):
            at_work = getattr(table, f"{way}_stage")[phase.start : phase.stop] != IDLE
            assert at_work.any() == (way in phase.ways)
    assert (len(table.phases) == 2) == (schedule is Schedule.GPIPE)
    assert table.ticks("forward") == table.ticks("backward") == table.num_ticks // len(table.phases)


def test_one_stage_does_forward_and_backward_of_a_microbatch_in_a_tick() -> None:
    table = make_table(Schedule.NONE, num_stages=1, num_microbatches=5)
    assert table.forward_microbatch[:, 0].tolist() == table.backward_microbatch[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert slots(table) == in_flight(Schedule.NONE, num_stages=1, num_microbatches=5) == (1,)
    assert makespan(tick_kinds(Schedule.NONE, num_stages=1, num_microbatches=5), [1.0], [2.0]) == 15.0


@pytest.mark.parametrize("schedule", [Schedule.GPIPE, Schedule.ONE_F_ONE_B_STASH])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 2), (4, 8), (3, 7), (8, 64)])
def test_equal_stages_take_m_plus_pp_minus_one_rounds(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    case = {"num_stages": num_stages, "num_microbatches": num_microbatches}
    times = np.full(num_stages, 0.5), np.full(num_stages, 1.5)
    rounds = num_microbatches + num_stages - 1
    assert makespan(tick_kinds(schedule, **case), *times) == pytest.approx(rounds * 2.0)
    share = (num_stages - 1) / rounds
    assert bubble_share(simulate(make_table(schedule, **case), *times)) == pytest.approx(share)


def test_interleaving_shrinks_the_bubble() -> None:
    """Without a bubble it would take 32 units. The values are those of an independently written simulator."""
    seconds = {}
    for num_chunks in (1, 2, 4):
        schedule = Schedule.ONE_F_ONE_B if num_chunks == 1 else Schedule.INTERLEAVED
        kinds = tick_kinds(schedule, num_stages=4, num_microbatches=8, num_chunks=num_chunks)
        chunk = np.full(4 * num_chunks, 1.0 / num_chunks)
        seconds[num_chunks] = makespan(kinds, chunk, 3 * chunk)
    assert seconds == pytest.approx({1: 42.0, 2: 37.0, 4: 34.5})


def test_interleaving_holds_as_many_inputs_as_measured() -> None:
    table = make_table(Schedule.INTERLEAVED, num_stages=4, num_microbatches=8, num_chunks=2)
    assert slots(table) == (11, 9, 7, 5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 2**32 - 1))
def test_makespans_of_many_candidates_equal_those_of_each(case: dict, seed: int) -> None:
    kinds = tick_kinds(**case)
    many = np.stack([random_times(case, seed + index) for index in range(6)]).reshape(3, 2, 2, -1)
    forward, backward = many[:, :, 0], many[:, :, 1]
    together = makespan(kinds, forward, backward)
    assert isinstance(together, np.ndarray)
    alone = [[makespan(kinds, forward[i, j], backward[i, j]) for j in range(2)] for i in range(3)]
    np.testing.assert_array_equal(together, alone)


def test_makespans_in_blocks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = tick_kinds(Schedule.INTERLEAVED, num_stages=3, num_microbatches=7, num_chunks=2)
    forward, backward = np.random.default_rng(0).random((2, 40, 6))
    whole = makespan(kinds, forward, backward)
    monkeypatch.setattr("galvatron_jax.cost.schedules._BLOCK", 3 * kinds.forward_stage.size)
    np.testing.assert_array_equal(makespan(kinds, forward, backward), whole)


def test_large_tables_keep_their_invariants() -> None:
    table = make_table(Schedule.ONE_F_ONE_B, num_stages=64, num_microbatches=1024)
    assert table.num_ticks == 1024 + 126
    assert slots(table) == tuple(2 * (63 - stage) + 1 for stage in range(64))


def test_tables_are_read_only_and_shared() -> None:
    table = make_table(Schedule.GPIPE, num_stages=2, num_microbatches=3)
    assert make_table(Schedule.GPIPE, num_stages=2, num_microbatches=3) is table
    with pytest.raises(ValueError, match="read-only"):
        table.forward_slot[0, 0] = 5


def changed(table: ScheduleTable, name: str, where: tuple[int, int], value: int) -> ScheduleTable:
    values = getattr(table, name).copy()
    values[where] = value
    return replace(table, **{name: values})


@pytest.mark.parametrize(
    ("name", "where", "value", "fault"),
    [
        ("forward_microbatch", (1, 0), 0, "the forward of stage 0 and micro-batch 0 has run before, in tick 0"),
        ("forward_microbatch", (1, 0), 9, "the forward of stage 0 and micro-batch 9 does not exist"),
        ("forward_stage", (1, 0), 1, "lies on group 1"),
        ("forward_slot", (1, 0), 0, "Tick 1, group 0: slot 0 still holds (0, 0)"),
        ("backward_slot", (4, 0), 3, "slot 3 does not hold (0, 0)"),
        ("backward_stage", (4, 0), IDLE, "differ in where they are idle"),
    ],
)
def test_a_broken_table_is_found_out(name: str, where: tuple[int, int], value: int, fault: str) -> None:
    table = make_table(Schedule.ONE_F_ONE_B_STASH, num_stages=3, num_microbatches=4)
    with pytest.raises(ValueError, match=re.escape(fault)):
        check_table(changed(table, name, where, value))


def test_a_table_that_leaves_work_out_or_wastes_slots_is_found_out() -> None:
    table = make_table(Schedule.ONE_F_ONE_B_STASH, num_stages=3, num_microbatches=4)
    missing = replace(table, num_microbatches=5)
    with pytest.raises(ValueError, match="The backward of stage 0 and micro-batch 4 never runs"):
        check_table(missing)
    waste = changed(changed(table, "forward_slot", (2, 2), 7), "backward_slot", (2, 2), 7)
    with pytest.raises(ValueError, match="slots but hold at most"):
        check_table(waste)
    late = {
        name: np.insert(getattr(table, name), 1, IDLE, axis=0)
        for name in vars(table)
        if name.startswith(("forward", "backward"))
    }
    with pytest.raises(ValueError, match="arrives in tick 1 but is used in tick 2"):
        check_table(replace(table, **late))
    recomputing = replace(table, schedule=Schedule.ONE_F_ONE_B)
    with pytest.raises(ValueError, match="though its backward repeats it"):
        check_table(recomputing)


@pytest.mark.parametrize(
    ("schedule", "numbers", "text"),
    [
        (
            Schedule.NONE,
            {"num_stages": 4, "num_microbatches": 2},
            "Schedule 'none' runs a single stage, but num_stages is 4. "
            "Choose one of gpipe, 1f1b, 1f1b-stash, interleaved, or num_stages=1.",
        ),
        (
            Schedule.GPIPE,
            {"num_stages": 1, "num_microbatches": 2},
            "Schedule 'gpipe' is for several stages, but num_stages is 1. "
            "Choose schedule 'none', or at least 2 stages.",
        ),
        (
            Schedule.INTERLEAVED,
            {"num_stages": 2, "num_microbatches": 2},
            "Schedule 'interleaved' needs at least 2 chunks per group of devices, but num_chunks is 1. "
            "Choose schedule '1f1b', or num_chunks=2 or more.",
        ),
        (
            Schedule.ONE_F_ONE_B,
            {"num_stages": 2, "num_microbatches": 2, "num_chunks": 3},
            "Schedule '1f1b' has one chunk per group of devices, but num_chunks is 3. "
            "Choose schedule 'interleaved', or num_chunks=1.",
        ),
        (
            Schedule.ONE_F_ONE_B,
            {"num_stages": 2, "num_microbatches": 0},
            "num_microbatches is 0, but a schedule needs at least 1. Give a positive number.",
        ),
    ],
)
@pytest.mark.parametrize("function", [make_table, in_flight, tick_kinds])
def test_impossible_schedules_say_what_to_do(function, schedule: Schedule, numbers: dict, text: str) -> None:
    with pytest.raises(InputError) as caught:
        function(schedule, **numbers)
    assert str(caught.value) == text


def test_times_of_another_number_of_stages_are_refused() -> None:
    numbers = {"num_stages": 2, "num_microbatches": 2}
    text = r"backward_s has shape \(3,\), but the schedule has 2 virtual stages. Give one time per virtual stage"
    with pytest.raises(InputError, match=text):
        makespan(tick_kinds(Schedule.GPIPE, **numbers), [1.0, 1.0], [1.0, 1.0, 1.0])
    with pytest.raises(InputError, match=text):
        simulate(make_table(Schedule.GPIPE, **numbers), [1.0, 1.0], [1.0, 1.0, 1.0])
