"""Everything about a search: plans side by side, what rules removed, what more of a resource would bring."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table

from galvatron_jax.report.plans import plan_report, plan_title
from galvatron_jax.report.searches import reasons
from galvatron_jax.report.text import per_second, titled
from galvatron_jax.search import Rule, SearchResult
from galvatron_jax.search.sensitivity import Sensitivity, binding
from galvatron_jax.search.space import HEURISTICS
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import Prediction
from galvatron_jax.units import format_bytes, format_seconds

_REMOVES = {
    Rule.TP_WITHOUT_HIDDEN: "tensor parallelism over more devices than hidden dims divide into",
    Rule.SP_WITHOUT_SEQUENCE: "sequence parallelism over more devices than the sequence divides into",
    Rule.ZERO_WITHOUT_PARAMETERS: "ZeRO for layers without parameters",
    Rule.SAME_REMAT: "rematerialisation policies under which a layer keeps and repeats what it does under another",
    Rule.DOMINATED: "strategies that another one beats in seconds and in bytes",
    Rule.GPIPE: "GPipe where 1F1B that stashes residuals is tried too",
    Rule.WORK: "numbers of micro-batches, stages and schedules whose computation alone takes longer than the best",
    Rule.TP_ACROSS_NODES: "tensor and sequence parallelism across nodes",
    Rule.REPEATED_WORK: "layers that repeat work along an axis though others share it out",
    Rule.ULYSSES_WITH_TP: "Ulysses together with tensor parallelism in one layer",
    Rule.MICROBATCHES_ON_DEMAND: "numbers of micro-batches beyond those with which the fastest plan fits",
    Rule.AXES_ON_DEMAND: "ZeRO stages and rematerialisation on axes where no such plan is faster than the best",
    Rule.BATCH_AXES: "layouts of a pipeline's batch over fewer of a stage's axes than divide it",
    Rule.ONE_PROGRAM: "pipelines whose groups fit each by itself, but not as one program",
    Rule.SLOTS_ALIKE: "pipelines whose groups fit only with fewer micro-batches in flight than the first has",
    Rule.AFFINE_IN_MICROBATCH: "layer plans read off another micro-batch's instead of planned",
}


def explanation(
    result: SearchResult, found: tuple[Sensitivity, ...], *, model: ModelSpec | None = None
) -> Iterator[RenderableType]:
    """The plan, its time and memory stage by stage, its rivals, the pruning, and what binds.

    Args:
        result: what the search returned.
        found: its sensitivities.
        model: names the layers.
    """
    yield from plan_report(result.plan, model=model)
    yield comparison_table(result)
    if result.statistics.pruned:
        yield rules_table(result)
    if found:
        yield sensitivity_table(result, found)
        yield what_binds(result, found)
    yield reasons(result)


def comparison_table(result: SearchResult) -> Group:
    """The winner and the best plan of every other family, part by part."""
    table = Table()
    table.add_column("plan", min_width=16)
    for name in ("step", "compute", "commun.", "gradients", "update", "bubble", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_row("the best", *_parts(result.prediction), "", style="bold")
    best_s = result.prediction.time.step_s
    for other in result.runners_up:
        slower = f"{other.prediction.time.step_s / best_s:.2f} ×" if other.fits else "too large"
        table.add_row(other.family, *_parts(other.prediction), slower)
    return titled(f"Side by side: {plan_title(result.plan)}", table)


def rules_table(result: SearchResult) -> Group:
    """What each pruning rule removed."""
    table = Table()
    table.add_column("rule")
    table.add_column("removed", justify="right")
    table.add_column("what")
    table.add_column("may lose the best")
    for name, count in result.statistics.pruned:
        rule = Rule(name)
        table.add_row(name, f"{count:,}", _REMOVES[rule], "yes" if rule in HEURISTICS else "no")
    return titled(f"Pruning rules: {plan_title(result.plan)}", table)


def sensitivity_table(result: SearchResult, found: tuple[Sensitivity, ...]) -> Group:
    """What more of each resource would bring."""
    table = Table()
    table.add_column("with")
    table.add_column("examples/s", justify="right")
    table.add_column("gain", justify="right")
    table.add_column("")
    table.add_row("what there is", per_second(result.examples_per_s), "", "")
    for one in found:
        if one.plan is None:
            table.add_row(one.change, "–", "–", one.note)
        else:
            table.add_row(one.change, per_second(one.examples_per_s), f"{one.gain:+.1%}", _proof(one, result))
    return titled(f"With more of each: {plan_title(result.plan)}", table)


def what_binds(result: SearchResult, found: tuple[Sensitivity, ...]) -> str:
    """Which resource holds the plan back, in a sentence."""
    binds = binding(found)
    if not binds:
        return f"Nothing of these binds: most of the step is {result.bound_by}, on the devices that there are."
    first, *others = [f"{one.resource} ({one.gain:+.1%} examples/s with {one.change})" for one in binds]
    also = f" Then {', '.join(others)}." if others else ""
    return f"What binds most: {first}.{also}"


def _proof(one: Sensitivity, result: SearchResult) -> str:
    assert one.plan is not None
    same = "the same plan" if one.plan.stages == result.plan.stages and one.plan.mesh == result.plan.mesh else ""
    open_ = "" if one.proven else "at least, in the time given"
    return ", ".join(part for part in (same, open_) if part)


def _parts(prediction: Prediction) -> list[str]:
    time = prediction.time
    parts = (
        time.step_s,
        time.compute_s,
        time.communication_s,
        time.synchronisation_s,
        time.update_s,
        time.bubble_s,
    )
    return [*(format_seconds(part) if part else "–" for part in parts), format_bytes(prediction.peak_bytes)]
