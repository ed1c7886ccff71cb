"""Files that pictures are written to, and what they need."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from galvatron_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
"""Of files that pictures are written to."""


def check_figure(path: str, *, also: tuple[str, ...] = ()) -> None:
    """Makes sure that a picture can be written, before the work that it shows begins.

    Args:
        path: where to.
        also: other endings that are no pictures, and need nothing.

    Raises:
        InputError: for another ending, or where matplotlib is missing.
    """
    ending = Path(path).suffix
    if ending in also:
        return
    if ending not in ENDINGS:
        raise InputError(f"{path}: pictures are written to {', '.join((*ENDINGS, *also))} files.")
    if find_spec("matplotlib") is None:
        raise InputError(
            f"{path} needs matplotlib, which is not installed. Install it with `pip install 'galvatron-jax[plot]'`."
        )


def save_figure(figure: Figure, path: str) -> None:
    """Writes a picture, and the folder it lies in."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
