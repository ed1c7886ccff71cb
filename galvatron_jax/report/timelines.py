"""The timeline of a plan's schedule, from its own prediction."""

from __future__ import annotations

import json
from pathlib import Path

from galvatron_jax.cost.schedules import Timeline, make_table, simulate
from galvatron_jax.errors import InputError
from galvatron_jax.report.figures import save_figure
from galvatron_jax.report.schedule_picture import timeline_events, timeline_figure
from galvatron_jax.spec.plan import Plan

EVENTS_ENDING = ".json"
"""Of files in the Chrome trace format, which https://ui.perfetto.dev opens."""


def plan_timeline(plan: Plan) -> Timeline:
    """Plays the plan's schedule through, with the predicted times of its stages.

    Raises:
        InputError: when the plan has one stage, or no prediction.
    """
    if len(plan.stages) == 1:
        raise InputError(
            "The plan has one stage: its micro-batches run one after another, and there is no schedule to draw."
        )
    if plan.prediction is None or not plan.prediction.stages:
        raise InputError("The plan has no prediction of its stages, so there are no times to draw. Price it first.")
    degree = plan.pipeline_degree
    table = make_table(
        plan.schedule,
        num_stages=degree,
        num_microbatches=plan.num_microbatches,
        num_chunks=len(plan.stages) // degree,
    )
    stages = plan.prediction.stages
    return simulate(table, [stage.forward_s for stage in stages], [stage.backward_s for stage in stages])


def save_timeline(timeline: Timeline, path: str) -> None:
    """Writes a timeline as a picture, or as events where the file ends in `.json`.

    Raises:
        InputError: when a picture is wanted and matplotlib is not installed.
    """
    if Path(path).suffix != EVENTS_ENDING:
        save_figure(timeline_figure(timeline), path)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    events = {"traceEvents": timeline_events(timeline), "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(events) + "\n", encoding="utf-8")
