"""Where commands write: results to stdout, as tables or as one JSON document; logs and progress to stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.logging import RichHandler

from galvatron_jax.report.text import TEXT_WIDTH


class Output:
    """Stdout and stderr of one command.

    Args:
        as_json: whether stdout holds one JSON document, and tables go to stderr.
    """

    def __init__(self, *, as_json: bool):
        self.as_json = as_json
        self.log = Console(stderr=True)
        tables = self.log if as_json else Console()
        self._tables = tables if tables.is_terminal else Console(file=tables.file, width=TEXT_WIDTH)

    def show(self, renderables: Iterable[RenderableType]) -> None:
        """Prints tables."""
        for renderable in renderables:
            self._tables.print(renderable, highlight=False)

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        self.log.print(text, highlight=False, soft_wrap=True, markup=False)

    def result(self, document: dict[str, Any]) -> None:
        """Prints the command's one JSON document; nothing where people read."""
        if self.as_json:
            json.dump(document, sys.stdout, indent=2)
            sys.stdout.write("\n")
            sys.stdout.flush()


def configure_logging(console: Console) -> None:
    """Our own log lines on stderr; of the libraries' only what is wrong."""
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("galvatron_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)
