"""Metrics of a run: one JSON object per line, kept consistent when a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from galvatron_jax.errors import DocumentError


class MetricsSink(Protocol):
    """Where the trainer sends its records: a file, TensorBoard, wandb."""

    def write(self, record: dict[str, Any]) -> None:
        """Takes one record; `step` counts from 1."""
        ...


class JsonLines:
    """Appends records to a `.jsonl` file.

    Args:
        path: the file; its folder is created.
        resume_step: records after this step are dropped, as the resumed run will write them again; 0 starts anew.
    """

    def __init__(self, path: str | PathLike[str], *, resume_step: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_metrics(self.path) if r["step"] <= resume_step] if self.path.exists() else []
        self._file = self.path.open("w", encoding="utf-8")
        for record in kept:
            self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record, visible to readers at once."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self._file.close()


def read_metrics(path: str | PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of a `.jsonl` file; a last line cut off by a crash is left out.

    Raises:
        DocumentError: when a line before the last is no JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise DocumentError(f"{path}, line {number}: no JSON object: {error.msg}.") from error
