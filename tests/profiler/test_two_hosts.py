"""Two hosts measure together, take the cache of the first for true, and end with the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import testbed
from benchmarks.testbed import Testbed


def test_hosts_with_unlike_caches_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testbed, "missing", lambda: "loopback will do")
    caches = [tmp_path / "first", tmp_path / "second"]
    arguments = {"caches": [str(path) for path in caches], "known": [[1], [1, 2]], "batches": [1, 2, 4]}
    with Testbed(devices_per_host=2) as bed:
        flags = "--xla_backend_optimization_level=0"
        first, second = bed.run("tests.profiler.two_hosts:run", arguments, timeout_s=600, flags=flags).values
    assert first["profile"] == second["profile"]
    assert first["cluster"] == second["cluster"]
    # What the first host knows is not measured again; what the second alone knows is.
    assert first["built"] == second["built"] == [2, 4]
    seconds = [layer["forward"]["median_s"] for layer in first["profile"]["layers"]]
    assert seconds[0] == 100.0
    assert max(seconds[1:]) < 1.0
    # The first host writes all, the second nothing.
    assert second["files"] == 4
    assert first["files"] > 4
    found = {(each["kind"], each["axis_size"], each["level"]) for each in first["profile"]["collectives"]}
    sizes = {(2, "intra"), (2, "inter"), (4, "inter")}
    kinds = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
    assert found == {(kind, size, level) for kind in kinds for size, level in sizes}
    cluster = first["cluster"]
    assert (cluster["num_nodes"], cluster["devices_per_node"]) == (2, 2)
    assert cluster["inter"]["bandwidth_bytes_per_s"] > 0
