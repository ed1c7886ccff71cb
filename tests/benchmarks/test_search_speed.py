"""How search times grow, as a table and as a picture."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = [
    {
        "case": f"{grows} {number}",
        "grows": grows,
        "grown_to": number,
        "cpu_s": seconds,
        "shares": {"planning": 0.5, "pricing": 0.25, "solving": 0.25},
        "host_memory_gib": 0.1,
        "fits": fits,
        "gap": gap,
    }
    for grows, number, seconds, fits, gap in (
        ("", 0, 9.0, True, 0.0),
        ("layers", 8, 0.5, True, 0.0),
        ("layers", 32, 0.75, True, 0.0123),
        ("memory, GiB", 20, 0.25, False, 0.0),
    )
]
RECORD = {"hardware": "1-core CPU", "date": "2026-01-01", "results": ROWS}


@pytest.fixture
def search_speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("search_speed")


def test_growth_is_a_table(search_speed: ModuleType) -> None:
    console = Console(width=120, record=True)
    console.print(search_speed.growth_table(ROWS))
    lines = console.export_text().splitlines()
    assert not any("9.00" in line for line in lines)
    assert [line.split()[1:11:2] for line in lines if "layers  " in line] == [
        ["layers", "8", "0.50", "50%", "25%"],
        ["layers", "32", "0.75", "50%", "25%"],
    ]
    assert any("1.23%" in line for line in lines)
    assert any("memory, GiB" in line and "nothing fits" in line for line in lines)


def test_every_case_of_growth_says_what_grows_to_how_much(search_speed: ModuleType) -> None:
    cases = search_speed.growth(full=True)
    assert {case.grows for case in cases} == {"layers", "devices", "memory, GiB"}
    for quantity in ("layers", "devices", "memory, GiB"):
        sizes = [case.grown_to for case in cases if case.grows == quantity]
        assert sizes == sorted(set(sizes))
        assert len(sizes) >= 5


def test_growth_is_drawn_beside_the_record(search_speed: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "search_speed.somewhere.json"
    path.write_text(json.dumps(RECORD))
    search_speed.draw(path)
    drawn = (tmp_path / "search_speed.somewhere.svg").read_text()
    assert drawn.startswith("<?xml")
    assert drawn.count('<g id="axes_') == 2


def test_without_matplotlib_the_record_is_all(
    search_speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_speed, "find_spec", lambda name: None)
    search_speed.draw(tmp_path / "record.json")
    assert "is not drawn: matplotlib, the `plot` extra, is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
