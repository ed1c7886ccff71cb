"""`galvatron-jax search`: pipelines, batches, explanations, sweeps, checks, timelines; and models without JAX."""

import csv
import json
import math
import os
import subprocess
import sys

import optax
import pytest
from flax import nnx

import galvatron_jax as gx
from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.api.planning import make_request
from galvatron_jax.cli import questions
from galvatron_jax.cli.arguments import Search
from galvatron_jax.cli.config import OptimizerConfig
from galvatron_jax.cli.main import main
from galvatron_jax.cli.optimizers import make_optimizer
from galvatron_jax.cli.output import Output
from galvatron_jax.cost.derive import derive_profile
from galvatron_jax.models import gpt2
from galvatron_jax.report import figures
from galvatron_jax.search import check
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.profile import Provenance

CONFIG = gpt2.GPT2Config(vocab_size=64, seq_length=16, width=32, num_layers=2, num_heads=4, mlp_width=64)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small model, saved."""
    model = gx.auto_shard(gpt2.GPT2)(CONFIG, rngs=nnx.Rngs(0))
    request = make_request(
        model,
        gpt2.loss_fn,
        optax.adamw(1e-3),
        gpt2.example_batch(CONFIG, 16),
        memory_per_device=None,
        num_microbatches=None,
        name="small",
    )
    path = tmp_path_factory.mktemp("model") / "model.json"
    request.trace().spec.save(path)
    return path


@pytest.fixture
def search(capfd, path):
    def run(*arguments, cluster="h100x2", batch="16"):
        given = ["search", "--model", path, "--cluster", cluster, "--global-batch", batch, *arguments]
        return main([str(argument) for argument in given]), *capfd.readouterr()

    return run


def result(output):
    code, out, _ = output
    assert code == 0
    return json.loads(out)


def test_pipelines_are_searched_unless_one_stage_is_asked_for(search):
    document = result(search("--pipeline", "2", "--schedules", "gpipe", "--json"))
    plan = Plan.model_validate(document["plan"])
    assert (len(plan.stages), plan.schedule, plan.pipeline_axes) == (2, "gpipe", ("a",))
    every, alone = (result(search(*option, "--json")) for option in ([], ["--pipeline", "1"]))
    assert len(alone["plan"]["stages"]) == 1
    assert every["examples_per_s"] >= alone["examples_per_s"]
    assert every["examples_per_s"] >= document["examples_per_s"]


@pytest.mark.parametrize("pipeline", [1, 2])
def test_narrower_sums_of_gradients_are_priced_and_checked(search, pipeline):
    arguments = ("--pipeline", pipeline, "--num-microbatches", 2, "--check", "--json")
    own = result(search(*arguments, cluster="titanrtx8"))
    narrow = result(search(*arguments, "--sum-gradients-in", "bfloat16", cluster="titanrtx8"))
    plan = Plan.model_validate(narrow["plan"])
    assert (plan.gradient_sum_dtype, len(plan.stages)) == ("bfloat16", pipeline)
    assert narrow["examples_per_s"] > own["examples_per_s"]
    assert not narrow["check"]["refuted"]


def test_devices_may_stay_unused(search):
    every, some = (result(search(*option, "--json", cluster="h100x8")) for option in ([], ["--fewer-devices"]))
    devices = [math.prod(axis["size"] for axis in found["plan"]["mesh"]) for found in (every, some)]
    assert devices[0] == 8
    assert devices[1] < 8
    assert some["examples_per_s"] > every["examples_per_s"]
    code, out, _ = search("--fewer-devices", "--explain", "--check", cluster="h100x8")
    assert code == 0
    assert f"{devices[1]} of the 8 devices of h100x8 are worth using." in out


def test_of_a_range_of_batches_the_fastest_wins(search):
    document = result(search("--pipeline", "1", "--json", batch="8:32:8"))
    single = [result(search("--pipeline", "1", "--json", batch=batch))["examples_per_s"] for batch in (8, 16, 24, 32)]
    assert document["examples_per_s"] == max(single)


def test_a_saved_model_is_searched_without_jax(path):
    code = (
        "import sys; from galvatron_jax.cli.main import main; "
        f"assert main(['search', '--model', '{path}', '--cluster', 'h100x2', '--pipeline', '1']) == 0; "
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "Plan: small on 2 devices" in done.stdout


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adafactor"])
def test_a_saved_model_counts_the_optimizer_as_a_traced_one_does(path, name):
    model, config = ModelSpec.load(path), OptimizerConfig(name=name)
    expected = optimizer_memory(make_optimizer(config, steps=1), model)
    assert questions._optimizer_memory(config, model) == expected


def test_an_explanation_shows_stages_rivals_rules_and_what_binds(search):
    arguments = ["--pipeline", "1,2", "--memory", "700KiB", "--explain", "--time-limit", "5"]
    code, out, _ = search(*arguments)
    assert code == 0
    for part in (
        "Side by side: small on 2 devices",
        "│ the best ",
        "Pruning rules: ",
        "strategies that another one beats",
        "With more of each: ",
        "1.00 GiB more per device",
        "twice the devices (4)",
        "Most of the step is ",
    ):
        assert part in out
    document = result(search(*arguments, "--json"))
    assert [one["resource"] for one in document["sensitivities"]] == ["memory", "link in a node", "devices"]
    assert document["search"]["pruned"]


def test_a_plan_of_several_stages_is_saved_shown_and_drawn(search, capfd, tmp_path):
    plan, events = tmp_path / "plan.toml", tmp_path / "drawn" / "timeline.json"
    code, out, err = search("--pipeline", "2", "--out", plan, "--timeline", events)
    assert code == 0
    assert "2 stages (" in out
    assert "Stages (forward and backward of one micro-batch): small" in out
    assert f"Timeline written to {events}" in err
    assert json.loads(events.read_text())["traceEvents"]
    assert main(["show", str(plan)]) == 0
    shown = capfd.readouterr().out
    assert "Stages (forward and backward of one micro-batch): small" in shown
    assert "group 1" in shown
    assert "stages lie along" in shown


def test_one_stage_has_no_timeline_to_draw(search, tmp_path):
    code, _, err = search("--pipeline", "1", "--timeline", tmp_path / "timeline.json")
    assert code == 0
    assert "not written: the plan has one stage, so there is no schedule to draw" in err
    assert not (tmp_path / "timeline.json").exists()


def test_a_picture_of_the_timeline_is_written(search, tmp_path):
    pytest.importorskip("matplotlib")
    assert search("--pipeline", "2", "--timeline", tmp_path / "timeline.svg")[0] == 0
    assert (tmp_path / "timeline.svg").read_text().startswith("<?xml")


def test_the_check_confirms_the_winner_and_exits_1_when_it_does_not(search, monkeypatch):
    arguments = ["--pipeline", "1,2", "--memory", "700KiB", "--check"]
    code, out, err = search(*arguments)
    assert code == 0
    assert "Check: " in out
    assert "finds nothing faster than" in out
    assert "independent solver, for up to 60 s" in err
    document = result(search(*arguments, "--json"))
    assert document["check"]["refuted"] is False
    monkeypatch.setattr(check.Checked, "refuted", property(lambda self: True))
    code, out, _ = search(*arguments)
    assert code == 1
    assert "found a step of" in out


def test_a_sweep_prints_a_table_and_writes_it(search, tmp_path):
    arguments = ["--pipeline", "1", "--sweep", "memory=100KiB,400KiB,2MiB", "--sweep", "devices=1,2"]
    code, out, err = search(*arguments, "--out", tmp_path / "sweep.csv")
    assert code == 0
    assert "Sweep: small on NVIDIA H100 80GB HBM3, batch 16: 3 of memory × 2 of devices" in out
    assert "nothing fits: the nearest plan" in out
    assert f"Table written to {tmp_path / 'sweep.csv'}" in err
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["devices"] for row in rows] == ["1", "2"] * 3
    assert {row["fits"] for row in rows} == {"True", "False"}
    document = result(search(*arguments, "--out", tmp_path / "sweep.json", "--json"))
    assert json.loads((tmp_path / "sweep.json").read_text()) == document["sweep"]
    assert [cell["fits"] for cell in document["sweep"]] == [row["fits"] == "True" for row in rows]


def test_a_sweep_in_which_nothing_fits_exits_1(search):
    code, out, _ = search("--pipeline", "1", "--sweep", "memory=1KiB,2KiB")
    assert code == 1
    assert out.count("nothing fits: the nearest plan") == 2


def test_a_sweep_is_drawn(search, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["--pipeline", "1", "--sweep", "batch=8,16", "--sweep", "intra-bandwidth=x1,x2"]
    assert search(*arguments, "--plot", tmp_path / "plots" / "sweep.png")[0] == 0
    assert (tmp_path / "plots" / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", [["--sweep", "batch=8,16", "--plot"], ["--timeline"]])
def test_a_missing_matplotlib_is_noticed_before_the_search(search, monkeypatch, option):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    code, out, err = search(*option, "picture.png")
    assert (code, out) == (2, "")
    assert "picture.png needs matplotlib, which is not installed. Install it with" in err
    assert "pip install 'galvatron-jax[plot]'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", "two"], "--pipeline: 'two' is no whole number."),
        (["--pipeline", "3"], "No pipeline degree of (3,) can be made of 2 devices"),
        (["--schedules", "1f1c"], "--schedules: no schedule '1f1c' of pipelines. Did you mean '1f1b'?"),
        (["--time-limit", "0"], "--time-limit: 0 s is no time; give more than 0."),
        (["--num-microbatches", "3"], "A batch of 16 examples does not divide into 3 micro-batches; use one of 1, 2,"),
        (["--memory", "lots"], "--memory: 'lots' is no size in bytes"),
        (["--memory", "0"], "--memory: '0' is no budget; it must be positive"),
        (["--optimizer", "adamv"], "expected 'adamw'"),
        (["--profile", "measure"], "cannot be measured, for it holds no program to run. Give the model itself"),
        (["--profile", "nowhere.json"], "nowhere.json: no such file"),
        (["--plot", "x.png"], "--plot draws a sweep; give --sweep too, or --timeline"),
        (["--sweep", "batch=8", "--plot", "x.bmp"], "x.bmp: pictures are written to .png, .svg, .pdf files."),
        (["--timeline", "x.bmp"], "x.bmp: pictures are written to .png, .svg, .pdf, .json files."),
        (["--sweep", "batch=8", "--explain"], "--explain is about one plan, and --sweep finds many"),
        (["--sweep", "batch=8", "--check"], "--check is about one plan"),
        (["--sweep", "batch=8", "--out", "x.toml"], "x.toml: a sweep's table is written to .csv and .json files."),
        (["--out", "plan.csv"], "--out: plans are written to .json and .toml files, not plan.csv."),
        (["--sweep", "devices=12"], "No cluster preset 'h100x12'"),
        (["--sweep", "inter-bandwidth=x2"], "The sweep varies the bandwidth between nodes, but 'h100x2' has one node"),
        (["--fewer-devices", "--verify", "2"], "--verify compiles for the whole cluster, of which --fewer-devices may"),
        (["--sweep", "devises=8"], "--sweep devises=8: cannot vary 'devises'. Did you mean 'devices'?"),
    ],
)
def test_wrong_input_exits_2_and_says_what_to_change(search, arguments, message):
    code, out, err = search(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_another_models_profile_is_refused(search, path, tmp_path):
    profile = derive_profile(ModelSpec.load(path), cluster_preset("h100x2"))
    profile.save(tmp_path / "mine.json")
    assert search("--pipeline", "1", "--profile", tmp_path / "mine.json")[0] == 0
    profile.model_copy(update={"model_fingerprint": "other"}).save(tmp_path / "other.json")
    code, _, err = search("--profile", tmp_path / "other.json")
    assert code == 2
    assert "The profile was made for model other" in err


@pytest.mark.parametrize(
    ("provenance", "pipeline", "degrees"),
    [("measured", None, (1,)), ("measured", "1,2", (1, 2)), ("derived", None, None)],
)
def test_pipelines_need_a_profile_of_what_stages_send(path, tmp_path, capfd, provenance, pipeline, degrees):
    profile = derive_profile(ModelSpec.load(path), cluster_preset("h100x2"))
    profile.model_copy(update={"provenance": Provenance(provenance)}).save(tmp_path / "profile.json")
    arguments = Search(str(path), "h100x2", profile=str(tmp_path / "profile.json"), pipeline=pipeline)
    question = questions.make_question(arguments, questions.read_wishes(arguments), Output(as_json=False))
    assert question.space.pipeline_degrees == degrees
    said = "Only plans of one stage are searched: the profile has no timings of what stages send one another."
    assert (said in capfd.readouterr().err) == (degrees == (1,))


def test_an_infeasible_pipeline_names_the_groups_over_the_budget(search):
    code, out, err = search("--pipeline", "2", "--memory", "40KiB", "--json")
    assert code == 1
    message = json.loads(out)["error"]["message"]
    assert json.loads(out)["error"]["type"] == "InfeasibleError"
    assert "No plan of 'small' with a global batch of 16 fits in 40.00 KiB per device" in message
    assert "Over the budget: group 0 by " in message
    assert "What would fit: a budget of " in message
    assert "40.00 KiB" in err
