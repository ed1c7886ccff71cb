"""What a rule loses, and when there is nothing to compare."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def heuristics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("heuristics")


def found(step_s: float) -> dict[str, Any]:
    return {"fits": True, "step_s": step_s, "gap": 0.0, "cpu_s": 1.0}


NOTHING = {"fits": False, "cpu_s": 1.0}


@pytest.mark.parametrize(
    ("applied", "without", "lost"),
    [
        (found(1.1), found(1.0), "10.00%"),
        (found(1.0), found(1.0), "nothing"),
        (NOTHING, NOTHING, "nothing fits"),
        (NOTHING, found(1.0), "all that fits"),
    ],
)
def test_a_rule_loses_what_the_step_is_longer(
    heuristics: ModuleType, applied: dict[str, Any], without: dict[str, Any], lost: str
) -> None:
    case = heuristics.SAMPLE[0]
    assert heuristics.lost(heuristics.compared(case, "batch-axes", applied, without)) == lost


def test_the_worst_of_each_rule_is_held_against_the_limit(heuristics: ModuleType) -> None:
    case = heuristics.SAMPLE[0]
    pairs = [(found(1.02), found(1.0)), (found(1.2), found(1.0)), (NOTHING, found(1.0))]
    (claim,) = heuristics.claims([heuristics.compared(case, "batch-axes", *pair) for pair in pairs])
    assert claim.value == pytest.approx(1.2)
    assert not claim.holds
