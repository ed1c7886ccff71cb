"""Differences between two documents' data, one readable line per place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_ABSENT = object()
_LONGEST = 80


def format_path(path: Sequence[str | int]) -> str:
    """Writes a place in a document.

    Example:
        >>> format_path(("stages", 0, "groups", 1, "strategy"))
        'stages[0].groups[1].strategy'
    """
    text = ""
    for piece in path:
        text += f"[{piece}]" if isinstance(piece, int) else f".{piece}" if text else piece
    return text


def format_value(value: Any) -> str:
    """Writes a value as a person would read it, cut when long."""
    if value is _ABSENT:
        return "absent"
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def diff_values(left: Any, right: Any) -> list[str]:
    """Compares plain data (dicts, lists, scalars).

    Example:
        >>> diff_values({"mesh": [{"size": 2}], "axes": ["c"]}, {"mesh": [{"size": 3}], "axes": ["b", "c"]})
        ['mesh[0].size: 2 -> 3', "axes: ['c'] -> ['b', 'c']"]
    """
    return [
        f"{format_path(path)}: {format_value(old)} -> {format_value(new)}" for path, old, new in _walk((), left, right)
    ]


def _walk(path: tuple[str | int, ...], left: Any, right: Any) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(k for k in right if k not in left)]:
            yield from _walk((*path, key), left.get(key, _ABSENT), right.get(key, _ABSENT))
    elif _is_list_of_containers(left) and _is_list_of_containers(right):
        for index in range(max(len(left), len(right))):
            pair = (items[index] if index < len(items) else _ABSENT for items in (left, right))
            yield from _walk((*path, index), *pair)
    elif left is _ABSENT or right is _ABSENT or type(left) is not type(right) or left != right:
        yield path, left, right


def _is_list_of_containers(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)
