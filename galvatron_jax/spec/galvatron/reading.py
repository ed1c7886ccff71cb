"""What all readers of Hetu-Galvatron's files share: faults gathered before one is raised, numbers, sequence lengths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galvatron_jax.errors import DocumentError
from galvatron_jax.spec.diff import format_value
from galvatron_jax.spec.validation import did_you_mean, near_name

MB = 1024**2
"""Bytes of what Hetu-Galvatron's files call MB (its `byte_to_MB`)."""

SequenceKey = tuple[int, ...] | None
"""Sequence lengths of a key, one per layer type; None in version 2.0, whose keys name none."""


@dataclass
class Faults:
    """Collects what is wrong with a file, so that a reader hears of all of it at once."""

    source: str
    what: str
    """What the file is, such as "Hetu-Galvatron plan"."""
    lines: list[str] = field(default_factory=list)

    def add(self, place: str, text: str) -> None:
        """Notes a fault at a key of the file."""
        self.lines.append(f"{place}: {text}")

    def check(self) -> None:
        """Raises what was noted.

        Raises:
            DocumentError: naming every fault.
        """
        if self.lines:
            count = "1 fault" if len(self.lines) == 1 else f"{len(self.lines)} faults"
            raise DocumentError("\n  ".join([f"{self.source}: {count} in this {self.what}:", *self.lines]))

    def number(self, place: str, value: Any, *, unit: str, least: float = 0.0) -> float:
        """A finite number of at least `least`; NaN, and a fault, for anything else."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
            bound = f" of at least {least:g}" if least else " that is not negative"
            self.add(place, f"found {format_value(value)}; expected a number{bound}, in {unit}.")
            return math.nan
        return float(value)

    def integer(self, place: str, value: Any, *, least: int = 1) -> int:
        """A whole number of at least `least`; that least, and a fault, for anything else."""
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.add(place, f"found {format_value(value)}; expected a whole number of at least {least}.")
            return least
        return value

    def unknown(self, key: str, patterns: Iterable[str]) -> None:
        """Notes a key that the format does not have."""
        patterns = list(patterns)
        near = near_name(re.sub(r"\d+", "0", key), [re.sub(r"[A-Z]", "0", pattern) for pattern in patterns])
        named = {re.sub(r"[A-Z]", "0", pattern): pattern for pattern in patterns}
        hint = f" Did you mean the form {named[near]!r}?" if near else f" Known forms: {', '.join(patterns)}."
        self.add(repr(key), f"unknown key.{hint}")


def parse_sequence(text: str | None) -> SequenceKey:
    """Sequence lengths as a key writes them.

    Example:
        >>> parse_sequence("2048"), parse_sequence("[512,512]"), parse_sequence("512_128"), parse_sequence(None)
        ((2048,), (512, 512), (512, 128), None)
    """
    if text is None:
        return None
    return tuple(int(part) for part in re.split(r"[,_]", text.strip("[]")))


def format_sequence(key: SequenceKey) -> str:
    """Sequence lengths for messages."""
    return "any" if key is None else ",".join(map(str, key))


def choose_sequence(
    available: Iterable[SequenceKey], wanted: int | Sequence[int] | None, *, source: str, what: str
) -> SequenceKey:
    """The sequence lengths to use of those a file has.

    Args:
        available: What the file has.
        wanted: What is asked for; None for the only one there is.
        source: The file, for messages.
        what: What was measured at these lengths, for messages.

    Raises:
        DocumentError: when the file lacks it, or has several and none was asked for.
    """
    known = sorted(set(available), key=lambda key: key or ())
    if known == [None]:
        return None
    names = "; ".join(format_sequence(key) for key in known)
    if wanted is None:
        if len(known) == 1:
            return known[0]
        raise DocumentError(f"{source}: holds {what} at sequence lengths {names}. Choose one: give `sequence`.")
    key = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    if key not in known:
        raise DocumentError(
            f"{source}: holds no {what} at sequence length {format_sequence(key)}; it has {names}. "
            "Give one of these as `sequence`, or profile the model at yours."
        )
    return key


def find_file(folder: Path, pattern: str, *, what: str, option: str) -> Path:
    """The only file of a folder that matches a pattern.

    Args:
        folder: Where to look; a file stands for itself.
        pattern: Glob pattern of its name.
        what: What it holds, for messages.
        option: How to name one file where there are several, for messages.

    Raises:
        DocumentError: when there is none, or more than one.
    """
    if folder.is_file():
        return folder
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = did_you_mean(folder.name, siblings) if siblings else f" Its folder {folder.parent} does not exist."
        raise DocumentError(f"{folder}: no such folder of Hetu-Galvatron profiles.{hint}")
    found = sorted(folder.glob(pattern))
    # A name with a sequence length holds a single point of the file without it, where both exist.
    names = {path.name for path in found}
    found = [p for p in found if (short := re.sub(r"_seqlen\d+", "", p.name)) == p.name or short not in names]
    if len(found) == 1:
        return found[0]
    if not found:
        others = sorted(path.name for path in folder.glob("*.json"))
        listed = f"it has {', '.join(others)}" if others else "it has no JSON files"
        raise DocumentError(f"{folder}: holds no {what} ({pattern}); {listed}.")
    listed = ", ".join(path.name for path in found)
    raise DocumentError(f"{folder}: holds several files of {what}: {listed}. Choose one: {option}.")
