"""`galvatron-jax verify`, and `search --verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from galvatron_jax.cli.main import main
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Stage
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.verify import targets
from tests.verify.compiler import needs_compiler

pytestmark = pytest.mark.standard_promotion

MODEL = """
family = "gpt2"
size = "tiny"
[overrides]
num_layers = 2
width = 32
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A plan and a model."""
    strategy = LayerStrategy(dp=("a", "b", "c"))
    plan = Plan(
        model="gpt2",
        mesh=tuple(MeshAxis(name=name, size=2) for name in "abc"),
        global_batch=16,
        stages=(Stage(groups=(LayerGroup(start=0, stop=4, strategy=strategy),)),),
        batch_axes=strategy.dp,
    )
    plan.save(tmp_path / "plan.json")
    (tmp_path / "model.toml").write_text(MODEL)
    return tmp_path / "plan.json", tmp_path / "model.toml"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def called(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return called


@needs_compiler
def test_verify_prints_tables_or_one_document(run: Any, files: tuple[Path, Path]) -> None:
    plan, model = files
    code, out, _ = run("verify", plan, "--model", model, "--target", "h100x8")
    assert code == 0
    for expected in ("Memory per device by XLA's compiler", "Collectives of a step", "Replay of the compiled schedule"):
        assert expected in out
    code, out, _ = run("verify", plan, "--model", model, "--target", "a100x8", "--memory", "1KiB", "--json")
    assert code == 1
    document = json.loads(out)
    assert not document["fits"]
    assert document["budget_bytes"] == 1024
    assert document["memory"]["argument_bytes"] == _arguments(document)
    assert {c["operation"] for c in document["collectives"]} == {"all-reduce"}
    assert document["replay"]["step_s"] > 0


def _arguments(document: dict[str, Any]) -> int:
    memory = document["prediction"]["memory"][0]
    return sum(memory[f"{part}_bytes"] for part in ("parameter", "optimizer", "batch", "state"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "nowhere.json"}, "no such file"),
        ({"target": "h10x8"}, "Did you mean 'h100x8'"),
        ({"target": "rtx4090x8"}, "Targets: h100, h200, a100"),
        ({"model": "gtp2:tiny"}, "Did you mean 'gpt2'"),
        ({"memory": "lots"}, "'lots' is no size"),
        ({"optimizer": "adamv"}, "expected 'adamw'"),
    ],
)
def test_wrong_input_exits_2(run: Any, files: tuple[Path, Path], changes: dict[str, str], message: str) -> None:
    given = {"plan": str(files[0]), "model": str(files[1]), "target": "h100x8"} | changes
    options = [text for name, value in given.items() if name != "plan" for text in (f"--{name}", value)]
    code, out, err = run("verify", given["plan"], *options)
    assert (code, out) == (2, "")
    assert message in err


def test_without_the_compiler_it_exits_2_and_says_how_to_install_it(
    run: Any, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax.experimental import topologies

    def missing(**_: object) -> None:
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(targets, "plugin_installed", lambda: False)
    plan, model = files
    for arguments in (
        ("verify", plan, "--model", model, "--target", "h100x8"),
        ("search", "--model", model, "--cluster", "h100x8", "--global-batch", "16", "--verify", "2"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "pip install 'galvatron-jax[verify]'" in err


@needs_compiler
def test_search_verifies_the_best_plans_and_drops_those_that_do_not_fit(run: Any, files: tuple[Path, Path]) -> None:
    question = ("search", "--model", files[1], "--cluster", "h100x8", "--global-batch", "16", "--pipeline", "1")
    code, out, _ = run(*question, "--verify", "2", "--json")
    assert code == 0
    document = json.loads(out)
    assert [one["fits"] for one in document["verified"]] == [True, True]
    assert document["plan"] == document["verified"][0]["plan"]


@needs_compiler
def test_the_fastest_plan_that_the_compiler_fits_wins(
    run: Any, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the compiler's peak of the search's winner were too large."""
    from galvatron_jax.api import verification

    real, found = verification.verify_request, []

    def verify(request: Any, plan: Plan, *, target: str) -> Any:
        one = real(request, plan, target=target)
        if not found:
            object.__setattr__(one, "budget_bytes", one.memory.peak_bytes - 1)
        found.append(one)
        return one

    monkeypatch.setattr(verification, "verify_request", verify)
    question = ("search", "--model", files[1], "--cluster", "h100x8", "--global-batch", "16", "--pipeline", "1")
    code, out, err = run(*question, "--verify", "2", "--json")
    assert code == 0
    document = json.loads(out)
    assert [one["fits"] for one in document["verified"]] == [False, True]
    assert document["plan"] == document["verified"][1]["plan"]
    assert "does not fit: dropped" in err
    found.clear()
    code, out, err = run(*question, "--verify", "1")
    assert code == 1
    assert "None of the 1 plans compiled fits" in err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--verify", "0"], "0 plans are none"),
        (["--verify", "1", "--sweep", "devices=4,8"], "leave one of them out"),
    ],
)
def test_options_that_do_not_go_together_exit_2(run: Any, extra: list[str], message: str) -> None:
    code, out, err = run("search", "--model", "gpt2:tiny", "--cluster", "h100x8", *extra)
    assert (code, out) == (2, "")
    assert message in err


def test_a_saved_model_cannot_be_compiled(run: Any) -> None:
    code, _, err = run("search", "--model", "model.json", "--cluster", "h100x8", "--verify", "1")
    assert code == 2
    assert "holds no program" in err
