"""A pipeline's timeline for people: as text, as a figure, as events for a trace viewer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from galvatron_jax.cost.schedules import Task, Timeline, bubble_share
from galvatron_jax.errors import InputError
from galvatron_jax.report.text import TEXT_WIDTH
from galvatron_jax.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORWARD_COLOUR = "#4c78a8"
BACKWARD_COLOUR = "#f58518"

_MICROSECONDS = 1e6


def timeline_title(timeline: Timeline) -> str:
    """What a picture shows: schedule, stages, micro-batches, seconds, share of idleness."""
    table = timeline.table
    stages = f"{table.num_stages} stages"
    if table.num_chunks > 1:
        stages = f"{table.num_virtual_stages} stages on {table.num_stages} groups of devices"
    return (
        f"Schedule {table.schedule}, {stages}, {table.num_microbatches} micro-batches: "
        f"{format_seconds(timeline.total_s)}, {bubble_share(timeline):.1%} idle"
    )


def timeline_text(timeline: Timeline, width: int = TEXT_WIDTH) -> Text:
    """Draws a timeline for a terminal: a line per group of devices, time from left to right.

    `F3` is the forward of micro-batch 3, `B3` its backward; with several chunks, `F3.1` that of chunk 1. A block
    too short for its number has the letter only.

    Args:
        timeline: what to draw.
        width: columns.

    Raises:
        InputError: too narrow to draw in.

    Example:
        >>> from galvatron_jax.cost.schedules import make_table, simulate
        >>> from galvatron_jax.spec.plan import Schedule
        >>> table = make_table(Schedule.ONE_F_ONE_B_STASH, num_stages=2, num_microbatches=3)
        >>> print(timeline_text(simulate(table, [1.0, 1.0], [2.0, 2.0]), width=56).plain)
        Schedule 1f1b-stash, 2 stages, 3 micro-batches: 12.00 s, 25.0% idle
        group 0 F0--F1--        F2--B0======B1======    B2======
        group 1     F0--B0======F1--B1======F2--B2======
    """
    names = [f"group {group} " for group in range(timeline.table.num_stages)]
    margin = max(map(len, names))
    columns = width - margin
    if columns < timeline.table.num_stages:
        raise InputError(f"A timeline does not fit into {width} columns. Give at least {margin + 20}.")
    text = Text(timeline_title(timeline), style="bold", no_wrap=True)
    for group, name in enumerate(names):
        text.append("\n" + name.rjust(margin), style="not bold")
        _draw_group(text, [task for task in timeline.tasks if task.group == group], timeline, columns)
    return text


def timeline_figure(timeline: Timeline) -> Figure:
    """Draws a timeline with matplotlib; `figure.savefig("timeline.svg")` writes it.

    Args:
        timeline: what to draw.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise InputError(
            "A figure of a timeline needs matplotlib, which is not installed. Install it with "
            "`pip install 'galvatron-jax[plot]'`, or print `timeline_text` instead."
        ) from error
    table = timeline.table
    figure = Figure(figsize=(12, 1.2 + 0.45 * table.num_stages), layout="constrained")
    axes = figure.subplots()
    for backward, colour in ((False, FORWARD_COLOUR), (True, BACKWARD_COLOUR)):
        for group in range(table.num_stages):
            tasks = [task for task in timeline.tasks if task.group == group and task.backward is backward]
            spans = [(task.start_s, task.end_s - task.start_s) for task in tasks]
            shades = [_shade(task, timeline) for task in tasks]
            axes.broken_barh(spans, (group - 0.4, 0.8), facecolor=colour, alpha=shades, edgecolor="white")
            for task in tasks:
                middle = (task.start_s + task.end_s) / 2
                axes.text(middle, group, str(task.microbatch), ha="center", va="center", fontsize=7, clip_on=True)
    axes.set_yticks(range(table.num_stages), [f"group {group}" for group in range(table.num_stages)])
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.total_s or 1.0)
    axes.set_xlabel("seconds")
    axes.set_title(timeline_title(timeline))
    handles = [Patch(color=FORWARD_COLOUR, label="forward"), Patch(color=BACKWARD_COLOUR, label="backward")]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def timeline_events(timeline: Timeline) -> list[dict[str, Any]]:
    """A timeline as events of the Chrome trace format, which Perfetto (https://ui.perfetto.dev) opens as a JSON file.

    Args:
        timeline: what to show; one thread per group of devices, microseconds as the format has them.

    Example:
        >>> from galvatron_jax.cost.schedules import make_table, simulate
        >>> from galvatron_jax.spec.plan import Schedule
        >>> table = make_table(Schedule.NONE, num_stages=1, num_microbatches=1)
        >>> timeline_events(simulate(table, [0.5], [1.0]))[-1]["dur"]
        1000000.0
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": timeline_title(timeline)}}
    ]
    for group in range(timeline.table.num_stages):
        name = {"name": f"group {group}"}
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": group, "args": name})
    for task in timeline.tasks:
        events.append(
            {
                "ph": "X",
                "name": _label(task, timeline),
                "cat": "backward" if task.backward else "forward",
                "pid": 0,
                "tid": task.group,
                "ts": task.start_s * _MICROSECONDS,
                "dur": (task.end_s - task.start_s) * _MICROSECONDS,
                "args": {"stage": task.stage, "microbatch": task.microbatch, "tick": task.tick},
            }
        )
    return events


def _draw_group(text: Text, tasks: list[Task], timeline: Timeline, columns: int) -> None:
    """Appends one group's blocks; edges are rounded to columns, so that neighbours meet."""
    scale = columns / timeline.total_s if timeline.total_s else 0.0
    drawn = 0
    for task in tasks:
        start, end = round(task.start_s * scale), round(task.end_s * scale)
        text.append(" " * (start - drawn))
        label = _label(task, timeline)
        # A number cut short would name another micro-batch.
        block = label if len(label) <= end - start else label[:1]
        filled = block.ljust(end - start, "=" if task.backward else "-")[: end - start]
        text.append(filled, style=f"not bold {BACKWARD_COLOUR if task.backward else FORWARD_COLOUR}")
        drawn = end


def _label(task: Task, timeline: Timeline) -> str:
    label = f"{'B' if task.backward else 'F'}{task.microbatch}"
    return label if timeline.table.num_chunks == 1 else f"{label}.{task.stage // timeline.table.num_stages}"


def _shade(task: Task, timeline: Timeline) -> float:
    """Opacity by chunk: later ones are paler."""
    return 1.0 - 0.6 * (task.stage // timeline.table.num_stages) / timeline.table.num_chunks
