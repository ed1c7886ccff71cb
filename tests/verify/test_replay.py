# ruff: noqa: E501 (lines of compiled programs)
"""Compiled schedules run through: small ones by hand, where the outcome can be counted."""

from __future__ import annotations

from collections import Counter

import pytest

from galvatron_jax.cost.links import Group, ring_seconds
from galvatron_jax.cost.schedules import ScheduleTable, make_table
from galvatron_jax.spec.cluster import ClusterSpec, DeviceSpec, Link
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.verify.replay import LAUNCH_S, Span, replay, turn_order
from galvatron_jax.verify.traffic import Traffic

from .snippets import module

KERNEL_S = 1e-3
"""Of `%copy`: 500 kB read, 500 kB written, at 1 GB/s."""

CLUSTER = ClusterSpec(
    name="test",
    num_nodes=2,
    devices_per_node=4,
    device=DeviceSpec(
        name="test",
        memory_bytes=10**9,
        peak_flops_per_s={"float32": 1e9, "tensorfloat32": 4e9, "bfloat16": 8e9},
        memory_bandwidth_bytes_per_s=1e9,
    ),
    intra=Link(name="fast", latency_s=1e-6, bandwidth_bytes_per_s=1e9),
    inter=Link(name="slow", latency_s=1e-5, bandwidth_bytes_per_s=1e8),
    source="made up",
)

GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
START = f"""
  %p = f32[125000]{{0}} parameter(0)
  %s = f32[125000]{{0}} all-reduce-start(%p), channel_id=1, {GROUPS}, to_apply=%sum
"""
DONE = "  %d = f32[125000]{0} all-reduce-done(%s)\n"
REDUCE_S = ring_seconds(CollectiveKind.ALL_REDUCE, Group(4, 1), payload_bytes=500_000, cluster=CLUSTER)


def kernel(name: str) -> str:
    """A copy that takes `KERNEL_S`, and a launch."""
    return f"  %{name} = f32[125000]{{0}} copy(%p)\n"


def run(main: str, *others: str, table: ScheduleTable | None = None) -> Span:
    return replay(module(main, *others), CLUSTER, table=table)


def test_kernels_run_one_after_another() -> None:
    found = run("  %p = f32[125000]{0} parameter(0)\n" + kernel("a") + kernel("b"))
    assert found.seconds == pytest.approx(2 * (KERNEL_S + LAUNCH_S))
    assert found.compute_s == found.seconds
    assert (found.kernels, found.bytes, found.exposed_s) == (2, 2_000_000, 0.0)


def test_a_kernel_takes_the_longer_of_computing_and_moving() -> None:
    text = """
  %a = bf16[1000,1000]{1,0} parameter(0)
  %b = bf16[1000,1000]{1,0} parameter(1)
  ROOT %c = bf16[1000,1000]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
"""
    computing, moving = 2e9 / (8e9 * 0.5), 6e6 / 1e9
    assert run(text).seconds == pytest.approx(LAUNCH_S + computing)
    assert replay(module(text), CLUSTER, efficiency=1.0).seconds == pytest.approx(LAUNCH_S + computing / 2)
    assert replay(module(text), CLUSTER, efficiency=1e6).seconds == pytest.approx(LAUNCH_S + moving)
    single = replay(module(text.replace("bf16", "f32")), CLUSTER, efficiency=1.0)
    assert single.seconds == pytest.approx(LAUNCH_S + 2e9 / 4e9)


def test_a_collective_beside_a_longer_kernel_is_hidden() -> None:
    found = run(START + kernel("a") + kernel("b") + DONE)
    assert REDUCE_S < 2 * KERNEL_S
    assert found.seconds == pytest.approx(2 * (KERNEL_S + LAUNCH_S))
    assert (found.communication_s, found.exposed_s) == (pytest.approx(REDUCE_S), 0.0)
    assert found.traffic == Counter({Traffic("all-reduce", 500_000, 4, 1): 1})


def test_what_no_kernel_hides_of_a_collective_is_exposed() -> None:
    found = run(START + DONE + kernel("a"))
    assert found.exposed_s == pytest.approx(REDUCE_S)
    assert found.seconds == pytest.approx(REDUCE_S + KERNEL_S + LAUNCH_S)


def test_collectives_share_one_stream() -> None:
    second = f"  %s2 = f32[125000]{{0}} all-reduce-start(%p), channel_id=2, {GROUPS}, to_apply=%sum\n"
    found = run(START + second + DONE + DONE.replace("%s", "%s2").replace("%d", "%d2"))
    assert found.seconds == pytest.approx(2 * REDUCE_S)
    assert found.exposed_s == pytest.approx(2 * REDUCE_S)


def test_a_collective_that_blocks_is_exposed() -> None:
    sync = START.replace(
        "to_apply=%sum", 'to_apply=%sum, backend_config={"collective_backend_config":{"is_sync":true}}'
    )
    assert run(sync + kernel("a") + DONE).exposed_s == pytest.approx(REDUCE_S)
    plain = START.replace("-start", "").replace("%s ", "%d ")
    assert run(plain + kernel("a")).exposed_s == pytest.approx(REDUCE_S)


def test_a_collective_within_an_asynchronous_computation_counts() -> None:
    wrapped = f"""
%wrapped (x: f32[125000]) -> f32[125000] {{
  %x = f32[125000]{{0}} parameter(0)
  ROOT %r = f32[125000]{{0}} all-reduce(%x), channel_id=1, {GROUPS}, to_apply=%sum
}}
"""
    main = """
  %p = f32[125000]{0} parameter(0)
  %s = ((f32[125000]{0}), f32[125000]{0}) async-start(%p), calls=%wrapped
"""
    found = run(main + kernel("a") + kernel("b") + "  %d = f32[125000]{0} async-done(%s)\n", wrapped)
    assert found.seconds == pytest.approx(2 * (KERNEL_S + LAUNCH_S))
    assert found.communication_s == pytest.approx(REDUCE_S)


@pytest.mark.parametrize(
    ("operation", "result", "groups", "expected"),
    [
        ("all-gather", "f32[8000]{0}", "replica_groups={{0,1,2,3,4,5,6,7}}", Traffic("all-gather", 4000, 4, 2)),
        ("reduce-scatter", "f32[500]{0}", "replica_groups=[4,2]<=[2,4]T(1,0)", Traffic("reduce-scatter", 4000, 1, 2)),
        ("all-to-all", "f32[1000]{0}", "replica_groups={{0,1},{2,3},{4,5},{6,7}}", Traffic("all-to-all", 4000, 2, 1)),
        ("collective-permute", "f32[1000]{0}", "source_target_pairs={{0,1},{1,4}}", Traffic("collective-permute", 4000, 1, 2)),
        ("collective-permute", "f32[1000]{0}", "source_target_pairs={{0,1},{1,2}}", Traffic("collective-permute", 4000, 2, 1)),
    ],
)  # fmt: skip
def test_groups_are_counted_by_nodes(operation: str, result: str, groups: str, expected: Traffic) -> None:
    main = f"  %p = f32[1000]{{0}} parameter(0)\n  ROOT %c = {result} {operation}(%p), channel_id=1, {groups}\n"
    assert run(main).traffic == Counter({expected: 1})


def test_groups_across_nodes_take_the_slow_link() -> None:
    across = START.replace(GROUPS, "replica_groups={{0,4},{1,5},{2,6},{3,7}}")
    inside = START.replace(GROUPS, "replica_groups={{0,1},{2,3},{4,5},{6,7}}")
    assert run(across + DONE).seconds > 5 * run(inside + DONE).seconds


def test_a_collective_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read the groups of s"):
        run(START.replace(GROUPS, "replica_groups=unheard-of"))


def body(name: str, *, kernels: int = 1) -> str:
    """A computation that turns a loop."""
    lines = "".join(kernel(f"k{number}") for number in range(kernels))
    return f"%{name} (p: f32[125000]) -> f32[125000] {{\n  %p = f32[125000]{{0}} parameter(0)\n{lines}}}\n"


def loop(name: str, *, calls: str, trips: int | None = None) -> str:
    known = "" if trips is None else f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    return f"  %{name} = f32[125000]{{0}} while(%p), condition=%more, body=%{calls}{known}\n"


PARAMETER = "  %p = f32[125000]{0} parameter(0)\n"


def test_a_loop_takes_its_trips_times_its_body() -> None:
    found = run(PARAMETER + loop("l", calls="turn", trips=7), body("turn", kernels=2))
    assert found.seconds == pytest.approx(14 * (KERNEL_S + LAUNCH_S))
    assert found.kernels == 14


def test_loops_within_loops_multiply() -> None:
    outer = "%outer (p: f32[125000]) -> f32[125000] {\n" + PARAMETER + loop("l", calls="turn", trips=3) + "}\n"
    assert run(PARAMETER + loop("o", calls="outer", trips=5), outer, body("turn")).kernels == 15


def test_a_loop_of_unknown_trips_counts_once() -> None:
    assert run(PARAMETER + loop("l", calls="turn"), body("turn")).kernels == 1


def test_of_a_conditional_the_longest_branch_counts() -> None:
    main = PARAMETER + "  %c = f32[125000]{0} conditional(%p, %p), branch_computations={%one, %three}\n"
    assert run(main, body("one"), body("three", kernels=3)).kernels == 3


@pytest.mark.parametrize("schedule", [Schedule.ONE_F_ONE_B, Schedule.ONE_F_ONE_B_STASH, Schedule.GPIPE])
def test_a_tick_of_a_pipeline_takes_as_long_as_its_slowest_group(schedule: Schedule) -> None:
    """Forward of stage 0 is one kernel, of stage 1 three; backwards two and four."""
    table = make_table(schedule, num_stages=2, num_microbatches=5)
    kernels = {("forward", 0): 1, ("forward", 1): 3, ("backward", 0): 2, ("backward", 1): 4}
    order = turn_order(table)
    bodies = [body(f"{way}_{stage}", kernels=kernels[way, stage]) for way, stage in order]
    main, ticks = PARAMETER, []
    for number, phase in enumerate(table.phases):
        working = turn_order(table, phase.ways)
        turns = "".join(loop(f"l_{way}_{stage}", calls=f"{way}_{stage}") for way, stage in working)
        ticks.append(f"%tick{number} (p: f32[125000]) -> f32[125000] {{\n" + PARAMETER + turns + "}\n")
        main += loop(f"ticks{number}", calls=f"tick{number}", trips=phase.length)
    expected = 0
    for row in range(table.num_ticks):
        busy = [0, 0]
        for group in range(2):
            for way, stages in (("forward", table.forward_stage), ("backward", table.backward_stage)):
                stage = int(stages[row, group])
                if stage >= 0 and (way, stage) in order:
                    busy[group] += kernels[way, stage]
        expected += max(busy)
    assert run(main, *ticks, *bodies, table=table).kernels == expected
    assert run(main, *ticks, *bodies).kernels == sum(
        phase.length * sum(kernels[one] for one in turn_order(table, phase.ways)) for phase in table.phases
    )


def test_the_last_stage_has_no_forward_of_its_own_where_it_is_recomputed() -> None:
    table = make_table(Schedule.ONE_F_ONE_B, num_stages=2, num_microbatches=3)
    assert table.recomputes
    assert turn_order(table) == [("forward", 0), ("backward", 0), ("backward", 1)]
    stashing = make_table(Schedule.ONE_F_ONE_B_STASH, num_stages=2, num_microbatches=3)
    assert turn_order(stashing)[:2] == [("forward", 0), ("forward", 1)]


def test_once_a_step_each_group_of_devices_runs_its_own_program() -> None:
    table = make_table(Schedule.ONE_F_ONE_B, num_stages=2, num_microbatches=3)
    bodies = [body("first", kernels=1), body("second", kernels=5)]
    main = PARAMETER + loop("a", calls="first") + loop("b", calls="second") + kernel("update")
    assert run(main, *bodies, table=table).kernels == 6
    assert run(main, *bodies).kernels == 7


def test_a_module_that_is_not_scheduled_is_refused() -> None:
    text = module(PARAMETER + kernel("a")).replace("is_scheduled=true", "other=1")
    with pytest.raises(ValueError, match="not scheduled"):
        replay(text, CLUSTER)


def test_parts_add_up_to_the_step() -> None:
    found = run(START + kernel("a") + DONE + loop("l", calls="turn", trips=2), body("turn"))
    assert found.compute_s + found.exposed_s == pytest.approx(found.seconds)
