"""The testbed runs functions on two hosts, limits their link, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import testbed
from benchmarks.testbed import LOOPBACK, NAMESPACES, Testbed, TestbedError, missing, remove_stale

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
sys.path.insert(0, {folder!r})
from testbed import Testbed
with Testbed(bandwidth_bits_per_s=1e9) as bed:
    print(*bed._namespaces, flush=True)
    bed.run("time:sleep", {{"secs": 600}}) if {busy} else time.sleep(600)
"""


def permitted() -> str | None:
    """Why no namespaces can be made here; None if they can."""
    why = missing()
    if why is None:
        with Testbed() as bed:
            why = bed.why_loopback
    return why


@pytest.fixture(scope="module")
def namespaces() -> None:
    why = permitted()
    if why is not None:
        pytest.skip(f"network namespaces are not permitted here: {why}")


@pytest.fixture
def nothing_left(namespaces: None) -> Iterator[None]:
    yield
    assert not traces(f"gx{os.getpid()}n")


def traces(prefix: str) -> list[str]:
    """Namespaces, links and files of testbeds whose names begin so."""
    found = []
    for what in ("netns", "link"):
        listed = subprocess.run(["ip", what], capture_output=True, text=True, check=True).stdout
        found += [line for line in listed.splitlines() if prefix in line]
    etc = testbed.NETNS_ETC
    return found + ([str(path) for path in etc.glob(f"{prefix}*")] if etc.is_dir() else [])


def test_two_hosts_work_together_over_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testbed, "missing", lambda: "not asked for")
    with Testbed(bandwidth_bits_per_s=1e6, devices_per_host=2) as bed:
        assert bed.network == LOOPBACK
        assert "not asked for" in bed.description
        answers = bed.run("parts.testbed_host:describe_host", {"given": [1, "x"]}, timeout_s=120)
    assert answers.network == LOOPBACK
    first, second = answers.values
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["sum"] == second["sum"] == 3
    assert first["arguments"] == {"given": [1, "x"]}
    assert (first["devices"], first["local_devices"]) == (4, 2)
    assert len(first["cores"]) == 1
    if len(os.sched_getaffinity(0)) > 1:
        assert first["cores"] != second["cores"]


def test_two_hosts_work_together_over_a_limited_link(nothing_left: None) -> None:
    # 1 MiB at 100 Mbit/s takes 84 ms; some of it passes at once.
    with Testbed(bandwidth_bits_per_s=1e8) as bed:
        assert bed.network == NAMESPACES
        assert bed.description == "100 Mbit/s"
        answers = bed.run("parts.testbed_host:measure_link", {"sizes": [1 << 20], "repeats": 3}, timeout_s=120)
    assert 0.07 < answers.values[0][str(1 << 20)] < 0.4


def test_a_failing_host_ends_the_other_and_says_why(nothing_left: None) -> None:
    begin = time.monotonic()
    with pytest.raises(TestbedError, match="meant to fail"), Testbed() as bed:
        bed.run("parts.testbed_host:fail_on", {"host": 1}, timeout_s=120)
    assert time.monotonic() - begin < 60


def test_hosts_that_take_too_long_are_ended(nothing_left: None) -> None:
    with pytest.raises(TestbedError, match="did not end in time"), Testbed() as bed:
        bed.run("parts.testbed_host:fail_on", {"host": 2}, timeout_s=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(number: signal.Signals, namespaces: None) -> None:
    with holder(busy=True) as process:
        time.sleep(0.5)
        assert traces(f"gx{process.pid}n")
        process.send_signal(number)
        assert process.wait(timeout=20) != 0
    assert not traces(f"gx{process.pid}n")


def test_what_a_killed_one_left_is_removed_by_the_next(namespaces: None) -> None:
    with holder(busy=False) as process:
        process.kill()
        process.wait()
        remove_stale()
    assert not traces(f"gx{process.pid}n")


def holder(*, busy: bool) -> subprocess.Popen:
    """A process that holds a testbed, and runs something on it if `busy`, for ten minutes."""
    script = HOLDER.format(folder=str(ROOT / "benchmarks"), busy=busy)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"gx{process.pid}n")
    return process
