"""What a little more of each resource would change: the same question asked again with more memory, links, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from galvatron_jax.cost.links import INTER, INTRA
from galvatron_jax.errors import GalvatronError
from galvatron_jax.search.explain import SearchResult
from galvatron_jax.search.problems import Progress
from galvatron_jax.search.question import Question
from galvatron_jax.spec.plan import Plan
from galvatron_jax.units import GIB, format_bytes

DEFAULT_LIMIT_S = 5.0
"""For each search."""
_BINDS = 0.01
"""Gain from which on a resource is said to bind."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Sensitivity:
    """The best plan with more of one resource."""

    resource: str
    """What there is more of, such as `memory`."""
    change: str
    """How much more, such as `1.00 GiB more per device`."""
    examples_per_s: float
    gain: float
    """More examples per second, relative to now; 0.1 is 10 %."""
    plan: Plan | None
    """None where the search failed."""
    proven: bool
    """Whether more cannot be gained."""
    note: str = ""
    """Why the search failed."""


def sensitivities(
    question: Question,
    result: SearchResult,
    *,
    time_limit_s: float = DEFAULT_LIMIT_S,
    progress: Progress | None = None,
) -> tuple[Sensitivity, ...]:
    """Asks again with more of each resource: one GiB per device, twice each bandwidth, twice the devices.

    The plan found so far counts where it still fits, so that more is never worse for want of time.

    Args:
        question: what was asked.
        result: the answer.
        time_limit_s: for each search.
        progress: told what is tried.
    """
    changes = list(_changes(question))
    found = []
    for number, (resource, change, vary) in enumerate(changes):
        if progress is not None:
            progress(number, len(changes), f"searching with {change}")
        try:
            asked = replace(vary(), global_batches=(result.plan.global_batch,))
            found.append(_asked_again(asked, result, resource, change, time_limit_s))
        except GalvatronError as error:
            found.append(Sensitivity(resource, change, result.examples_per_s, 0.0, None, False, str(error)))
    return tuple(found)


def binding(found: tuple[Sensitivity, ...]) -> tuple[Sensitivity, ...]:
    """Of the sensitivities those that matter, the one with the largest gain first."""
    return tuple(sorted((one for one in found if one.gain >= _BINDS), key=lambda one: -one.gain))


def _changes(question: Question) -> Iterator[tuple[str, str, Callable[[], Question]]]:
    budget, cluster = question.budget_bytes, question.cluster
    yield "memory", f"{format_bytes(GIB)} more per device", lambda: replace(question, memory_bytes=budget + GIB)
    if cluster.devices_per_node > 1:
        yield "link in a node", "twice the bandwidth in a node", lambda: question.with_bandwidth(INTRA, 2.0)
    if cluster.num_nodes > 1:
        yield "link between nodes", "twice the bandwidth between nodes", lambda: question.with_bandwidth(INTER, 2.0)
    more = 2 * cluster.num_devices
    yield "devices", f"twice the devices ({more})", lambda: question.on_devices(more)


def _asked_again(
    question: Question, result: SearchResult, resource: str, change: str, time_limit_s: float
) -> Sensitivity:
    plan, proven = None, False
    try:
        again = question.answer(time_limit_s=time_limit_s, runners_up=False)
        plan, rate, proven = again.plan, again.examples_per_s, again.statistics.proven
    except GalvatronError:
        if question.cluster.num_devices != result.plan.num_devices:
            raise
        rate = 0.0
    if question.cluster.num_devices == result.plan.num_devices:
        same = question.price(result.plan)
        if result.plan.global_batch / same.time.step_s > rate:
            rate = result.plan.global_batch / same.time.step_s
            plan = result.plan.model_copy(update={"prediction": same})
    gain = rate / result.examples_per_s - 1
    return Sensitivity(resource, change, rate, gain if abs(gain) > _ROUNDING else 0.0, plan, proven)
