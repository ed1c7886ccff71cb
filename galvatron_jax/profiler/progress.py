"""A progress bar on stderr: points done, points in all, time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Step = Callable[[str], None]
"""Called with the name of the point that is measured next."""


@contextmanager
def progress_bar(title: str, *, total: int, show: bool | None = None) -> Iterator[Step]:
    """Shows how far a series of measurements has come.

    Args:
        title: What is measured.
        total: Number of points.
        show: Whether to draw; by default only on a terminal.

    Yields:
        A function to call as each point begins.
    """
    show = sys.stderr.isatty() if show is None else show
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[point]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(title, total=total, point="")
        begun = 0

        def step(point: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, point=point)
            begun += 1

        yield step
        bar.update(task, completed=total, point="")
