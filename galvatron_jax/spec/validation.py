"""Turning plain data into typed values, with one error that names every fault."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from galvatron_jax.errors import DocumentError
from galvatron_jax.spec.diff import format_path, format_value

Model = TypeVar("Model", bound=BaseModel)

_Path = tuple[str | int, ...]


def validate(cls: type[Model], data: Mapping[str, Any], source: str) -> Model:
    """Builds `cls` from plain data as JSON or TOML gives it: no silent conversions, no unknown keys.

    Args:
        cls: A pydantic model that forbids extra keys.
        data: The fields.
        source: What messages call the data: a path, or words such as "the command line".

    Raises:
        DocumentError: naming every fault with its path, what was found and what is expected.
    """
    check_version(cls, data, source)
    try:
        # Strict validation of JSON takes lists for tuples and text for enumerations, but never "3" for 3.
        return cls.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        faults = _merge(_fault(cls, data, details) for details in error.errors(include_url=False))
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise DocumentError("\n  ".join([f"{source}: {count} in this {cls.__name__}:", *faults]))


def check_version(cls: type[BaseModel], data: Mapping[str, Any], source: str) -> None:
    """Refuses a document of a version that this package does not know.

    Raises:
        DocumentError: naming both versions.
    """
    field = cls.model_fields.get("version")
    version = data.get("version")
    if field is None or type(version) is not int or 1 <= version <= field.default:
        return
    advice = "update galvatron_jax, or make the document anew" if version > 0 else "versions start at 1"
    raise DocumentError(
        f"{source}: this {cls.__name__} has version {version}, but this galvatron_jax knows "
        f"version {field.default}; {advice}."
    )


def near_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, or None."""
    known = list(known)
    folded = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return folded[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence for messages, with a leading space: the near name, or all the known ones.

    Example:
        >>> did_you_mean("h10x8", ["h100x8", "a100x8"])
        " Did you mean 'h100x8'?"
        >>> did_you_mean("zzz", ["h100x8", "a100x8"])
        ' Known: h100x8, a100x8.'
    """
    known = list(known)
    near = near_name(name, known)
    return f" Did you mean {near!r}?" if near else f" Known: {', '.join(known)}."


def _merge(faults: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of the faults; what several alternatives of one field expect stands in one line."""
    expectations: dict[str, list[str]] = {}
    for fault, expected in faults:
        expectations.setdefault(fault, []).append(expected)
    return [fault + " or ".join(dict.fromkeys(expected)) for fault, expected in expectations.items()]


def _fault(cls: type[BaseModel], data: Mapping[str, Any], details: Any) -> tuple[str, str]:
    """What is wrong, and what is expected instead."""
    path = _path_in(data, details["loc"])
    place = format_path(path) or "the document"
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        known = [name for model in _models_at(cls, path[:-1]) for name in model.model_fields]
        return f"{place}: unknown key.{did_you_mean(str(path[-1]), known)}", ""
    if kind == "missing":
        return f"{place}: missing.{_description(cls, path)}", ""
    found = format_value(details["input"])
    if kind in ("enum", "literal_error"):
        known = re.findall(r"'([^']*)'", context["expected"])
        near = near_name(str(details["input"]), known)
        hint = f". Did you mean {near!r}?" if near else ""
        return f"{place}: found {found}; expected ", context["expected"] + hint
    if kind == "value_error":
        return f"{place}: {context['error']}", ""
    return f"{place}: found {found}; expected ", _expected(details["msg"])


def _expected(message: str) -> str:
    """Turns pydantic's "Input should be a valid integer" into "a valid integer"."""
    return re.sub(r"^(Input|Tuple|List|Value|String|Dictionary) should (be|have)? ?", "", message) or message


def _path_in(data: Any, location: Iterable[str | int]) -> _Path:
    """Drops what pydantic adds to a location for unions and keys, so that the path is one in the data."""
    path: list[str | int] = []
    pieces = list(location)
    for position, piece in enumerate(pieces):
        last = position == len(pieces) - 1
        if isinstance(data, Mapping) and (piece in data or last):
            path.append(piece)
            data = data.get(piece)
        elif isinstance(data, (list, tuple)) and isinstance(piece, int):
            path.append(piece)
            data = data[piece] if piece < len(data) else None
    return tuple(path)


def _description(cls: type[BaseModel], path: _Path) -> str:
    for model in _models_at(cls, path[:-1]):
        field = model.model_fields.get(str(path[-1]))
        if field is not None and field.description:
            return " " + " ".join(field.description.split())
    return ""


def _models_at(cls: type[BaseModel], path: _Path) -> list[type[BaseModel]]:
    """The models that may stand at a path of documents of type `cls`."""
    annotations: list[Any] = [cls]
    for piece in path:
        annotations = [inner for annotation in annotations for inner in _step(annotation, piece)]
    return [a for annotation in annotations for a in _alternatives(annotation) if _is_model(a)]


def _step(annotation: Any, piece: str | int) -> Iterator[Any]:
    for alternative in _alternatives(annotation):
        if _is_model(alternative):
            field = alternative.model_fields.get(piece)
            if field is not None:
                yield field.annotation
        elif get_origin(alternative) is dict:
            yield get_args(alternative)[1]
        else:
            yield from (argument for argument in get_args(alternative) if argument is not Ellipsis)


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin is Union or origin is types.UnionType:
        for argument in typing.get_args(annotation):
            yield from _alternatives(argument)
    else:
        yield annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
