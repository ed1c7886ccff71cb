"""What `pipeline_time.py` predicts from what its hosts measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from galvatron_jax.cost.schedules import makespan, tick_kinds
from galvatron_jax.spec.plan import Schedule


def compared(schedule: str, count: int, hosts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of one plan.

    Args:
        schedule: its schedule.
        count: its micro-batches.
        hosts: per stage, wall and CPU seconds, and the interquartile range of the first, of a step, of one with an idle
            table, of a forward and of a backward.
    """
    names = ("step_s", "idle_s", "forward_s", "backward_s")
    kinds = tick_kinds(Schedule(schedule), num_stages=len(hosts), num_microbatches=count)
    record: dict[str, Any] = {"schedule": schedule, "microbatches": count}
    # A step ends when the slowest host's does.
    measured, idle = (max(host[name][0] for host in hosts) for name in ("step_s", "idle_s"))
    stages = {way: [host[f"{way}_s"][0] for host in hosts] for way in ("forward", "backward")}
    predicted = float(makespan(kinds, stages["forward"], stages["backward"])) + idle
    record |= {
        "measured_s": measured,
        "predicted_s": predicted,
        "error": predicted / measured - 1.0,
        "idle_s": idle,
        "ticks": int(kinds.count.sum()),
        "forward_s": stages["forward"],
        "backward_s": stages["backward"],
        "spread_s": {name: [host[name][2] for host in hosts] for name in names},
        "cpu_s": {name: [host[name][1] for host in hosts] for name in names},
    }
    return record
