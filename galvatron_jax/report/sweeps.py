"""A sweep as a table, a CSV or JSON file, and a picture."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from galvatron_jax.errors import InputError
from galvatron_jax.report.figures import check_figure
from galvatron_jax.report.text import per_second, titled
from galvatron_jax.search.sweeps import Quantity, Sweep, SweepAxis, SweepCell
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.strategy import Remat
from galvatron_jax.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".csv", ".json")
"""Of files that sweeps are written to."""


def sweep_title(sweep: Sweep) -> str:
    """What was swept, in a line."""
    question = sweep.question
    varied = " × ".join(f"{len(axis.values)} of {axis.quantity}" for axis in sweep.axes)
    quantities = {axis.quantity for axis in sweep.axes}
    parts = [question.model.name]
    device = question.cluster.device.name
    parts.append(f"on {device}" if Quantity.DEVICES in quantities else f"on {question.cluster.num_devices} × {device}")
    if Quantity.BATCH not in quantities:
        batches = question.global_batches
        parts.append(f"batch {batches[0]}" if len(batches) == 1 else f"the best batch of {batches[0]} to {batches[-1]}")
    return f"{' '.join(parts[:2])}{''.join(', ' + part for part in parts[2:])}: {varied}"


def sweep_table(sweep: Sweep) -> Group:
    """One row per combination."""
    table = Table()
    for axis in sweep.axes:
        table.add_column(axis.quantity.value, justify="right")
    for name in ("step", "examples/s", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best plan")
    for cell in sweep.cells:
        names = [axis.quantity.text(value) for axis, value in zip(sweep.axes, cell.values, strict=True)]
        table.add_row(*names, *_cells(cell))
    return titled(f"Sweep: {sweep_title(sweep)}", table)


def describe_plan(plan: Plan) -> str:
    """A plan in a few words: stages and schedule, micro-batches, and what its layers use.

    Example:
        >>> from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Stage
        >>> from galvatron_jax.spec.strategy import LayerStrategy
        >>> group = LayerGroup(start=0, stop=4, strategy=LayerStrategy(dp=("a",), zero=3))
        >>> mesh = (MeshAxis(name="a", size=2),)
        >>> describe_plan(Plan(model="m", mesh=mesh, global_batch=8, stages=(Stage(groups=(group,)),)))
        'batch 8, dp 2, ZeRO 3'
    """
    parts = []
    if len(plan.stages) > 1:
        parts.append(f"{len(plan.stages)} stages {plan.schedule}")
    count = plan.num_microbatches
    parts.append(f"batch {plan.global_batch}" + (f" in {count} micro-batches" if count > 1 else ""))
    sizes = {axis.name: axis.size for axis in plan.mesh}
    for name in ("dp", "tp", "sp"):
        degrees = sorted({_product(sizes, getattr(strategy, name)) for strategy in plan.strategies})
        if degrees != [1]:
            parts.append(f"{name} {'/'.join(map(str, degrees))}")
    zero = sorted({strategy.zero for strategy in plan.strategies})
    if zero != [0]:
        parts.append(f"ZeRO {'/'.join(map(str, zero))}")
    remat = {strategy.remat for strategy in plan.strategies}
    if remat != {Remat.NONE}:
        parts.append(f"remat {'/'.join(kind.value for kind in Remat if kind in remat)}")
    return ", ".join(parts)


def save_sweep(sweep: Sweep, path: str) -> None:
    """Writes the table, a row per combination, as `.csv` or `.json`.

    Raises:
        InputError: for another ending.
    """
    check_sweep_file(path)
    records = sweep.records()
    if Path(path).suffix == ".json":
        text = json.dumps(records, indent=2) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        text = buffer.getvalue()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def check_sweep_file(path: str) -> None:
    """Makes sure that a sweep can be written, before it begins.

    Raises:
        InputError: for another ending.
    """
    if Path(path).suffix not in ENDINGS:
        raise InputError(f"{path}: a sweep's table is written to {' and '.join(ENDINGS)} files.")


def sweep_figure(sweep: Sweep) -> Figure:
    """Examples per second over the axis with most values; a line for each combination of the others.

    Raises:
        InputError: when matplotlib is not installed.
    """
    check_figure("the picture.png")
    from matplotlib.figure import Figure

    along = max(range(len(sweep.axes)), key=lambda index: len(sweep.axes[index].values))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for others, cells in _lines(sweep, along).items():
        points = [(_position(sweep.axes[along], c.values[along]), c.result) for c in cells]
        rates = [float("nan") if result is None else result.examples_per_s for _, result in points]
        axes.plot([x for x, _ in points], rates, marker="o", label=others or None)
    axes.set_xlabel(_axis_label(sweep.axes[along]))
    axes.set_ylabel("examples per second")
    axes.set_ylim(bottom=0)
    gaps = "\ngaps: no plan fits" if any(cell.result is None for cell in sweep.cells) else ""
    axes.set_title(sweep_title(sweep) + gaps, fontsize="medium")
    axes.grid(alpha=0.3)
    if len(sweep.axes) > 1:
        axes.legend()
    return figure


def _cells(cell: SweepCell) -> list[str]:
    result = cell.result
    if result is None:
        return ["–", "–", "–", cell.reason]
    proof = "" if result.statistics.proven else f" (at most {result.statistics.gap:.0%} faster is possible)"
    return [
        format_seconds(result.prediction.time.step_s),
        per_second(result.examples_per_s),
        format_bytes(result.prediction.peak_bytes),
        describe_plan(result.plan) + proof,
    ]


def _lines(sweep: Sweep, along: int) -> dict[str, list[SweepCell]]:
    """Cells by the values of all axes but one, in words."""
    lines: dict[str, list[SweepCell]] = {}
    for cell in sweep.cells:
        pairs = [pair for index, pair in enumerate(zip(sweep.axes, cell.values, strict=True)) if index != along]
        name = ", ".join(f"{axis.quantity} {axis.quantity.text(value)}" for axis, value in pairs)
        lines.setdefault(name, []).append(cell)
    return {name: sorted(cells, key=lambda cell: cell.values[along]) for name, cells in lines.items()}


def _position(axis: SweepAxis, value: float) -> float:
    return value / GIB if axis.quantity is Quantity.MEMORY else value


def _axis_label(axis: SweepAxis) -> str:
    unit = {Quantity.MEMORY: "memory per device, GiB", Quantity.BATCH: "examples per step"}
    return unit.get(axis.quantity, f"{axis.quantity}{', multiple' if axis.quantity.is_multiple else ''}")


def _product(sizes: dict[str, int], axes: tuple[str, ...]) -> int:
    product = 1
    for axis in axes:
        product *= sizes[axis]
    return product
