"""Configurations: every fault at once, with its path and the near name; overrides; what `--model` takes."""

import tomllib
from pathlib import Path

import pytest

from galvatron_jax.cli.config import RunConfig, load_model_config, load_run_config
from galvatron_jax.errors import DocumentError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
FAMILIES = ("gpt2", "llama")


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_every_fault_of_a_configuration_is_named_at_once(tmp_path):
    path = write(
        tmp_path,
        """
        daat = 1
        [model]
        family = "gpt2"
        sise = "tiny"
        [train]
        steps = "3"
        [train.optimizer]
        name = "adamv"
        [plan]
        memory_per_device = "3x"
        """,
    )
    with pytest.raises(DocumentError, match="6 faults") as caught:
        load_run_config(path)
    message = str(caught.value)
    for fault in (
        "model.sise: unknown key. Did you mean 'size'?",
        "train.steps: found '3'; expected a valid integer",
        "train.global_batch: missing.",
        "train.optimizer.name: found 'adamv'",
        "plan.memory_per_device: '3x' is no size",
        "daat: unknown key. Did you mean 'data'?",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ('family = "gpt2"\nfactory = "a:b"', "not both"),
        ("", "either family"),
        ('factory = "a.b"', "must be written module:function"),
        ('factory = "a:b"\nsize = "tiny"', "belong to models of the zoo"),
    ],
)
def test_a_model_is_of_the_zoo_or_of_a_factory(tmp_path, model, message):
    path = write(tmp_path, f"[model]\n{model}\n[train]\nsteps = 1\nglobal_batch = 1")
    with pytest.raises(DocumentError, match=message):
        load_run_config(path)


def test_text_and_path_go_together(tmp_path):
    path = write(tmp_path, '[model]\nfamily = "gpt2"\n[train]\nsteps = 1\nglobal_batch = 1\n[data]\nsource = "text"')
    with pytest.raises(DocumentError, match="text needs a path"):
        load_run_config(path)


def test_overrides_change_single_values():
    config = load_run_config(
        str(QUICKSTART),
        overrides=["train.steps=7", "plan.memory_per_device=2GiB", "model.overrides.width=64", 'output.dir="x"'],
    )
    assert config.train.steps == 7
    assert config.plan.memory_per_device == "2GiB"
    assert config.model.overrides["width"] == 64
    assert config.model.overrides["vocab_size"] == 256
    assert config.output.dir == "x"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "write section.name=value"),
        ("=3", "write section.name=value"),
        ("train.step=3", "with train.step=3: 1 fault.*\n.*Did you mean 'steps'"),
        ("train.steps.more=3", "train.steps is a value, not a table"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(override, message):
    with pytest.raises(DocumentError, match=message):
        load_run_config(str(QUICKSTART), overrides=[override])


def test_a_configuration_survives_being_saved(tmp_path):
    config = load_run_config(str(QUICKSTART))
    config.save(tmp_path / "config.json")
    assert RunConfig.load(tmp_path / "config.json") == config


def test_a_missing_configuration_names_the_near_one():
    with pytest.raises(DocumentError, match=r"Did you mean .*quickstart\.toml"):
        load_run_config(str(QUICKSTART.with_name("quickstrat.toml")))


def test_a_model_is_named_by_family_and_size_or_file_or_factory(tmp_path):
    assert load_model_config("gpt2:small", families=FAMILIES).size == "small"
    assert load_model_config("mine:make", families=FAMILIES).factory == "mine:make"
    assert load_model_config(str(QUICKSTART), families=FAMILIES).overrides["num_layers"] == 4
    alone = tmp_path / "model.toml"
    alone.write_text('family = "llama"\nsize = "tiny"')
    assert load_model_config(str(alone), families=FAMILIES).family == "llama"
    with pytest.raises(DocumentError, match="Did you mean 'llama'"):
        load_model_config("lama", families=FAMILIES)


def test_the_quickstart_asks_for_bytes_and_the_standard_library():
    data = tomllib.loads(QUICKSTART.read_text())
    assert data["model"]["overrides"]["vocab_size"] == 256
    assert load_run_config(str(QUICKSTART)).data.source == "standard-library"
