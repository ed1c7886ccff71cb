"""Pictures of timelines: what is drawn is what was simulated."""

import io
import json
import sys

import numpy as np
import pytest

from galvatron_jax.cost.schedules import Timeline, make_table, simulate
from galvatron_jax.errors import InputError
from galvatron_jax.report.schedule_picture import timeline_events, timeline_figure, timeline_text
from galvatron_jax.report.text import render
from galvatron_jax.spec.plan import Schedule


def timeline(schedule: Schedule = Schedule.INTERLEAVED, num_chunks: int = 2) -> Timeline:
    table = make_table(schedule, num_stages=2, num_microbatches=4, num_chunks=num_chunks)
    times = np.random.default_rng(0).random((2, 2 * num_chunks)) + 0.5
    return simulate(table, *times)


def test_text_draws_every_task_of_a_group_in_order() -> None:
    shown = timeline()
    title, *lines = timeline_text(shown, width=400).plain.splitlines()
    assert title.startswith("Schedule interleaved, 4 stages on 2 groups of devices, 4 micro-batches: ")
    for group, line in enumerate(lines):
        name, *labels = line.replace("-", " ").replace("=", " ").replace(f"group {group}", f"group{group}").split()
        tasks = [task for task in shown.tasks if task.group == group]
        assert name == f"group{group}"
        assert labels == [f"{'B' if t.backward else 'F'}{t.microbatch}.{t.stage // 2}" for t in tasks]


@pytest.mark.parametrize("width", [24, 80, 110])
def test_text_stays_within_its_width(width: int) -> None:
    _, *lines = timeline_text(timeline(), width=width).plain.splitlines()
    assert max(map(len, lines)) == width
    assert len(lines) == 2


def test_text_never_cuts_a_number_short() -> None:
    table = make_table(Schedule.ONE_F_ONE_B_STASH, num_stages=2, num_microbatches=12)
    text = timeline_text(simulate(table, [1, 1], [1, 1]), width=8 + 2 * 26).plain
    assert "F8B8F9B9F-B=F-B=" in text


def test_text_prints_without_wrapping() -> None:
    text = timeline_text(timeline(), width=110)
    assert render([text], width=110).splitlines() == [line.rstrip() for line in text.plain.splitlines()]


def test_too_narrow_a_text_says_how_wide_it_must_be() -> None:
    with pytest.raises(InputError, match="does not fit into 9 columns. Give at least 28."):
        timeline_text(timeline(), width=9)


def test_a_timeline_without_any_time_is_drawn() -> None:
    table = make_table(Schedule.GPIPE, num_stages=2, num_microbatches=2)
    assert "0.0% idle" in timeline_text(simulate(table, [0, 0], [0, 0])).plain


def test_events_are_the_tasks_in_microseconds() -> None:
    shown = timeline()
    events = json.loads(json.dumps(timeline_events(shown)))
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(shown.tasks)
    for event, task in zip(spans, shown.tasks, strict=True):
        assert event["tid"] == task.group
        assert event["ts"] == pytest.approx(1e6 * task.start_s)
        assert event["ts"] + event["dur"] == pytest.approx(1e6 * task.end_s)
        assert event["args"] == {"stage": task.stage, "microbatch": task.microbatch, "tick": task.tick}
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["group 0", "group 1"]


def test_a_figure_has_a_bar_per_task() -> None:
    pytest.importorskip("matplotlib")
    shown = timeline()
    figure = timeline_figure(shown)
    (axes,) = figure.axes
    assert sum(len(bars.get_paths()) for bars in axes.collections) == len(shown.tasks)
    assert len(axes.texts) == len(shown.tasks)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    assert file.getvalue().startswith(b"<?xml")


def test_a_missing_matplotlib_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"needs matplotlib.*pip install 'galvatron-jax\[plot\]'"):
        timeline_figure(timeline())
