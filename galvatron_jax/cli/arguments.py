"""What each command takes. The field docstrings are the help texts. No JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

Positional = tyro.conf.Positional
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Train:
    """Train a model: profile (cached), search, print the plan and why, train, write metrics, plan and checkpoint.

    Uses the accelerators there are, else virtual CPU devices. A run that was interrupted is resumed.

    For example:
      galvatron-jax train configs/quickstart.toml
      galvatron-jax train configs/quickstart.toml --steps 20 --output /tmp/run
      galvatron-jax train configs/quickstart.toml --set plan.memory_per_device=64MiB --set train.global_batch=64
    """

    config: Annotated[str, Positional, tyro.conf.arg(metavar="CONFIG")]
    """Configuration of the run, .toml or .json."""
    overrides: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="KEY=VALUE")
    ] = ()
    """Change a value of the configuration, such as --set train.global_batch=64; may be given several times."""
    steps: int | None = None
    """Short for train.steps=N."""
    output: str | None = None
    """Short for output.dir=DIR."""
    fresh: bool = False
    """Start anew even where the output folder holds an unfinished run, which is deleted."""
    json: bool = False
    """Print one JSON document on stdout, everything else on stderr."""


@dataclass(frozen=True)
class Profile:
    """Measure the live devices and a model's layers on them; write cluster.json, profile.json and model.json.

    For example:
      galvatron-jax profile --model gpt2:small --global-batch 32 --out profiles/gpt2
      galvatron-jax profile --model mymodels:make_gpt --out profiles/mine
    """

    model: str
    """Model of the zoo (family:size), a .toml file, or module:function of your own."""
    out: str
    """Folder to write to."""
    global_batch: int = 8
    """Examples per step that the plans to come will have."""
    num_microbatches: int | None = None
    """Micro-batches per step; left out, those that the search may choose."""
    cache_dir: str | None = None
    """Where measurements are kept; the user's cache folder by default."""
    virtual_cpus: int = 8
    """Virtual CPU devices where the machine has no accelerator."""
    json: bool = False
    """Print one JSON document on stdout, everything else on stderr."""


@dataclass(frozen=True)
class Search:
    """Find the best plan for a model on a cluster, which need not be here.

    Exits 1 when no plan fits the budget, and says by how much.

    For example:
      galvatron-jax search --model llama:llama2-7b --cluster h100x64 --global-batch 512 --out plan.json
      galvatron-jax search --model gpt2:xl --cluster a100x8 --memory 40GiB --json
      galvatron-jax search --model mymodels:make_gpt --cluster live --profile measure
    """

    model: str
    """Model of the zoo (family:size), a .toml file, or module:function of your own."""
    cluster: str
    """Preset (such as h100x64), a ClusterSpec file, or live."""
    memory: str | None = None
    """Budget per device, such as 80GiB; by default all of the device's memory."""
    global_batch: int = 64
    """Examples per step."""
    num_microbatches: int | None = None
    """Micro-batches per step; left out, the search chooses."""
    optimizer: str = "adamw"
    """Optimizer whose state is counted: adamw, adam, sgd, lion or adafactor."""
    profile: str | None = None
    """measure (live devices only), derive, or a saved profile; by default measured when live, else derived."""
    out: str | None = None
    """File to write the plan to, .json or .toml."""
    virtual_cpus: int = 8
    """Virtual CPU devices for the cluster live, where the machine has no accelerator."""
    json: bool = False
    """Print one JSON document on stdout, everything else on stderr."""


@dataclass(frozen=True)
class Show:
    """Print documents as tables: plans, profiles, clusters, models, or the folder of a run.

    For example:
      galvatron-jax show plan.json
      galvatron-jax show runs/quickstart
      galvatron-jax show h100x64
    """

    paths: Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="PATH")] = field(default_factory=tuple)
    """Files, folders of runs or profiles, or names of cluster presets."""
    json: bool = False
    """Print one JSON document on stdout, everything else on stderr."""


Command = Train | Profile | Search | Show
