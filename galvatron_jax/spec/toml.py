"""Writing TOML (Python reads it but does not write it)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from galvatron_jax.errors import DocumentError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def format_toml(data: dict[str, Any]) -> str:
    """Writes plain data as TOML. Fields that are None are left out, as TOML has no null.

    Raises:
        DocumentError: when a list holds None, which TOML cannot say.

    Example:
        >>> print(format_toml({"name": "gpt", "mesh": [{"size": 2}, {"size": 3}], "time": {"step_s": 0.5}}), end="")
        name = "gpt"
        <BLANKLINE>
        [[mesh]]
        size = 2
        <BLANKLINE>
        [[mesh]]
        size = 3
        <BLANKLINE>
        [time]
        step_s = 0.5
    """
    return "\n".join(_table(data, ())).lstrip("\n") + "\n"


def _table(data: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    present = {key: value for key, value in data.items() if value is not None}
    for key, value in present.items():
        if not _is_table(value) and not _is_tables(value):
            yield f"{_key(key)} = {_inline(value, (*path, key))}"
    for key, value in present.items():
        name = ".".join(map(_key, (*path, key)))
        if _is_table(value):
            yield from ("", f"[{name}]")
            yield from _table(value, (*path, key))
        elif _is_tables(value):
            for item in value:
                yield from ("", f"[[{name}]]")
                yield from _table(item, (*path, key))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _inline(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item, path) for item in value) + "]"
    if isinstance(value, dict):
        present = ((key, item) for key, item in value.items() if item is not None)
        return "{" + ", ".join(f"{_key(key)} = {_inline(item, (*path, key))}" for key, item in present) + "}"
    raise DocumentError(f"{'.'.join(path)}: TOML cannot hold {value!r} here; save the document as .json.")
