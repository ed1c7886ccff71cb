"""What `pipeline_time.py` predicts from what its hosts measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from galvatron_jax.cost.schedules import TickKinds, makespan, tick_kinds
from galvatron_jax.spec.plan import Schedule

Round = Mapping[str, Sequence[float]]
"""Wall and CPU seconds of a step, of one with an idle table, of a forward and of a backward."""


def compared(schedule: str, count: int, hosts: Sequence[Sequence[Round]]) -> dict[str, Any]:
    """The record of one plan: medians over rounds, in each of which the hosts measured all once.

    Args:
        schedule: its schedule.
        count: its micro-batches.
        hosts: per stage, the rounds.
    """
    kinds = tick_kinds(Schedule(schedule), num_stages=len(hosts), num_microbatches=count)
    rounds = [_round(kinds, each) for each in zip(*hosts, strict=True)]
    errors = [each["predicted_s"] / each["measured_s"] - 1.0 for each in rounds]
    names = ("step_s", "idle_s", "forward_s", "backward_s")
    return {
        "schedule": schedule,
        "microbatches": count,
        "rounds": len(rounds),
        **{name: statistics.median(each[name] for each in rounds) for name in ("measured_s", "predicted_s", "idle_s")},
        "error": statistics.median(errors),
        "error_quartiles": statistics.quantiles(errors, n=4)[::2] if len(errors) > 1 else errors * 2,
        "ticks": int(kinds.count.sum()),
        "stages_s": {name: [statistics.median(r[name][0] for r in host) for host in hosts] for name in names},
        "stages_cpu_s": {name: [statistics.median(r[name][1] for r in host) for host in hosts] for name in names},
    }


def _round(kinds: TickKinds, hosts: Sequence[Round]) -> dict[str, float]:
    # A step ends when the slowest host's does.
    measured, idle = (max(host[name][0] for host in hosts) for name in ("step_s", "idle_s"))
    forward, backward = ([host[f"{way}_s"][0] for host in hosts] for way in ("forward", "backward"))
    return {
        "measured_s": measured,
        "predicted_s": float(makespan(kinds, forward, backward)) + idle,
        "idle_s": idle,
    }
