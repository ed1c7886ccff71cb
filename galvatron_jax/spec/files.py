"""Reading and writing the files that documents and configurations live in: JSON and TOML."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
import tomllib
from os import PathLike
from pathlib import Path
from typing import Any

from galvatron_jax.errors import DocumentError
from galvatron_jax.spec.toml import format_toml

_LINE_LENGTH = 110


def read_data(path: str | PathLike[str]) -> dict[str, Any]:
    """Reads the table that a `.json` or `.toml` file holds.

    Raises:
        DocumentError: for a missing file (with the near name in its folder), another suffix or wrong syntax.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise DocumentError(_missing(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{path}: cannot be read as text: {error}.") from error
    parse = parse_json if path.suffix == ".json" else parse_toml
    return parse(text, source=str(path))


def write_data(path: str | PathLike[str], data: dict[str, Any]) -> None:
    """Writes plain data to a `.json` or `.toml` file through a temporary one, so that no reader sees half of it.

    Raises:
        DocumentError: for another suffix, or data that the format cannot hold.
    """
    path = Path(path)
    _check_suffix(path)
    write_text(path, format_json(data) if path.suffix == ".json" else format_toml(data))


def write_text(path: str | PathLike[str], text: str) -> None:
    """Writes a text file whole or not at all, and creates its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files private; give them what an ordinary file gets.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def parse_json(text: str, *, source: str) -> dict[str, Any]:
    """Reads JSON text that holds one table.

    Raises:
        DocumentError: with line and column of wrong syntax, or the name of a key given twice.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"{source}: not valid JSON, line {error.lineno} column {error.colno}: {error.msg}."
        ) from error
    except _DuplicateKeyError as error:
        raise DocumentError(f"{source}: the key {error.args[0]!r} is given twice in one table.") from error
    if not isinstance(data, dict):
        raise DocumentError(f"{source}: holds a {type(data).__name__}; expected a table of named fields.")
    return data


def parse_toml(text: str, *, source: str) -> dict[str, Any]:
    """Reads TOML text.

    Raises:
        DocumentError: with the line of wrong syntax.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DocumentError(f"{source}: not valid TOML: {error}.") from error


def format_json(data: Any) -> str:
    """Writes JSON for people: what fits on a line stays on a line.

    Example:
        >>> print(format_json({"tp": ["b", "c"], "zero": 3}), end="")
        {"tp": ["b", "c"], "zero": 3}
    """
    return _format(data, 0, _LINE_LENGTH) + "\n"


def _format(value: Any, indent: int, room: int) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= room or not value or not isinstance(value, (dict, list)):
        return line
    inner = indent + 2
    if isinstance(value, dict):
        named = ((json.dumps(str(key), ensure_ascii=False) + ": ", item) for key, item in value.items())
        items = [name + _format(item, inner, _LINE_LENGTH - inner - len(name)) for name, item in named]
        opening, closing = "{", "}"
    else:
        items = [_format(item, inner, _LINE_LENGTH - inner) for item in value]
        opening, closing = "[", "]"
    pad = "\n" + " " * inner
    return opening + pad + f",{pad}".join(items) + "\n" + " " * indent + closing


class _DuplicateKeyError(Exception):
    """A JSON object names one key twice, of which Python would silently keep the last."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise _DuplicateKeyError(key)
        data[key] = value
    return data


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".json", ".toml"):
        raise DocumentError(f"{path}: unknown suffix {path.suffix!r}; documents are .json or .toml files.")


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path}: is a folder; give the file inside it."
    if not path.parent.is_dir():
        return f"{path}: no such file; its folder {path.parent} does not exist either."
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_file()], n=1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    return f"{path}: no such file.{hint}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
