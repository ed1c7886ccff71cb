"""`galvatron-jax profile`: the live devices, and a model's layers on them, measured."""

from __future__ import annotations

from pathlib import Path

from galvatron_jax.api import profile_model
from galvatron_jax.cli.arguments import Profile
from galvatron_jax.cli.calibrate import calibrate
from galvatron_jax.cli.config import load_model_config
from galvatron_jax.cli.devices import describe_devices, use_virtual_cpus
from galvatron_jax.cli.models import load_model
from galvatron_jax.cli.output import Output
from galvatron_jax.errors import InputError
from galvatron_jax.models import registry
from galvatron_jax.report.clusters import cluster_table, profile_report


def run(arguments: Profile, output: Output) -> int:
    """Measures (what the cache does not hold) or calibrates, prints the tables and writes the documents.

    Raises:
        InputError: when neither a model nor a run is named, or both.
    """
    if (arguments.model is None) == (not arguments.from_run):
        raise InputError("Name what to profile: --model to measure one, or --from-run for the numbers of earlier runs.")
    if arguments.model is None:
        return calibrate(arguments.from_run, arguments.out, output)
    use_virtual_cpus(arguments.virtual_cpus)
    config = load_model_config(arguments.model, families=registry.families())
    loaded = load_model(config, batch_size=arguments.global_batch)
    output.say(f"Profiling {loaded.name} on {describe_devices()} …")
    profiled = profile_model(
        loaded.model,
        loaded.loss_fn,
        loaded.example_batch,
        num_microbatches=arguments.num_microbatches,
        cache_dir=arguments.cache_dir,
        name=loaded.name,
    )
    folder = Path(arguments.out)
    for name, document in (
        ("cluster", profiled.cluster),
        ("model", profiled.model),
        ("profile", profiled.profile),
    ):
        document.save(folder / f"{name}.json")
    output.show([cluster_table(profiled.cluster), *profile_report(profiled.profile, model=profiled.model)])
    output.say(f"Written to {folder}: cluster.json, model.json, profile.json")
    output.result(
        {
            "cluster": profiled.cluster.model_dump(mode="json"),
            "profile": profiled.profile.model_dump(mode="json"),
            "output": str(folder),
        }
    )
    return 0
