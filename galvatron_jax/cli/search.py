"""`galvatron-jax search`: the best plan of a model on a cluster that need not be here, or the best of many clusters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from galvatron_jax.cli.arguments import Search
from galvatron_jax.cli.output import Output
from galvatron_jax.cli.questions import make_question, read_wishes
from galvatron_jax.cli.verified import prepare_verifying, verified_documents, verify_result
from galvatron_jax.report.explanations import explanation
from galvatron_jax.report.figures import save_figure
from galvatron_jax.report.searches import search_report
from galvatron_jax.report.sweeps import save_sweep, sweep_figure, sweep_table
from galvatron_jax.report.timelines import plan_timeline, save_timeline
from galvatron_jax.search import SearchResult
from galvatron_jax.search.check import Checked, check_winner
from galvatron_jax.search.problems import Progress as Told
from galvatron_jax.search.question import Question
from galvatron_jax.search.sensitivity import DEFAULT_LIMIT_S, Sensitivity, sensitivities
from galvatron_jax.search.sweeps import SweepAxis, run_sweep

if TYPE_CHECKING:
    from galvatron_jax.verify.verification import Verification

DONE, FAILED = 0, 1

_CHECK_LIMIT_S = 60.0
"""For the independent solver, where no other limit is given."""


def run(arguments: Search, output: Output) -> int:
    """Searches, prints what was found and why, and saves it.

    Returns:
        0 when done, 1 when `--check` found a faster plan, or nothing fits in any cell of a sweep.

    Raises:
        InfeasibleError: when no plan fits the budget.
    """
    wishes = read_wishes(arguments)
    if arguments.verify is not None:
        prepare_verifying(arguments)
    question = make_question(arguments, wishes, output)
    if wishes.axes:
        return _sweep(arguments, question, wishes.axes, output)
    with _progress(output) as told:
        result = question.answer(time_limit_s=arguments.time_limit, progress=told)
    used = result.plan.num_devices
    if used < question.cluster.num_devices:
        output.show([f"{used} of the {question.cluster.num_devices} devices of {result.cluster} are worth using."])
        question = question.on_devices(used)
    verified: tuple[Verification, ...] = ()
    if arguments.verify is not None:
        result, verified = verify_result(arguments, result, wishes.memory_bytes, output)
    found: tuple[Sensitivity, ...] = ()
    if arguments.explain:
        limit_s = min(arguments.time_limit or DEFAULT_LIMIT_S, DEFAULT_LIMIT_S)
        with _progress(output) as told:
            found = sensitivities(question, result, time_limit_s=limit_s, progress=told)
        output.show(explanation(result, found, model=question.model))
    else:
        output.show(search_report(result, model=question.model))
    output.show(f"Note: {note}" for note in question.model.notes)
    _save(arguments, result, output)
    checked = _check(arguments, question, result, output) if arguments.check else None
    output.result({**_document(result, found, checked), "verified": verified_documents(verified)})
    return FAILED if checked is not None and checked.refuted else DONE


def _save(arguments: Search, result: SearchResult, output: Output) -> None:
    if arguments.out:
        result.plan.save(arguments.out)
        output.say(f"Plan written to {arguments.out}")
    if arguments.timeline and len(result.plan.stages) == 1:
        output.say(f"{arguments.timeline} not written: the plan has one stage, so there is no schedule to draw.")
    elif arguments.timeline:
        save_timeline(plan_timeline(result.plan), arguments.timeline)
        output.say(f"Timeline written to {arguments.timeline}")


def _check(arguments: Search, question: Question, result: SearchResult, output: Output) -> Checked:
    limit_s = arguments.time_limit or _CHECK_LIMIT_S
    output.say(f"Checking with an independent solver, for up to {limit_s:g} s …")
    checked = check_winner(question, result.plan, time_limit_s=limit_s, spare_bytes=result.statistics.spare_bytes)
    output.show([f"Check: {checked.verdict}"])
    return checked


def _sweep(arguments: Search, question: Question, axes: tuple[SweepAxis, ...], output: Output) -> int:
    with _progress(output) as told:
        sweep = run_sweep(question, axes, time_limit_s=arguments.time_limit, progress=told)
    output.show([sweep_table(sweep)])
    if arguments.out:
        save_sweep(sweep, arguments.out)
        output.say(f"Table written to {arguments.out}")
    if arguments.plot:
        save_figure(sweep_figure(sweep), arguments.plot)
        output.say(f"Picture written to {arguments.plot}")
    output.result({"model": question.model.name, "cluster": question.cluster.name, "sweep": sweep.records()})
    return DONE if any(cell.result is not None for cell in sweep.cells) else FAILED


@contextmanager
def _progress(output: Output) -> Iterator[Told]:
    """A bar on stderr, where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=output.log, disable=not output.log.is_terminal, transient=True) as bar:
        task = bar.add_task("searching")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _document(result: SearchResult, found: tuple[Sensitivity, ...], checked: Checked | None) -> dict[str, Any]:
    statistics = result.statistics
    return {
        "plan": result.plan.model_dump(mode="json"),
        "examples_per_s": result.examples_per_s,
        "bound_by": result.bound_by,
        "runners_up": [
            {
                "family": other.family,
                "fits": other.fits,
                "reason": other.reason(result.prediction),
                "plan": other.plan.model_dump(mode="json"),
            }
            for other in result.runners_up
        ],
        "search": {
            "seconds": statistics.seconds,
            "combinations": statistics.problems,
            "options": statistics.options,
            "proven": statistics.proven,
            "gap": statistics.gap,
            "bound_s": statistics.bound_s,
            "unlimited_step_s": statistics.unlimited_s,
            "pruned": dict(statistics.pruned),
        },
        "sensitivities": [
            {
                "resource": one.resource,
                "change": one.change,
                "examples_per_s": one.examples_per_s,
                "gain": one.gain,
                "proven": one.proven,
                "note": one.note,
            }
            for one in found
        ],
        "check": None if checked is None else {**asdict(checked), "refuted": checked.refuted},
    }
