"""The contract of benchmark scripts: one JSON object on the last line, an exit code that tells whether claims hold."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Claim, Outcome, Pairs, make_record, time_pairs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from harness import Claim, Outcome, run

def measure(full):
    print("measuring")
    return Outcome([{{"full": full}}], [Claim("one is at most the limit", 1.0, {limit})])

if __name__ == "__main__":
    run(measure, devices="8 virtual devices")
"""


def run_script(folder: Path, limit: float, *options: str) -> subprocess.CompletedProcess:
    path = folder / "tiny.py"
    path.write_text(SCRIPT.format(folder=str(BENCHMARKS), limit=limit))
    return subprocess.run([sys.executable, str(path), *options], capture_output=True, text=True)


def test_the_last_line_under_json_is_one_object_of_the_contract(tmp_path: Path) -> None:
    done = run_script(tmp_path, 2.0, "--json", "--check", "--full")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["benchmark"] == "tiny"
    assert record["hardware"].endswith("8 virtual devices")
    assert record["results"] == [{"full": True}]
    assert record["claims"] == [
        {"claim": "one is at most the limit", "value": 1.0, "limit": 2.0, "unit": "", "holds": True}
    ]


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--check",), 1)])
def test_a_claim_that_does_not_hold_fails_only_a_check(tmp_path: Path, options: tuple[str, ...], code: int) -> None:
    done = run_script(tmp_path, 0.5, *options)
    assert done.returncode == code, done.stderr
    assert "DOES NOT HOLD" in done.stdout


def test_a_record_says_whether_each_claim_holds() -> None:
    outcome = Outcome([], [Claim("a", 1.0, 1.0), Claim("b", float("nan"), 1.0)])
    record = make_record("x", outcome, hardware="y", conditions={})
    assert [claim["holds"] for claim in record["claims"]] == [True, False]


def test_a_ratio_is_the_median_over_the_pairs() -> None:
    pairs = Pairs((2.0, 3.0, 8.0), (1.0, 1.0, 1.0), (1.0,) * 3, (1.0,) * 3)
    assert pairs.ratio == statistics.median([2.0, 3.0, 8.0])


def test_pairs_stop_when_precise_enough() -> None:
    calls = []
    found = time_pairs(lambda: calls.append(1), lambda: calls.append(2), pairs=4, precision=float("inf"))
    assert len(found.first_s) == 4
    assert calls.count(1) == calls.count(2) == 5


def test_every_benchmark_has_its_line_in_the_readme_and_in_the_makefile() -> None:
    names = {path.stem for path in BENCHMARKS.glob("*.py")} - {"harness", "testbed"}
    readme = (BENCHMARKS / "README.md").read_text()
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    for name in names:
        assert f"`{name}.py`" in readme
        assert name in makefile
