"""The ways to parallelise that are compared: each is what it is called, and the whole space loses to none."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from benchmarks.parts.search_models import traced
from galvatron_jax.search import SearchResult, search
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.strategy import Remat

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEVICES = 8
MEMORY_BYTES = 7_000_000
"""Of a small model some ways fit, and rematerialisation helps them."""


@pytest.fixture(scope="module")
def paper_grid() -> ModuleType:
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("paper_grid")
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "vit.json"
    traced("vit-tiny=vit:tiny,num_layers=6")[1].save(path)
    return path


@pytest.fixture(scope="module")
def found(paper_grid: ModuleType, path: Path) -> dict[str, SearchResult | str]:
    model, planner = ModelSpec.load(path), paper_grid.Remembering()
    setting = paper_grid.Setting(path, DEVICES, ())
    return {
        name: paper_grid.best(model, way, setting, MEMORY_BYTES, planner)
        for name, way in paper_grid.ways(DEVICES).items()
    }


def plans(found: dict[str, SearchResult | str], way: str) -> list[Plan]:
    """Without and with rematerialisation, where they fit."""
    results = [found[way], found[f"{way}+remat"]]
    return [result.plan for result in results if isinstance(result, SearchResult)]


def degrees(plan: Plan) -> list[tuple[int, int, int]]:
    """dp, tp and ZeRO of every layer."""
    sizes = {axis.name: axis.size for axis in plan.mesh}

    def degree(axes: tuple[str, ...]) -> int:
        return 1 if not axes else sizes[axes[0]] * degree(axes[1:])

    return [(degree(one.dp), degree(one.tp), one.zero) for one in plan.strategies]


@pytest.mark.parametrize(
    ("way", "groups", "expected"),
    [
        ("DP", 1, (8, 1, 0)),
        ("ZeRO-3", 1, (8, 1, 3)),
        ("TP", 1, (1, 8, 0)),
        ("PP", 8, (1, 1, 0)),
        ("2x2xDP", 2, (2, 2, 0)),
    ],
)
def test_a_fixed_way_is_what_it_is_called(found, way, groups, expected):
    assert plans(found, way)
    for plan in plans(found, way):
        assert plan.pipeline_degree == groups
        assert set(degrees(plan)) == {expected}


def test_two_ways_are_mixed_freely_and_no_third(found):
    for plan in plans(found, "DP+TP"):
        assert plan.pipeline_degree == 1
        assert {(dp * tp, zero) for dp, tp, zero in degrees(plan)} == {(8, 0)}
    for plan in plans(found, "DP+PP"):
        assert {(dp * plan.pipeline_degree, tp, zero) for dp, tp, zero in degrees(plan)} == {(8, 1, 0)}


def test_only_the_second_column_rematerialises(found):
    for name, result in found.items():
        if isinstance(result, SearchResult) and name != "ours" and not name.endswith("+remat"):
            assert {one.remat for one in result.plan.strategies} == {Remat.NONE}
    assert {one.remat for one in plans(found, "PP")[-1].strategies} != {Remat.NONE}


def test_ours_is_at_least_as_fast_as_each(paper_grid, found):
    ours = found["ours"].examples_per_s
    rates = {name: one.examples_per_s for name, one in found.items() if isinstance(one, SearchResult)}
    assert max(rates.values()) <= ours * (1 + paper_grid.ROUNDING)
    for name, rate in rates.items():
        if f"{name}+remat" in rates:
            assert rate <= rates[f"{name}+remat"] * (1 + paper_grid.ROUNDING)


@pytest.mark.parametrize("way", ["DP", "ZeRO-3", "PP"])
def test_smaller_batches_are_no_faster(paper_grid, path, way):
    """So the largest that fits is the best."""
    model, planner = ModelSpec.load(path), paper_grid.Remembering()
    rates = [
        search(
            model,
            cluster_preset(f"titanrtx{DEVICES}"),
            global_batch=DEVICES * examples,
            optimizer=paper_grid.ADAM,
            space=paper_grid.ways(DEVICES)[way].spaces(DEVICES, DEVICES * examples)[0],
            runners_up=False,
            planner=planner,
        ).examples_per_s
        for examples in paper_grid.EXAMPLES_PER_DEVICE
    ]
    assert rates == sorted(rates, reverse=True)


def test_the_table_and_the_claims_say_what_fits_and_how_ours_compares(paper_grid, path, found):
    some: dict[str, Any] = {name: one for name, one in found.items() if not name.startswith("PP")}
    some |= {"PP": "too few layers", "PP+remat": "too few layers", "DP": "OOM"}
    row = paper_grid.row(ModelSpec.load(path), DEVICES, 8, some) | {"cpu_s": 1.0}
    assert row["ours_to_worst"] >= row["ours_to_best"] >= row["ours_to_best_with_remat"] >= 1
    assert "vit-tiny, 8 x TITAN RTX, 8 GB, examples/s (with remat): DP OOM (" in paper_grid.line(row)
    console = Console(width=250, record=True)
    console.print(paper_grid.table([row]))
    text = console.export_text()
    assert "OOM / " in text
    assert "- / -" in text
    claims = paper_grid.claims([row])
    assert [claim.holds for claim in claims] == [True, True]
    assert "(vit-tiny, 8 devices, 8 GB)" in claims[0].claim
    slower = row | {"ours_to_best": 0.5}
    assert [claim.holds for claim in paper_grid.claims([row, slower])] == [False, True]
    assert paper_grid.claims([row | {"ours_to_best": None, "ours_to_best_with_remat": None}]) == []


def test_what_fits_less_memory_is_not_searched_again(paper_grid, path, found):
    model, setting = ModelSpec.load(path), paper_grid.Setting(path, DEVICES, ())
    way = paper_grid.ways(DEVICES)["ZeRO-3"]
    known = found["ZeRO-3+remat"]
    needed = known.prediction.largest.total_bytes
    assert paper_grid.best(model, way, setting, needed, None, known=known) is known
    assert paper_grid.best(model, way, setting, needed, None, known="OOM") == "OOM"
