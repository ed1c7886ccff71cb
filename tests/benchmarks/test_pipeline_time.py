"""The prediction for a pipeline is its table's makespan with the stages' times, and what is left without work."""

from __future__ import annotations

import pytest

from benchmarks.parts.pipeline_record import compared

FIRST = {"step_s": [2.00, 1.0], "idle_s": [0.10, 0.05], "forward_s": [0.1, 0.1], "backward_s": [0.3, 0.3]}
LAST = {"step_s": [2.02, 1.0], "idle_s": [0.12, 0.05], "forward_s": [0.0, 0.0], "backward_s": [0.35, 0.35]}


def test_1f1b_is_priced_tick_by_tick() -> None:
    record = compared("1f1b", 4, [[FIRST], [LAST]])
    # Forward alone; backward beside it, twice forward and backward with it, backward; backward alone.
    ticks = [0.1, 0.35, 0.4, 0.4, 0.35, 0.3]
    assert record["ticks"] == 6
    assert record["predicted_s"] == pytest.approx(sum(ticks) + 0.12)
    assert record["measured_s"] == 2.02
    assert record["error"] == pytest.approx((sum(ticks) + 0.12) / 2.02 - 1)


def test_gpipe_waits_for_all_forwards() -> None:
    both = {"forward_s": [0.1, 0.1], "backward_s": [0.2, 0.2]}
    record = compared("gpipe", 4, [[FIRST | both], [LAST | both]])
    assert record["predicted_s"] == pytest.approx(5 * 0.1 + 5 * 0.2 + 0.12)


def test_rounds_are_compared_one_by_one() -> None:
    """A machine that is slow for two rounds of three is as slow in what is predicted as in what is measured."""
    slow, slower = ({name: [k * x for x in seconds] for name, seconds in FIRST.items()} for k in (2, 3))
    late, later = ({name: [k * x for x in seconds] for name, seconds in LAST.items()} for k in (2, 3))
    once, varying = (
        compared("1f1b", 4, [[FIRST], [LAST]]),
        compared("1f1b", 4, [[FIRST, slow, slower], [LAST, late, later]]),
    )
    assert varying["error"] == pytest.approx(once["error"])
    assert varying["measured_s"] == pytest.approx(2 * once["measured_s"])
