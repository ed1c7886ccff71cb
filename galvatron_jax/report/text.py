"""Rich renderables as plain text, for `explain()` and for files."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

TEXT_WIDTH = 110


def render(renderables: Iterable[RenderableType], *, width: int = TEXT_WIDTH) -> str:
    """Draws renderables one under the other, without colours.

    Args:
        renderables: tables, panels, text.
        width: columns.

    Example:
        >>> print(render(["a plan"]))
        a plan
    """
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(*renderables, sep="\n")
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def titled(title: str, table: Table) -> Group:
    """A table under its title, which may be wider than the table."""
    return Group(Text(title, style="bold"), table)


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Group:
    """A table of names and values."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return titled(title, table)


def share(part: float, whole: float) -> str:
    """A part of a whole in per cent.

    Example:
        >>> share(1, 4)
        '25 %'
    """
    return f"{100 * part / whole:.0f} %" if whole else "–"


def per_second(rate: float) -> str:
    """A number of things per second, to at least three digits.

    Example:
        >>> per_second(274161.5), per_second(1.3994)
        ('274,162', '1.399')
    """
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"
