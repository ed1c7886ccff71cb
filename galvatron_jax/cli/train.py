"""`galvatron-jax train`: the main job."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import jax

from galvatron_jax.api import TrainStep, train_step
from galvatron_jax.cli.arguments import Train
from galvatron_jax.cli.config import DataConfig, DataSource, RunConfig, load_run_config
from galvatron_jax.cli.devices import describe_devices, use_virtual_cpus
from galvatron_jax.cli.models import LoadedModel, load_model
from galvatron_jax.cli.optimizers import make_optimizer
from galvatron_jax.cli.output import Output
from galvatron_jax.cli.runs import RUN_FILE
from galvatron_jax.errors import InputError
from galvatron_jax.profiler.cache import software_versions
from galvatron_jax.profiler.devices import peak_memory_bytes
from galvatron_jax.report.training import summary_table, training_progress
from galvatron_jax.runtime.checkpoint import Checkpoints
from galvatron_jax.runtime.data import (
    BatchSource,
    RandomBatches,
    TokenWindows,
    check_vocabulary,
    describe_bytes,
    standard_library_bytes,
    text_bytes,
)
from galvatron_jax.runtime.metrics import JsonLines
from galvatron_jax.runtime.trainer import Settings, Summary, Trainer
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.run import Run

DONE, FAILED, INTERRUPTED = 0, 1, 130


def run(arguments: Train, output: Output) -> int:
    """Trains as the configuration says.

    Returns:
        0 when all steps are done, 1 when the loss was no finite number, 130 when Ctrl-C stopped it.
    """
    config = load_run_config(arguments.config, overrides=_overrides(arguments))
    use_virtual_cpus(config.devices.virtual_cpus)
    loaded = load_model(config.model, batch_size=config.train.global_batch)
    # Wrong data should not be noticed after minutes of profiling.
    source = make_source(config.data, loaded)
    output.say(f"Training {loaded.name} on {describe_devices()} with {source.description}")
    step = _build(config, loaded)
    output.show(step.report())
    summary = _train(config, step, source, loaded, output, fresh=arguments.fresh)
    predicted = step.prediction.time.step_s if step.prediction else None
    _record(Path(config.output.dir) / RUN_FILE, step, summary)
    title = f"Trained {loaded.name} on {describe_devices()}"
    output.show([summary_table(summary, title=title, predicted_step_s=predicted, output=config.output.dir)])
    output.result(
        {
            "summary": dataclasses.asdict(summary),
            "predicted_step_s": predicted,
            "plan": step.plan.model_dump(mode="json"),
            "output": config.output.dir,
        }
    )
    return FAILED if summary.diverged else INTERRUPTED if summary.interrupted else DONE


def make_source(config: DataConfig, loaded: LoadedModel) -> BatchSource:
    """The batches that a configuration asks for.

    Raises:
        InputError: when the path is missing, or the data does not suit the model.
    """
    if config.source is DataSource.RANDOM:
        return RandomBatches(loaded.random_batch, seed=config.seed)
    check_vocabulary(loaded.vocabulary, model=loaded.name)
    if config.source is DataSource.TEXT:
        assert config.path is not None
        name, data = config.path, text_bytes(config.path)
    else:
        name, data = "the Python standard library's sources", standard_library_bytes()
    description = describe_bytes(name, data)
    return TokenWindows(data, example_batch=loaded.example_batch, seed=config.seed, description=description)


def _overrides(arguments: Train) -> list[str]:
    overrides = list(arguments.overrides)
    if arguments.steps is not None:
        overrides.append(f"train.steps={arguments.steps}")
    if arguments.output is not None:
        overrides.append(f'output.dir="{arguments.output}"')
    return overrides


def _build(config: RunConfig, loaded: LoadedModel) -> TrainStep:
    return train_step(
        loaded.model,
        loaded.loss_fn,
        make_optimizer(config.train.optimizer, steps=config.train.steps),
        loaded.example_batch,
        plan=config.plan.path,
        memory_per_device=config.plan.memory_per_device,
        num_microbatches=config.plan.num_microbatches,
        sum_gradients_in=config.plan.sum_gradients_in,
        profile=config.plan.profile,
        cache_dir=config.plan.cache_dir,
        name=loaded.name,
    )


def _train(
    config: RunConfig, step: TrainStep, source: BatchSource, loaded: LoadedModel, output: Output, *, fresh: bool
) -> Summary:
    folder = Path(config.output.dir)
    settings = Settings(
        steps=config.train.steps,
        seed=config.train.seed,
        log_every=config.train.log_every,
        checkpoint_every=config.train.checkpoint_every,
        tokens_per_step=loaded.tokens_per_batch,
        examples_per_step=config.train.global_batch,
    )
    predicted = step.prediction.time.step_s if step.prediction else None
    with Checkpoints(folder / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints:
        resume_step = _prepare(folder, step, checkpoints, config, output, fresh=fresh)
        metrics = JsonLines(folder / "metrics.jsonl", resume_step=resume_step)
        progress = training_progress(
            output.log, steps=settings.steps, predicted_step_s=predicted, log_every=settings.log_every
        )
        with metrics, progress as observe:
            trainer = Trainer(step, source, settings, checkpoints=checkpoints, sinks=(metrics,), observers=(observe,))
            return trainer.run()


def _prepare(
    folder: Path, step: TrainStep, checkpoints: Checkpoints, config: RunConfig, output: Output, *, fresh: bool
) -> int:
    """Writes the run's documents, and decides whether it resumes.

    Returns:
        Steps already done.

    Raises:
        InputError: when the folder holds an unfinished run of another model.
    """
    latest = checkpoints.latest_step or 0
    finished = latest >= config.train.steps
    if latest and (fresh or finished):
        output.say(f"Starting anew: the run in {folder} {'was finished' if finished else 'is deleted'}.")
        checkpoints.delete_all()
        latest = 0
    elif latest:
        _check_same_model(folder / "model.json", step.model_spec)
        output.say(f"Resuming the run in {folder} after step {latest}; --fresh would start anew.")
    (folder / RUN_FILE).unlink(missing_ok=True)
    documents: dict[str, Any] = {
        "config": config,
        "cluster": step.cluster,
        "model": step.model_spec,
        "profile": step.profile,
        "plan": step.plan,
    }
    for name, document in documents.items():
        document.save(folder / f"{name}.json")
    return latest


def _record(path: Path, step: TrainStep, summary: Summary) -> None:
    """Writes what the run measured beside what was predicted, unless it was too short or went wrong."""
    if summary.diverged or summary.median_step_s is None or summary.step_spread_s is None:
        return
    plan, model = step.plan, step.model_spec
    Run(
        model=model.name,
        model_fingerprint=model.fingerprint,
        device=jax.devices()[0].device_kind,
        num_devices=plan.num_devices,
        global_batch=plan.global_batch,
        step_s=summary.median_step_s,
        step_spread_s=summary.step_spread_s,
        steps=summary.timed_steps,
        prediction=plan.prediction,
        peak_memory_bytes=peak_memory_bytes(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        software=software_versions(),
    ).save(path)


def _check_same_model(path: Path, model: ModelSpec) -> None:
    if path.is_file():
        before = ModelSpec.load(path)
        if before.fingerprint != model.fingerprint:
            raise InputError(
                f"{path.parent} holds an unfinished run of another model ({before.name}, {before.fingerprint}; this is "
                f"{model.name}, {model.fingerprint}). Choose another output folder, or start anew with --fresh."
            )
