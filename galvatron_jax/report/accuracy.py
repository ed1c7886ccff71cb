"""Predicted against measured: runs as a table, as one line, as a picture. No JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy
from rich.console import Group
from rich.table import Table
from rich.text import Text

from galvatron_jax.report.figures import check_figure
from galvatron_jax.report.sweeps import describe_plan
from galvatron_jax.report.text import facts, titled
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.run import Run
from galvatron_jax.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Recorded:
    """A run with its plan, and what to call it."""

    name: str
    run: Run
    plan: Plan

    @property
    def predicted_s(self) -> float | None:
        """Seconds of a step, as predicted."""
        return None if self.run.prediction is None else self.run.prediction.time.step_s

    @property
    def predicted_bytes(self) -> int | None:
        """Peak bytes of a device, as predicted."""
        return None if self.run.prediction is None else self.run.prediction.peak_bytes


@dataclass(frozen=True)
class Accuracy:
    """How near predictions of step times came."""

    runs: int
    """Those that hold a prediction."""
    mean_error: float
    """Mean of the relative errors of predicted seconds, as shares of the measured ones, signs left out."""
    worst_error: float
    rank_correlation: float | None
    """Spearman's, of predicted and measured seconds; None for fewer than three runs, or runs all alike."""


def accuracy(recorded: Sequence[Recorded]) -> Accuracy | None:
    """Sums up runs; None where none holds a prediction."""
    pairs = [(r.predicted_s, r.run.step_s) for r in recorded if r.predicted_s is not None]
    if not pairs:
        return None
    predicted, measured = np.array(pairs).T
    errors = np.abs(predicted / measured - 1)
    ranked = len(pairs) >= 3 and len(set(predicted)) > 1 and len(set(measured)) > 1
    correlation = _rank_correlation(predicted, measured) if ranked else None
    return Accuracy(len(pairs), float(errors.mean()), float(errors.max()), correlation)


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's."""
    return float(scipy.stats.spearmanr(one, other).statistic)


def accuracy_table(recorded: Sequence[Recorded]) -> Group:
    """Every run, predicted beside measured, and what they come to."""
    table = Table()
    for name in ("run", "devices", "plan"):
        table.add_column(name)
    for name in ("step predicted", "measured", "ratio", "memory predicted", "measured"):
        table.add_column(name, justify="right")
    for one in recorded:
        devices = f"{one.run.num_devices} × {one.run.device}"
        table.add_row(one.name, devices, describe_plan(one.plan), *_times(one), *_memory(one))
    return Group(titled("Predicted against measured", table), Text(accuracy_text(accuracy(recorded))))


def run_facts(run: Run) -> Group:
    """One run, predicted beside measured."""
    rows = [("step", f"{format_seconds(run.step_s)} ± {format_seconds(run.step_spread_s / 2)}, of {run.steps} steps")]
    if run.prediction is not None:
        ratio = run.step_s / run.prediction.time.step_s
        rows.append(("", f"{format_seconds(run.prediction.time.step_s)} predicted, {ratio:.2f} × that"))
        rows.append(("memory", f"{format_bytes(run.prediction.peak_bytes)} predicted"))
    if run.peak_memory_bytes is not None:
        rows.append(("", f"{format_bytes(run.peak_memory_bytes)} measured"))
    return facts(f"Run of {run.model} on {run.num_devices} × {run.device}, {run.date}", rows)


def accuracy_text(found: Accuracy | None) -> str:
    """What the runs come to, in a line.

    Example:
        >>> accuracy_text(Accuracy(runs=4, mean_error=0.031, worst_error=0.05, rank_correlation=1.0))
        'Step time of 4 runs: mean error 3.1 %, worst 5.0 %, rank correlation 1.000'
    """
    if found is None:
        return "No run holds a prediction to compare."
    ranked = "" if found.rank_correlation is None else f", rank correlation {found.rank_correlation:.3f}"
    runs = "1 run" if found.runs == 1 else f"{found.runs} runs"
    return f"Step time of {runs}: mean error {found.mean_error:.1%}, worst {found.worst_error:.1%}{ranked}".replace(
        "%", " %"
    )


def accuracy_figure(recorded: Sequence[Recorded]) -> Figure:
    """Measured over predicted step times, with the line on which they are equal.

    Raises:
        InputError: when matplotlib is not installed.
    """
    check_figure("the picture.png")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 6.5), layout="constrained")
    axes = figure.subplots()
    models = sorted({one.run.model for one in recorded})
    for model in models:
        points = [(one.predicted_s, one.run) for one in recorded if one.run.model == model and one.predicted_s]
        seconds, runs = [point[0] for point in points], [point[1] for point in points]
        spread = [run.step_spread_s / 2 for run in runs]
        axes.errorbar(seconds, [run.step_s for run in runs], yerr=spread, fmt="o", capsize=3, label=model)
    low, high = _range(recorded)
    axes.plot([low, high], [low, high], color="grey", linewidth=1, label="measured = predicted")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel("predicted seconds per step")
    axes.set_ylabel("measured seconds per step (bars: interquartile range)")
    axes.set_title(accuracy_text(accuracy(recorded)), fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _range(recorded: Sequence[Recorded]) -> tuple[float, float]:
    values = [one.run.step_s for one in recorded] + [one.predicted_s for one in recorded if one.predicted_s]
    return min(values) / 1.3, max(values) * 1.3


def _times(one: Recorded) -> tuple[str, str, str]:
    measured = f"{format_seconds(one.run.step_s)} ± {format_seconds(one.run.step_spread_s / 2)}"
    if one.predicted_s is None:
        return "–", measured, "–"
    return format_seconds(one.predicted_s), measured, f"{one.run.step_s / one.predicted_s:.2f} ×"


def _memory(one: Recorded) -> tuple[str, str]:
    predicted, peak = one.predicted_bytes, one.run.peak_memory_bytes
    return "–" if predicted is None else format_bytes(predicted), "–" if peak is None else format_bytes(peak)
