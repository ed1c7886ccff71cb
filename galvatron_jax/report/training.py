"""A training run while it goes on, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from galvatron_jax.report.text import facts
from galvatron_jax.runtime.trainer import Progress, Summary
from galvatron_jax.units import format_seconds

Observer = Callable[[Progress], None]


@contextmanager
def training_progress(
    console: Console, *, steps: int, predicted_step_s: float | None, log_every: int = 10
) -> Iterator[Observer]:
    """A progress line on a terminal, and a line of text every so often elsewhere.

    Args:
        console: where to draw; of stderr where stdout holds results.
        steps: optimizer steps in all.
        predicted_step_s: what the plan promised, shown beside what is measured.
        log_every: steps between lines where there is no terminal.

    Yields:
        An observer for the trainer.
    """
    if not console.is_terminal:
        yield lambda progress: _print_line(console, progress, predicted_step_s, log_every)
        return
    columns = (TextColumn("Training"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Bar(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("compiling …", total=steps)

        def observe(progress: Progress) -> None:
            bar.update(task, completed=progress.step, description=progress_line(progress, predicted_step_s))

        yield observe


def progress_line(progress: Progress, predicted_step_s: float | None) -> str:
    """Loss, throughput, and the measured step beside the predicted one."""
    parts = [f"loss {progress.loss:.4f}"]
    if progress.tokens_per_s is not None:
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    elif progress.examples_per_s is not None:
        parts.append(f"{progress.examples_per_s:,.1f} examples/s")
    if progress.step_s is not None:
        predicted = f" (predicted {format_seconds(predicted_step_s)})" if predicted_step_s else ""
        parts.append(f"step {format_seconds(progress.step_s)}{predicted}")
    return " · ".join(parts)


def summary_table(summary: Summary, *, title: str, predicted_step_s: float | None, output: str) -> Group:
    """How a run ended."""
    rows = [("steps", f"{summary.last_step} of {summary.steps}{_ending(summary)}")]
    if summary.first_loss is not None and summary.last_loss is not None:
        fall = 100 * (1 - summary.last_loss / summary.first_loss)
        rows.append(("loss", f"{summary.first_loss:.4f} → {summary.last_loss:.4f} ({-fall:+.0f} %)"))
    if summary.median_step_s is not None:
        ratio = f", {summary.median_step_s / predicted_step_s:.2f} × the prediction" if predicted_step_s else ""
        rows.append(("step time", f"{format_seconds(summary.median_step_s)} measured{ratio}"))
    if predicted_step_s is not None:
        rows.append(("", f"{format_seconds(predicted_step_s)} predicted"))
    if summary.tokens_per_s is not None:
        rows.append(("throughput", f"{summary.tokens_per_s:,.0f} tokens/s"))
    if summary.first_step_s is not None:
        rows.append(("first step", f"{format_seconds(summary.first_step_s)}, compilation included"))
    return facts(title, [*rows, ("training took", format_seconds(summary.seconds)), ("written to", output)])


def _ending(summary: Summary) -> str:
    if summary.diverged:
        return ", stopped: the loss is no finite number"
    resumed = f", {summary.first_step} of them before this run" if summary.first_step else ""
    return resumed + (", interrupted" if summary.interrupted else "")


def _print_line(console: Console, progress: Progress, predicted_step_s: float | None, log_every: int) -> None:
    if progress.step == 1 or progress.step % log_every == 0 or progress.step == progress.steps:
        line = f"step {progress.step}/{progress.steps} · {progress_line(progress, predicted_step_s)}"
        console.print(line, highlight=False, soft_wrap=True)
