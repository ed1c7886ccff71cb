"""The pairs that `memory_accuracy.py` goes through cover what it claims, and its figures are figured as they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory_accuracy  # beside the scripts, as they are run

    yield memory_accuracy
    for name in (
        "memory_accuracy",
        "harness",
        "parts.memory_pairs",
        "parts.draw_memory",
        "parts.collective_notes",
        "parts",
    ):
        sys.modules.pop(name, None)


def test_the_pairs_cover_models_dtypes_strategies_schedules_and_sizes(module) -> None:
    pairs = module.PAIRS
    assert len(pairs) >= 60
    assert len({pair.name for pair in pairs}) == len(pairs)
    assert {pair.model for pair in pairs} == {"gpt2", "llama", "t5", "vit", "moe"}
    assert {pair.dtype for pair in pairs} == {"f32", "bf16", "pure"}
    assert {pair.pp for pair in pairs} == {1, 2, 4}
    assert {pair.devices for pair in pairs} == {8, 64}
    assert {pair.strategy.zero for pair in pairs} == {0, 1, 2, 3}
    assert {str(pair.strategy.remat) for pair in pairs} == {"none", "attention", "dots", "full"}
    assert {str(pair.strategy.sp_kind) for pair in pairs} == {"none", "megatron", "ulysses"}
    assert len({pair.microbatches for pair in pairs}) >= 4
    for pair in pairs:
        plan = pair.plan(8, "any")
        assert plan.num_devices == pair.devices
        assert plan.pipeline_degree == pair.pp


def line(peak: int, total: int, *, pp: int = 1, arguments: int = 5, collectives: tuple = ()) -> dict:
    return {
        "pp": pp, "peak_bytes": peak, "argument_bytes": 5, "error": total / peak - 1, "collectives": collectives,
        "predicted": {"peak_bytes": total, "argument_bytes": arguments},
    }  # fmt: skip


def test_claims_are_of_all_pairs_and_of_those_of_one_stage(module) -> None:
    claims = {claim.claim: claim for claim in module.claims([line(100, 104), line(100, 98), line(100, 70, pp=2)])}
    assert claims["mean absolute error of 3 pairs"].value == 12.0
    assert not claims["mean absolute error of 3 pairs"].holds
    assert claims["worst under-prediction"].value == 30.0
    assert claims["mean absolute error of 2 pairs, one stage"].value == 3.0
    assert claims["worst under-prediction, one stage"].value == 2.0
    assert claims["worst under-prediction, one stage"].holds
    assert claims["pairs whose arguments differ"].value == 0
    (differing,) = [
        c for c in module.claims([line(100, 100, arguments=6)]) if c.claim == "pairs whose arguments differ"
    ]
    assert not differing.holds


def test_the_percentile_lies_between_ranks(module) -> None:
    assert module.percentile([float(n) for n in range(101)], 0.95) == pytest.approx(95.0)
    assert module.percentile([3.0], 0.95) == 3.0


def test_pairs_whose_collectives_differ_are_counted_and_want_an_explanation(module) -> None:
    alike = {"operation": "all-gather", "axes": "a", "planned_bytes": 8, "bytes": 8}
    fewer = alike | {"bytes": 4}
    rows = [line(100, 100, collectives=(alike,)), line(100, 100, collectives=(alike, fewer))]
    rows.append(line(100, 100, collectives=(fewer,)) | {"why_collectives_differ": "so"})
    *_, differing, unexplained = module.claims(rows)
    assert (differing.value, unexplained.value) == (2, 1)
    assert differing.holds
    assert not unexplained.holds


def test_notes_are_of_pairs_that_there_are(module) -> None:
    from parts.collective_notes import NOTES, explained

    assert set(NOTES) <= {pair.name for pair in module.PAIRS}
    name = next(iter(NOTES))
    alike = [{"operation": "all-gather", "axes": "a", "planned_bytes": 8, "bytes": 8}]
    assert explained(name, alike) is None
    assert explained(name, [alike[0] | {"bytes": 4}])
    assert explained("another", [alike[0] | {"bytes": 4}]) is None
