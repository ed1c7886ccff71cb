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

    With --from-run, the numbers of earlier runs instead, scaled so that they would have predicted the measured steps.

    For example:
      galvatron-jax profile --model gpt2:small --global-batch 32 --out profiles/gpt2
      galvatron-jax profile --model mymodels:make_gpt --out profiles/mine
      galvatron-jax profile --from-run runs/dp --from-run runs/tp --out profiles/calibrated
    """

    out: str
    """Folder to write to."""
    model: str | None = None
    """Model of the zoo (family:size), a .toml file, or module:function of your own."""
    from_run: Annotated[Repeated, tyro.conf.arg(metavar="DIR")] = ()
    """Folder of a finished run; may be given several times, for runs of other plans with the same profile."""
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

    Exits 1 when no plan fits the budget (of a sweep: any), and says by how much, or when --check finds a faster plan.

    For example:
      galvatron-jax search --model llama:llama2-7b --cluster h100x64 --global-batch 512 --out plan.json
      galvatron-jax search --model gpt2:xl --cluster a100x8 --memory 40GiB --pipeline 1 --json
      galvatron-jax search --model mymodels:make_gpt --cluster live --profile measure
      galvatron-jax search --model runs/quickstart/model.json --cluster cluster.toml --global-batch 64:512:64 --explain
      galvatron-jax search --model bert:huge-32 --cluster titanrtx8 --sweep memory=8GiB:24GiB:4GiB --sweep devices=4,8
    """

    model: str
    """Model of the zoo (family:size), a .toml file, module:function of your own, or a saved ModelSpec (.json)."""
    cluster: str
    """Preset (such as h100x64), a ClusterSpec file, or live."""
    memory: str | None = None
    """Budget per device, such as 80GiB; by default all of the device's memory."""
    global_batch: str = "64"
    """Examples per step; of a list (64,128) or a range (64:512:64), the batch with the most examples per second."""
    num_microbatches: int | None = None
    """Micro-batches per step; left out, the search chooses."""
    pipeline: str | None = None
    """Numbers of device groups that stages may lie on, such as 1,2,4, 1 being no pipeline; left out, all that the
    cluster makes."""
    schedules: str | None = None
    """Schedules of pipelines, such as 1f1b,1f1b-stash,gpipe,interleaved; left out, all of them."""
    fewer_devices: bool = False
    """Also consider plans that leave a part of the cluster's devices unused, for a batch too small for all of them."""
    sum_gradients_in: str | None = None
    """Type in which gradients are summed over devices where their own is wider, such as bfloat16."""
    optimizer: str = "adamw"
    """Optimizer whose state is counted: adamw, adam, sgd, lion or adafactor."""
    profile: str | None = None
    """measure (live devices only), derive, or a saved profile; by default measured when live, else derived."""
    time_limit: float | None = None
    """Seconds after which the best plan so far is taken, marked as not proven; in a sweep, for each of its cells."""
    explain: bool = False
    """Show everything: the runners-up part by part, every stage, what the rules removed, what more of each resource
    would bring."""
    check: bool = False
    """Solve the winner's problem once more by an independent solver, and exit 1 if that finds a faster plan."""
    verify: int | None = None
    """Compile the best plans of N families by XLA's GPU compiler, as the command verify does, drop those that do not
    fit, and take the fastest that is left; the cluster must be a preset of h100, h200 or a100."""
    sweep: Annotated[Repeated, tyro.conf.arg(metavar="QUANTITY=VALUES")] = ()
    """Search every combination: memory=16GiB:80GiB:8GiB, devices=8,16,32, batch=64,128, intra-bandwidth=x0.5,x1,x2,
    inter-bandwidth=x1,x2; may be given several times."""
    out: str | None = None
    """File to write the plan to, .json or .toml; of a sweep its table, .csv or .json."""
    plot: str | None = None
    """File for a sweep's picture, .png, .svg or .pdf."""
    timeline: str | None = None
    """File for the timeline of the plan's schedule: .png, .svg or .pdf, or .json for https://ui.perfetto.dev."""
    virtual_cpus: int = 8
    """Virtual CPU devices for the cluster live, where the machine has no accelerator."""
    json: bool = False
    """Print one JSON document on stdout, everything else on stderr."""


@dataclass(frozen=True)
class Verify:
    """Compile a plan's step by XLA's GPU compiler for GPUs that are not here; compare with the prediction.

    Shows peak memory, every collective, FLOPs, and a replay of the compiled schedule. Exits 1 when the peak is over the
    budget. Needs no GPU, but the compiler: pip install 'galvatron-jax[verify]'.

    For example:
      galvatron-jax verify plan.json --model gpt2:small --target h100x64
      galvatron-jax verify plan.json --model llama:llama2-7b --target a100x8 --memory 40GiB --json
    """

    plan: Annotated[str, Positional, tyro.conf.arg(metavar="PLAN")]
    """Plan to compile, .json or .toml."""
    model: str
    """Model of the zoo (family:size), a .toml file, or module:function of your own."""
    target: str
    """Devices to compile for: h100, h200 or a100 with x and their number, such as h100x64."""
    memory: str | None = None
    """Budget per device, such as 80GiB; by default all of the device's memory."""
    optimizer: str = "adamw"
    """Optimizer of the step: adamw, adam, sgd, lion or adafactor."""
    json: bool = False
    """Print one JSON document on stdout, everything else on stderr."""


@dataclass(frozen=True)
class Show:
    """Print documents as tables: plans, profiles, clusters, models, or the folder of a run.

    For example:
      galvatron-jax show plan.json
      galvatron-jax show runs/quickstart
      galvatron-jax show runs --accuracy --plot accuracy.png
      galvatron-jax show h100x64
    """

    paths: Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="PATH")] = field(default_factory=tuple)
    """Files, folders of runs or profiles, or names of cluster presets."""
    accuracy: bool = False
    """Compare predicted with measured steps, of all runs in the folders and below."""
    plot: str | None = None
    """With --accuracy, file for a picture of the same, .png, .svg or .pdf."""
    json: bool = False
    """Print one JSON document on stdout, everything else on stderr."""


Command = Train | Profile | Search | Verify | Show
