"""What `galvatron-jax search` is asked: its arguments read, and the model, cluster and profile found.

A saved `ModelSpec` needs neither tracing nor JAX; a model of the zoo or of the user's own is traced first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from galvatron_jax.cli.arguments import Search
from galvatron_jax.cli.config import OptimizerConfig
from galvatron_jax.cli.output import Output
from galvatron_jax.cli.ranges import parse_counts, parse_memory, parse_schedules, parse_sweep
from galvatron_jax.errors import InputError
from galvatron_jax.report.figures import check_figure
from galvatron_jax.report.sweeps import check_sweep_file
from galvatron_jax.report.timelines import EVENTS_ENDING
from galvatron_jax.search import OptimizerMemory, SearchSpace
from galvatron_jax.search.question import Question
from galvatron_jax.search.sweeps import SweepAxis
from galvatron_jax.spec import files
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.profile import CollectiveKind, Profile, Provenance
from galvatron_jax.spec.validation import validate

DERIVE, MEASURE, LIVE = "derive", "measure", "live"

_SLOTS = {
    "adamw": (("same", "same"), 4),
    "adam": (("same", "same"), 4),
    "sgd": (("same",), 0),
    "lion": (("same",), 4),
}
"""State of the optimizers that `--optimizer` names: arrays like each parameter, and bytes of counters."""


@dataclass(frozen=True)
class Wishes:
    """The arguments, read and checked before anything is traced."""

    batches: tuple[int, ...]
    memory_bytes: int | None
    space: SearchSpace
    axes: tuple[SweepAxis, ...]
    optimizer: OptimizerConfig


def read_wishes(arguments: Search) -> Wishes:
    """Reads the arguments.

    Raises:
        DocumentError: for an unknown optimizer.
        InputError: naming the first argument that is wrong, or does not go with the others.
    """
    batches = parse_counts(arguments.global_batch, option="--global-batch")
    _check_files(arguments)
    if arguments.time_limit is not None and arguments.time_limit <= 0:
        raise InputError(f"--time-limit: {arguments.time_limit:g} s is no time; give more than 0.")
    if arguments.fewer_devices and arguments.verify is not None:
        raise InputError(
            "--verify compiles for the whole cluster, of which --fewer-devices may leave a part unused: leave it out, "
            "and verify what it finds with the command verify."
        )
    count = arguments.num_microbatches
    wrong = [batch for batch in batches if count is not None and (count < 1 or batch % count)]
    if wrong:
        divisors = ", ".join(str(n) for n in range(1, wrong[0] + 1) if wrong[0] % n == 0)
        raise InputError(
            f"A batch of {wrong[0]} examples does not divide into {count} micro-batches; use one of {divisors}, or "
            "another batch size."
        )
    pipeline = arguments.pipeline
    space = SearchSpace(
        num_microbatches=None if count is None else (count,),
        pipeline_degrees=None if pipeline is None else parse_counts(pipeline, option="--pipeline"),
        gradient_sum_dtype=arguments.sum_gradients_in,
    )
    if arguments.schedules is not None:
        space = replace(space, schedules=parse_schedules(arguments.schedules))
    return Wishes(
        batches=batches,
        memory_bytes=None if arguments.memory is None else parse_memory(arguments.memory),
        space=space,
        axes=parse_sweep(arguments.sweep),
        optimizer=validate(OptimizerConfig, {"name": arguments.optimizer}, "the command line"),
    )


def make_question(arguments: Search, wishes: Wishes, output: Output) -> Question:
    """Finds the model (tracing it where it is no document), the cluster and the profile.

    Raises:
        GalvatronError: when one of them is missing, faulty, or does not go with the others.
    """
    if _is_model_spec(arguments.model):
        question = _saved_question(arguments, wishes, output)
    else:
        # It imports JAX, which a saved model does not need.
        from galvatron_jax.cli.traced import traced_question

        question = traced_question(arguments, wishes, output)
    question = replace(question, fewer_devices=arguments.fewer_devices)
    if question.profile is None or question.space.pipeline_degrees is not None or _prices_pipelines(question.profile):
        return question
    output.say(
        "Only plans of one stage are searched: the profile has no timings of what stages send one another. For "
        "pipelines search with --profile derive."
    )
    return replace(question, space=replace(question.space, pipeline_degrees=(1,)))


def _saved_question(arguments: Search, wishes: Wishes, output: Output) -> Question:
    model = ModelSpec.load(arguments.model)
    output.say(f"Searching plans of {model.name} for {arguments.cluster} …")
    return Question(
        model=model,
        cluster=_cluster(arguments),
        global_batches=wishes.batches,
        optimizer=_optimizer_memory(wishes.optimizer, model),
        profile=_profile(arguments, model),
        memory_bytes=wishes.memory_bytes,
        space=wishes.space,
    )


def _prices_pipelines(profile: Profile) -> bool:
    derived = profile.provenance is Provenance.DERIVED
    return derived or any(timing.kind is CollectiveKind.PERMUTE for timing in profile.collectives)


def _check_files(arguments: Search) -> None:
    if arguments.plot is not None:
        if not arguments.sweep:
            raise InputError("--plot draws a sweep; give --sweep too, or --timeline for the schedule of one plan.")
        check_figure(arguments.plot)
    if arguments.timeline is not None:
        check_figure(arguments.timeline, also=(EVENTS_ENDING,))
    if arguments.sweep:
        single = [name for name in ("explain", "check", "timeline") if getattr(arguments, name)]
        if single:
            raise InputError(f"--{single[0]} is about one plan, and --sweep finds many; leave one of them out.")
        if arguments.out is not None:
            check_sweep_file(arguments.out)
    elif arguments.out is not None and Path(arguments.out).suffix not in (".json", ".toml"):
        raise InputError(f"--out: plans are written to .json and .toml files, not {arguments.out}.")


def _is_model_spec(path: str) -> bool:
    """Whether `--model` names a saved `ModelSpec`, not a configuration."""
    return path.endswith(".json") and "kinds" in files.read_data(path)


def _cluster(arguments: Search) -> ClusterSpec:
    if arguments.cluster == LIVE:
        from galvatron_jax.cli.traced import live_cluster  # Its devices are JAX's.

        return live_cluster(arguments)
    if Path(arguments.cluster).suffix in (".json", ".toml"):
        return ClusterSpec.load(arguments.cluster)
    return cluster_preset(arguments.cluster)


def _optimizer_memory(config: OptimizerConfig, model: ModelSpec) -> OptimizerMemory:
    if config.name in _SLOTS:
        return OptimizerMemory(*_SLOTS[config.name])
    from galvatron_jax.cli.traced import optimizer_memory_of  # Its state depends on each parameter's shape.

    return optimizer_memory_of(config, model)


def _profile(arguments: Search, model: ModelSpec) -> Profile | None:
    if arguments.profile == MEASURE:
        raise InputError(
            f"A saved model such as {arguments.model} cannot be measured, for it holds no program to run. Give the "
            f"model itself, or a saved profile of {model.name!r}."
        )
    return None if arguments.profile in (None, DERIVE) else Profile.load(arguments.profile)
