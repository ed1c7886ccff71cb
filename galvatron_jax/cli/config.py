"""The document that `galvatron-jax train` reads: model, data, training, plan and output of one run. No JAX."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from galvatron_jax.errors import DocumentError, GalvatronError
from galvatron_jax.spec import files
from galvatron_jax.spec.document import Document, Record
from galvatron_jax.spec.validation import did_you_mean, validate
from galvatron_jax.units import parse_bytes

Scalar = int | float | bool | str


class ModelConfig(Record):
    """Which model: one of the zoo by family and size, or a factory of the user's own."""

    family: str | None = None
    """Family of the zoo, such as `gpt2`."""
    size: str | None = None
    """Preset of the family, such as `small`; its defaults where left out."""
    overrides: dict[str, Scalar] = Field(default_factory=dict)
    """Fields of the family's configuration that differ from the preset."""
    factory: str | None = None
    """`module:function` of the user's own; the function takes the batch size and returns
    `(model, loss_fn, example_batch)`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelConfig:
        if (self.family is None) == (self.factory is None):
            raise ValueError("give either family (a model of the zoo) or factory (module:function), not both")
        if self.factory is not None and (self.size is not None or self.overrides):
            raise ValueError("size and overrides belong to models of the zoo; a factory takes the batch size only")
        if self.factory is not None and self.factory.count(":") != 1:
            raise ValueError(f"factory {self.factory!r} must be written module:function")
        return self


class DataSource(StrEnum):
    """Where batches come from."""

    STANDARD_LIBRARY = "standard-library"
    """The Python standard library's own sources, as bytes."""
    TEXT = "text"
    """A text file or folder, as bytes."""
    RANDOM = "random"
    """Random values, for benchmarks."""


class DataConfig(Record):
    """What to train on."""

    source: DataSource = DataSource.STANDARD_LIBRARY
    path: str | None = None
    """File or folder, for `text`."""
    seed: int = Field(default=0, ge=0)
    """Draws the windows."""

    @model_validator(mode="after")
    def _path_for_text(self) -> DataConfig:
        if (self.source is DataSource.TEXT) != (self.path is not None):
            raise ValueError("path goes with source = 'text', and text needs a path")
        return self


class OptimizerConfig(Record):
    """An optimizer of optax, with warm-up, cosine decay and clipping around it."""

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    """At its peak."""
    final_learning_rate: float | None = Field(default=None, ge=0)
    """At the last step, reached by a cosine; None keeps the peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """For `sgd`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """For `adamw` and `lion`."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest global norm of the gradients."""


class TrainConfig(Record):
    """How long and how to train."""

    steps: int = Field(ge=1)
    """Optimizer steps in all; a resumed run does what is left."""
    global_batch: int = Field(ge=1)
    """Examples per step, over all devices."""
    seed: int = Field(default=0, ge=0)
    """Initialises the parameters."""
    log_every: int = Field(default=10, ge=1)
    """Steps between records of metrics."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None writes only the last."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that stay."""
    optimizer: OptimizerConfig = OptimizerConfig()


class PlanConfig(Record):
    """How to choose the plan, or which to use."""

    path: str | None = None
    """A saved or hand-written plan; None searches."""
    memory_per_device: str | int | None = None
    """Budget such as `"20GiB"`; None means all of the device's memory."""
    num_microbatches: int | None = Field(default=None, ge=1)
    """None lets the search choose."""
    sum_gradients_in: str | None = None
    """Type in which gradients are summed over devices where their own is wider, such as `bfloat16`; None leaves the
    plan's own, or sums them in their own type."""
    profile: str = "measure"
    """`measure` (cached), `derive` (from the cluster's figures, no measurement), or the path of a saved profile."""
    cache_dir: str | None = None
    """Where measurements are kept; None means the user's cache folder."""

    @field_validator("memory_per_device")
    @classmethod
    def _is_size(cls, value: str | int | None) -> str | int | None:
        if value is not None and parse_bytes(value) <= 0:
            raise ValueError("a memory budget must be positive")
        return value


class DeviceConfig(Record):
    """Which devices the run uses."""

    virtual_cpus: int = Field(default=8, ge=1)
    """Virtual CPU devices where the machine has no accelerator."""


class OutputConfig(Record):
    """Where the run writes."""

    dir: str = "runs/train"
    """Folder of metrics, plan, model, profile and checkpoints; an interrupted run in it is resumed."""


class RunConfig(Document):
    """One training run."""

    version: int = 1
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    plan: PlanConfig = PlanConfig()
    devices: DeviceConfig = DeviceConfig()
    output: OutputConfig = OutputConfig()


def load_run_config(path: str, *, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a run's configuration and changes single values of it.

    Args:
        path: a `.toml` or `.json` file.
        overrides: such as ``train.steps=20``; values are read as TOML, and as text where that fails.

    Raises:
        DocumentError: naming every fault with its path.
    """
    data = files.read_data(path)
    changed = [_apply(data, override) for override in overrides]
    source = f"{path} with {', '.join(changed)}" if changed else path
    return validate(RunConfig, data, source)


def load_model_config(text: str, *, families: Iterable[str]) -> ModelConfig:
    """Reads what `--model` takes.

    Args:
        text: a `.toml` or `.json` file (of a model, or of a run with a model in it), `family`, `family:size`, or
            `module:function`.
        families: names of the zoo's families.

    Raises:
        DocumentError: when the file is faulty, or the name is neither a family nor a factory.
    """
    families = list(families)
    if text.endswith((".toml", ".json")):
        data = files.read_data(text)
        inner = data.get("model")
        return validate(ModelConfig, inner if isinstance(inner, dict) else data, text)
    head, _, tail = text.partition(":")
    if head in families:
        return ModelConfig(family=head, size=tail or None)
    if tail and tail.isidentifier():
        return ModelConfig(factory=text)
    raise DocumentError(
        f"{text!r} is no model: give a family of the zoo ({', '.join(families)}), family:size, a .toml file, or "
        f"module:function.{did_you_mean(head, families)}"
    )


def _apply(data: dict[str, Any], override: str) -> str:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise DocumentError(f"Cannot read {override!r}: write section.name=value, such as train.steps=20.")
    table = data
    for position, name in enumerate(names[:-1]):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise DocumentError(f"Cannot set {key}: {'.'.join(names[: position + 1])} is a value, not a table.")
    table[names[-1]] = _value(text.strip())
    return override


def _value(text: str) -> Any:
    try:
        return files.parse_toml(f"value = {text}", source="override")["value"]
    except GalvatronError:
        return text
