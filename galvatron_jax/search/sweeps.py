"""The same question over ranges of memory, devices, batch and bandwidth: the answer to every combination."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from galvatron_jax.cost.links import INTER, INTRA
from galvatron_jax.errors import GalvatronError, InfeasibleError, InputError
from galvatron_jax.search.explain import SearchResult, describe_groups
from galvatron_jax.search.infeasible import NothingFitsError
from galvatron_jax.search.problems import Progress
from galvatron_jax.search.question import Question
from galvatron_jax.spec.plan import Plan
from galvatron_jax.units import format_bytes


class Quantity(StrEnum):
    """What a sweep varies."""

    MEMORY = "memory"
    """Budget per device, bytes."""
    DEVICES = "devices"
    BATCH = "batch"
    """Examples of a step."""
    INTRA_BANDWIDTH = "intra-bandwidth"
    """Multiples of the bandwidth inside a node."""
    INTER_BANDWIDTH = "inter-bandwidth"
    """Multiples of the bandwidth between nodes."""

    @property
    def is_multiple(self) -> bool:
        """Whether values are multiples of what the cluster has."""
        return self in (Quantity.INTRA_BANDWIDTH, Quantity.INTER_BANDWIDTH)

    def text(self, value: float) -> str:
        """A value as people write it.

        Example:
            >>> Quantity.MEMORY.text(2**34), Quantity.DEVICES.text(8), Quantity.INTER_BANDWIDTH.text(0.5)
            ('16.00 GiB', '8', 'x0.5')
        """
        if self is Quantity.MEMORY:
            return format_bytes(value)
        return f"x{value:g}" if self.is_multiple else f"{value:g}"


@dataclass(frozen=True)
class SweepAxis:
    """One quantity and its values."""

    quantity: Quantity
    values: tuple[float, ...]


@dataclass(frozen=True)
class SweepCell:
    """One combination of values, and the best plan there."""

    values: tuple[float, ...]
    """One per axis."""
    question: Question
    result: SearchResult | None
    """None where no plan fits, or none can be."""
    reason: str = ""
    """Why there is none."""

    def record(self) -> dict[str, Any]:
        """The cell as plain values: what was asked, and what was found (None where nothing was)."""
        question = self.question
        asked = {
            "memory_bytes": question.budget_bytes,
            "devices": question.cluster.num_devices,
            "intra_bandwidth_bytes_per_s": question.cluster.intra.bandwidth_bytes_per_s,
            "inter_bandwidth_bytes_per_s": question.cluster.inter and question.cluster.inter.bandwidth_bytes_per_s,
        }
        if self.result is None:
            batch = question.global_batches[0] if len(question.global_batches) == 1 else None
            return asked | {"global_batch": batch, "fits": False} | dict.fromkeys(_FOUND) | {"reason": self.reason}
        return asked | _found(self.result) | {"reason": None}


_FOUND = (
    "examples_per_s", "step_s", "peak_memory_bytes", "num_microbatches", "pipeline_degree", "num_stages", "schedule",
    "proven", "gap", "plan",
)  # fmt: skip


def _found(result: SearchResult) -> dict[str, Any]:
    plan, statistics = result.plan, result.statistics
    values = (
        result.examples_per_s,
        result.prediction.time.step_s,
        result.prediction.peak_bytes,
        plan.num_microbatches,
        plan.pipeline_degree,
        len(plan.stages),
        plan.schedule.value,
        statistics.proven,
        statistics.gap,
        "; ".join(describe_groups(plan)),
    )
    return {"global_batch": plan.global_batch, "fits": True} | dict(zip(_FOUND, values, strict=True))


@dataclass(frozen=True)
class Sweep:
    """Every combination of some values."""

    question: Question
    """Of all cells, where no axis says otherwise."""
    axes: tuple[SweepAxis, ...]
    cells: tuple[SweepCell, ...]
    """The last axis changes fastest."""

    def records(self) -> list[dict[str, Any]]:
        """The cells as plain values."""
        return [cell.record() for cell in self.cells]


def run_sweep(
    question: Question,
    axes: tuple[SweepAxis, ...],
    *,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Answers a question for every combination of values. Where nothing fits, the cell says why.

    Args:
        question: what is asked in every cell but for its own values.
        axes: what varies.
        time_limit_s: for each cell; a cell whose search was cut short takes the plan of another budget where that
            fits and is faster.
        progress: told which cell is next.

    Raises:
        InputError: when a value makes no sense: devices that fill no nodes, links that no cluster of the sweep has.
    """
    _check_axes(axes)
    questions = [
        (values, _varied(question, axes, values)) for values in itertools.product(*(axis.values for axis in axes))
    ]
    _check_links(axes, [asked for _, asked in questions])
    cells = []
    for number, (values, asked) in enumerate(questions):
        if progress is not None:
            progress(number, len(questions), cell_name(axes, values))
        cells.append(_answered(values, asked, time_limit_s))
    return Sweep(question, axes, _best_known(axes, cells))


def cell_name(axes: tuple[SweepAxis, ...], values: tuple[float, ...]) -> str:
    """A combination in words.

    Example:
        >>> cell_name((SweepAxis(Quantity.DEVICES, (8, 16)), SweepAxis(Quantity.INTER_BANDWIDTH, (1, 2))), (8, 2))
        'devices 8, inter-bandwidth x2'
    """
    return ", ".join(f"{axis.quantity} {axis.quantity.text(value)}" for axis, value in zip(axes, values, strict=True))


def _check_axes(axes: tuple[SweepAxis, ...]) -> None:
    if not axes:
        raise InputError("A sweep needs something to vary, such as memory=16GiB:80GiB:8GiB.")
    quantities = [axis.quantity for axis in axes]
    twice = sorted({quantity for quantity in quantities if quantities.count(quantity) > 1})
    if twice:
        raise InputError(f"The sweep varies {', '.join(twice)} twice; give all its values at once.")
    for axis in axes:
        if not axis.values or min(axis.values) <= 0:
            raise InputError(f"The sweep over {axis.quantity} needs positive values, not {list(axis.values)}.")


def _check_links(axes: tuple[SweepAxis, ...], questions: list[Question]) -> None:
    varied = {axis.quantity for axis in axes}
    if Quantity.INTER_BANDWIDTH in varied and all(asked.cluster.inter is None for asked in questions):
        raise InputError(
            f"The sweep varies the bandwidth between nodes, but {questions[0].cluster.name!r} has one node. Take a "
            "larger cluster, or vary intra-bandwidth."
        )


def _varied(question: Question, axes: tuple[SweepAxis, ...], values: tuple[float, ...]) -> Question:
    chosen = {axis.quantity: value for axis, value in zip(axes, values, strict=True)}
    if Quantity.DEVICES in chosen:
        question = question.on_devices(int(chosen[Quantity.DEVICES]))
    if Quantity.MEMORY in chosen:
        question = replace(question, memory_bytes=int(chosen[Quantity.MEMORY]))
    if Quantity.BATCH in chosen:
        question = replace(question, global_batches=(int(chosen[Quantity.BATCH]),))
    question = question.with_bandwidth(INTRA, chosen.get(Quantity.INTRA_BANDWIDTH, 1))
    return question.with_bandwidth(INTER, chosen.get(Quantity.INTER_BANDWIDTH, 1))


def _answered(values: tuple[float, ...], question: Question, time_limit_s: float | None) -> SweepCell:
    try:
        return SweepCell(values, question, question.answer(time_limit_s=time_limit_s, runners_up=False))
    except NothingFitsError as error:
        excess = format_bytes(error.need_bytes - error.budget_bytes)
        reason = f"nothing fits: the nearest plan needs {format_bytes(error.need_bytes)}, {excess} too much"
        return SweepCell(values, question, None, reason)
    except (InfeasibleError, InputError) as error:
        return SweepCell(values, question, None, str(error))


def _best_known(axes: tuple[SweepAxis, ...], cells: list[SweepCell]) -> tuple[SweepCell, ...]:
    """Where a search was cut short, the fastest plan known: what another budget gave may fit in this one too."""
    place = next((index for index, axis in enumerate(axes) if axis.quantity is Quantity.MEMORY), None)
    if place is None:
        return tuple(cells)
    rivals: dict[tuple, list[SearchResult]] = {}
    for cell in cells:
        if cell.result is not None:
            rivals.setdefault(_others(cell, place), []).append(cell.result)
    return tuple(_improved(cell, rivals.get(_others(cell, place), [])) for cell in cells)


def _others(cell: SweepCell, place: int) -> tuple[float, ...]:
    """A cell's values but one."""
    return cell.values[:place] + cell.values[place + 1 :]


def _improved(cell: SweepCell, rivals: list[SearchResult]) -> SweepCell:
    """The cell with the fastest plan of its rivals that fits, where that is faster than its own."""
    fitting = [one for one in rivals if one.prediction.peak_bytes <= cell.question.budget_bytes]
    best = max(fitting, key=lambda one: one.examples_per_s, default=None)
    if cell.result is None or best is None or best.examples_per_s <= cell.result.examples_per_s:
        return cell
    return replace(cell, result=_instead(cell.result, best.plan, cell.question))


def _instead(found: SearchResult, plan: Plan, question: Question) -> SearchResult:
    """What was found, with a faster plan."""
    try:
        prediction = question.price(plan)
    except GalvatronError:
        return found
    if plan.global_batch != found.plan.global_batch:
        return found
    statistics = replace(
        found.statistics,
        step_s=prediction.time.step_s,
        bound_s=min(found.statistics.bound_s, prediction.time.step_s),
    )
    return replace(found, plan=plan.model_copy(update={"prediction": prediction}), statistics=statistics)
