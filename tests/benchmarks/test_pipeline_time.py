"""The prediction for a pipeline is its table's makespan with the stages' times, and what is left without work."""

from __future__ import annotations

import pytest

from benchmarks.parts.pipeline_record import compared

HOSTS = [
    {
        "step_s": [2.00, 1.0, 0.0],
        "idle_s": [0.10, 0.05, 0.0],
        "forward_s": [0.1, 0.1, 0.0],
        "backward_s": [0.3, 0.3, 0.0],
    },
    {
        "step_s": [2.02, 1.0, 0.0],
        "idle_s": [0.12, 0.05, 0.0],
        "forward_s": [0.0, 0.0, 0.0],
        "backward_s": [0.35, 0.35, 0.0],
    },
]  # fmt: skip


def test_1f1b_is_priced_tick_by_tick() -> None:
    record = compared("1f1b", 4, HOSTS)
    # Forward alone; backward beside it, twice forward and backward with it, backward; backward alone.
    ticks = [0.1, 0.35, 0.4, 0.4, 0.35, 0.3]
    assert record["ticks"] == 6
    assert record["predicted_s"] == pytest.approx(sum(ticks) + 0.12)
    assert record["measured_s"] == 2.02
    assert record["error"] == pytest.approx((sum(ticks) + 0.12) / 2.02 - 1)


def test_gpipe_waits_for_all_forwards() -> None:
    hosts = [{**host, "forward_s": [0.1, 0.1, 0.0], "backward_s": [0.2, 0.2, 0.0]} for host in HOSTS]
    record = compared("gpipe", 4, hosts)
    assert record["predicted_s"] == pytest.approx(5 * 0.1 + 5 * 0.2 + 0.12)
