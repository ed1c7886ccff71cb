"""`galvatron-jax show`: documents as tables. No JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType

from galvatron_jax.cli.arguments import Show
from galvatron_jax.cli.output import Output
from galvatron_jax.cli.runs import RUN_FILE, find_runs
from galvatron_jax.errors import DocumentError, InputError
from galvatron_jax.report.accuracy import accuracy, accuracy_figure, accuracy_table, run_facts
from galvatron_jax.report.clusters import cluster_table, profile_report
from galvatron_jax.report.figures import check_figure, save_figure
from galvatron_jax.report.models import model_table
from galvatron_jax.report.plans import plan_facts, plan_report
from galvatron_jax.spec import files
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.document import Document
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.profile import Profile
from galvatron_jax.spec.run import Run

_SIGNS: dict[str, type[Document]] = {
    "stages": Plan,
    "collectives": Profile,
    "devices_per_node": ClusterSpec,
    "kinds": ModelSpec,
    "step_s": Run,
}
"""A field that only one type of document has."""

_FOLDER_FILES = ("cluster.json", "model.json", "profile.json", "plan.json", RUN_FILE)


def run(arguments: Show, output: Output) -> int:
    """Prints each document.

    Raises:
        DocumentError: when a file is none of ours, or faulty.
        InputError: when nothing was named.
    """
    if not arguments.paths:
        raise InputError("Name what to show: a file, the folder of a run, or a cluster preset.")
    if arguments.accuracy:
        return _accuracy(arguments, output)
    if arguments.plot is not None:
        raise InputError("--plot draws what --accuracy compares; give both.")
    documents = {name: document for path in arguments.paths for name, document in _load(path)}
    model = next((d for d in documents.values() if isinstance(d, ModelSpec)), None)
    for document in documents.values():
        output.show(_tables(document, model))
    output.result({name: document.model_dump(mode="json") for name, document in documents.items()})
    return 0


def _accuracy(arguments: Show, output: Output) -> int:
    if arguments.plot is not None:
        check_figure(arguments.plot)
    recorded = [run for path in arguments.paths for run in find_runs(path)]
    output.show([accuracy_table(recorded)])
    if arguments.plot is not None:
        save_figure(accuracy_figure(recorded), arguments.plot)
        output.say(f"Written to {arguments.plot}.")
    found = accuracy(recorded)
    output.result(
        {
            "runs": {one.name: one.run.model_dump(mode="json") for one in recorded},
            "accuracy": None if found is None else dataclasses.asdict(found),
        }
    )
    return 0


def load_document(path: str | Path) -> Document:
    """Reads a document of whichever type the file holds.

    Raises:
        DocumentError: when it is none of ours, or faulty.
    """
    data = files.read_data(path)
    for sign, cls in _SIGNS.items():
        if sign in data:
            return cls.load(path)
    found = ", ".join(sorted(data)[:8]) or "nothing"
    raise DocumentError(f"{path} is no plan, profile, cluster or model: it holds {found}.")


def _load(path: str) -> Iterator[tuple[str, Document]]:
    if Path(path).is_dir():
        found = [Path(path) / name for name in _FOLDER_FILES if (Path(path) / name).is_file()]
        if not found:
            raise DocumentError(f"{path} holds none of {', '.join(_FOLDER_FILES)}.")
        yield from ((str(file), load_document(file)) for file in found)
    elif not Path(path).suffix and not Path(path).exists():
        yield path, cluster_preset(path)
    else:
        yield path, load_document(path)


def _tables(document: Document, model: ModelSpec | None) -> Iterator[RenderableType]:
    if isinstance(document, Plan):
        yield from plan_report(document, model=_matching(model, document.model_fingerprint))
        yield plan_facts(document)
    elif isinstance(document, Profile):
        yield from profile_report(document, model=_matching(model, document.model_fingerprint))
    elif isinstance(document, ClusterSpec):
        yield cluster_table(document)
    elif isinstance(document, ModelSpec):
        yield model_table(document)
    elif isinstance(document, Run):
        yield run_facts(document)


def _matching(model: ModelSpec | None, fingerprint: str | None) -> ModelSpec | None:
    return model if model is not None and model.fingerprint == fingerprint else None
