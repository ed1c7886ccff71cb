"""The commands: exit codes, one JSON document on stdout, logs on stderr."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from galvatron_jax.cli import arguments
from galvatron_jax.cli.main import main
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.presets import cluster_preset

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.toml")
SEARCH = ["search", "--model", "gpt2:tiny", "--cluster", "h100x8", "--global-batch", "16", "--pipeline", "1"]
FACTORY = """
import jax, jax.numpy as jnp
from flax import nnx

class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
    def __call__(self, x):
        return self.linear(x)

def make(batch_size):
    example = {"x": jax.ShapeDtypeStruct((batch_size, 8), jnp.float32)}
    return Net(rngs=nnx.Rngs(0)), lambda model, batch: jnp.mean(model(batch["x"]) ** 2), example

def wrong(batch_size):
    return 3
"""


def run(capfd, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.toml"], "nowhere.toml: no such file"),
        (["train", QUICKSTART, "--set", "train.step=3"], "Did you mean 'steps'"),
        (["train", QUICKSTART, "--set", "data.source=text", "--set", "data.path=nowhere.txt"], "No such data"),
        (["train", QUICKSTART, "--set", "model.overrides.vocab_size=99"], "need a vocabulary of 256"),
        (["train", QUICKSTART, "--set", "model.overrides.widht=99"], "Did you mean 'width'"),
        (["train", QUICKSTART, "--steps", "5"], "warmup_steps is 10, but the run has 5 steps"),
        (["search", "--model", "gpt2:tiny", "--cluster", "h10x8"], "Did you mean 'h100x8'"),
        (["search", "--model", "gpt2:tiyn", "--cluster", "h100x8"], "Did you mean 'tiny'"),
        (["search", "--model", "gtp2:tiny", "--cluster", "h100x8"], "Did you mean 'gpt2'"),
        (["search", "--model", "gpt2", "--cluster", "h100x8"], "No size of gpt2 given"),
        ([*SEARCH, "--optimizer", "adamv"], "expected 'adamw'"),
        ([*SEARCH, "--memory", "lots"], "'lots' is no size"),
        ([*SEARCH, "--num-microbatches", "3"], "does not divide into 3 micro-batches"),
        (["show", "nowhere.json"], "no such file"),
        (["show", "h10x8"], "Did you mean 'h100x8'"),
        (["show"], "Name what to show"),
    ],
)
def test_wrong_input_exits_2_and_says_what_to_change(capfd, arguments, message):
    code, out, err = run(capfd, *arguments)
    assert code == 2
    assert out == ""
    assert message in err


@pytest.mark.parametrize("arguments", [["serch"], ["train"], ["search", "--model", "gpt2:tiny"], ["show", "--jsn"]])
def test_wrong_options_exit_2(capfd, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("command", ["train", "profile", "search", "verify", "show"])
def test_every_command_has_help_with_examples(capfd, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"galvatron-jax {command} " in capfd.readouterr().out.split("For example:")[1]


@pytest.mark.parametrize(
    "command", [arguments.Train, arguments.Profile, arguments.Search, arguments.Verify, arguments.Show]
)
def test_every_option_is_in_the_documentation(command):
    described = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    positional, renamed = {"config", "paths", "plan"}, {"overrides": "set"}
    names = [renamed.get(one.name, one.name) for one in fields(command) if one.name not in positional]
    assert [name for name in names if f"--{name.replace('_', '-')}" not in described] == []


def test_errors_are_json_too(capfd):
    code, out, err = run(capfd, *SEARCH, "--num-microbatches", "3", "--json")
    assert code == 2
    assert json.loads(out)["error"]["type"] == "InputError"
    assert "does not divide" in err


def test_search_prints_one_json_document_and_writes_the_plan(capfd, tmp_path):
    code, out, _ = run(capfd, *SEARCH, "--out", tmp_path / "plan.json", "--json")
    assert code == 0
    document = json.loads(out)
    plan = Plan.load(tmp_path / "plan.json")
    assert document["plan"] == plan.model_dump(mode="json")
    assert plan.num_devices == 8
    assert document["search"]["proven"]


def test_search_prints_tables_for_people(capfd):
    code, out, err = run(capfd, *SEARCH)
    assert code == 0
    assert "Plan: gpt2:tiny on 8 devices" in out
    assert "Predicted memory per device" in out
    assert "Tracing" in err


def test_nothing_that_fits_exits_1(capfd):
    code, out, err = run(capfd, *SEARCH, "--memory", "10KiB", "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "InfeasibleError"
    assert "10.00 KiB" in err


def test_a_factory_is_found_in_the_folder_the_command_runs_in(capfd, tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["--cluster", "h100x8", "--global-batch", "8"]
    code, out, _ = run(capfd, "search", "--model", "own_models:make", *arguments)
    assert code == 0
    assert "own_models:make on 8 devices" in out
    code, _, err = run(capfd, "search", "--model", "own_models:mkae", *arguments)
    assert code == 2
    assert "no function 'mkae'" in err
    code, _, err = run(capfd, "search", "--model", "own_models:wrong", *arguments)
    assert code == 2
    assert "returned a int" in err


def test_show_tells_documents_apart(capfd, tmp_path):
    cluster_preset("a100x8").save(tmp_path / "cluster.json")
    code, out, _ = run(capfd, "show", tmp_path / "cluster.json", "h100x64")
    assert code == 0
    assert "Cluster a100x8" in out
    assert "Cluster h100x64" in out
    code, out, _ = run(capfd, "show", tmp_path, "--json")
    assert json.loads(out)[str(tmp_path / "cluster.json")]["name"] == "a100x8"
    (tmp_path / "other.json").write_text('{"a": 1}')
    code, _, err = run(capfd, "show", tmp_path / "other.json")
    assert code == 2
    assert "no plan, profile, cluster or model" in err


def test_show_leaves_jax_out():
    code = (
        "import sys; from galvatron_jax.cli.main import main; main(['show', 'h100x8']); assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_training_writes_its_documents_and_resumes(capfd, tmp_path):
    arguments = ["train", QUICKSTART, "--output", tmp_path, "--json"]
    for setting in (
        "plan.profile=derive",
        "model.overrides.width=32",
        "model.overrides.mlp_width=64",
        "model.overrides.seq_length=32",
        "train.optimizer.warmup_steps=0",
    ):
        arguments += ["--set", setting]
    code, out, err = run(capfd, *arguments, "--steps", "6")
    assert code == 0, err
    document = json.loads(out)
    assert document["summary"]["last_step"] == 6
    assert {"config.json", "cluster.json", "model.json", "profile.json", "plan.json", "metrics.jsonl", "run.json"} <= {
        entry.name for entry in tmp_path.iterdir()
    }
    code, out, err = run(capfd, *arguments, "--steps", "9")
    assert code == 0, err
    assert json.loads(out)["summary"]["first_step"] == 6
    assert "Resuming" in err
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 9
    code, out, err = run(capfd, *arguments, "--steps", "12", "--set", "model.overrides.num_layers=2")
    assert code == 2
    assert "unfinished run of another model" in err
