"""What a search found besides the plan, as a table."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table

from galvatron_jax.report.plans import plan_report, plan_title
from galvatron_jax.report.text import titled
from galvatron_jax.search import SearchResult
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.units import format_bytes, format_seconds


def search_report(result: SearchResult, *, model: ModelSpec | None = None) -> Iterator[RenderableType]:
    """The plan, why it won, and how it was found.

    Args:
        result: what the search returned.
        model: names the layers.
    """
    yield from plan_report(result.plan, model=model)
    if result.runners_up:
        yield runners_up_table(result)
    yield reasons(result)


def runners_up_table(result: SearchResult) -> Group:
    """The best plan of each other family, and why it lost."""
    table = Table()
    table.add_column("only")
    table.add_column("step", justify="right")
    table.add_column("memory per device", justify="right")
    table.add_column("why not")
    for other in result.runners_up:
        memory = other.prediction.peak_bytes
        step = format_seconds(other.prediction.time.step_s)
        table.add_row(other.family, step, format_bytes(memory), other.reason(result.prediction))
    return titled(f"Runners-up: {plan_title(result.plan)}", table)


def reasons(result: SearchResult) -> str:
    """What bounds the plan, what more memory would bring, and how sure the search is."""
    statistics = result.statistics
    proof = "nothing better exists in the search space"
    if not statistics.proven:
        proof = f"the best found, not proven; no plan is more than {statistics.gap:.1%} faster"
    return (
        f"Most of the step is {result.bound_by}. {_memory_reason(result)}Searched {statistics.problems} combinations "
        f"and {statistics.options} options in {format_seconds(statistics.seconds)}: by the cost model, {proof}."
    )


def _memory_reason(result: SearchResult) -> str:
    """Whether memory binds, as far as the search of one stage tells; of pipelines it does not say."""
    step_s, unlimited_s = result.prediction.time.step_s, result.statistics.unlimited_s
    gain = 1 - unlimited_s / step_s if step_s else 0.0
    pipeline = len(result.plan.stages) > 1
    if gain > 1e-9 and unlimited_s:
        alone = "a step of one stage" if pipeline else "a step"
        return f"Memory binds: with more of it {alone} could take {format_seconds(unlimited_s)} ({gain:.1%} less). "
    return "" if pipeline else "Memory does not bind: more of it would not make the step faster. "
