"""A profile that is killed in the middle and run again loses at most one point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.profiler.interrupted import BATCHES

ROOT = Path(__file__).parents[2]


def start(cache: Path, begun: Path) -> subprocess.Popen:
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.profiler.interrupted", str(cache), str(begun)]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def timed_layers(cache: Path) -> list[int]:
    """Batches of the forward and backward programs that the cache holds."""
    keys = [json.loads(path.read_text())["key"] for path in cache.glob("*.json")]
    return sorted(key["batch"] for key in keys if key["what"] == "layer")


def test_a_killed_profile_loses_at_most_one_point(tmp_path: Path) -> None:
    cache, begun = tmp_path / "cache", tmp_path / "begun"
    with start(cache, begun) as process:
        deadline = time.monotonic() + 120
        while not (begun.exists() and len(begun.read_text().split()) >= 2):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    first = [int(batch) for batch in begun.read_text().split()]
    kept = timed_layers(cache)
    assert len(first) < len(BATCHES), "it ended before it was killed"
    # Each layer has two points. Of those begun before the last all are kept; of that one at least all but one.
    assert kept[: 2 * len(first) - 2] == [batch for batch in first[:-1] for _ in range(2)]

    with start(cache, begun) as process:
        assert process.wait(timeout=240) == 0
    again = [int(batch) for batch in begun.read_text().split()][len(first) :]
    assert again == [batch for batch in BATCHES if kept.count(batch) < 2]
    assert timed_layers(cache) == [batch for batch in BATCHES for _ in range(2)]
