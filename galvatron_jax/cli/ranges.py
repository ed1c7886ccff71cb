"""Values, lists and ranges as people type them: `64`, `1,2,4`, `16GiB:80GiB:8GiB`, `memory=16GiB,32GiB`. No JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from galvatron_jax.errors import InputError
from galvatron_jax.search.sweeps import Quantity, SweepAxis
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.validation import did_you_mean
from galvatron_jax.units import parse_bytes

MOST_VALUES = 1000

Number = TypeVar("Number", int, float)


def parse_memory(text: str, *, option: str = "--memory") -> int:
    """Bytes of a budget such as `80GiB`.

    Raises:
        InputError: when it is no size, or not positive.
    """
    try:
        budget = parse_bytes(text)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error
    if budget <= 0:
        raise InputError(f"{option}: {text!r} is no budget; it must be positive, such as '20GiB'.")
    return budget


def parse_count(text: str, *, option: str) -> int:
    """A positive whole number.

    Raises:
        InputError: when it is none.
    """
    try:
        number = int(text)
    except ValueError as error:
        raise InputError(f"{option}: {text!r} is no whole number.") from error
    if number < 1:
        raise InputError(f"{option}: {number} must be at least 1.")
    return number


def parse_counts(text: str, *, option: str) -> tuple[int, ...]:
    """Positive whole numbers: one, a list, or a range with its last value and the step.

    Raises:
        InputError: when the text is none of these.

    Example:
        >>> parse_counts("64", option="x"), parse_counts("1,2,4", option="x"), parse_counts("64:256:64", option="x")
        ((64,), (1, 2, 4), (64, 128, 192, 256))
    """
    return parse_values(text, lambda part: parse_count(part, option=option), option=option)


def parse_values(text: str, read: Callable[[str], Number], *, option: str) -> tuple[Number, ...]:
    """A value, a list or a range, ascending and each once.

    Args:
        text: such as `8`, `8,16` or `8:64:8` (the last value belongs to it).
        read: turns the text of one value into a number.
        option: what messages call it.

    Raises:
        InputError: when the text is none of these.
    """
    if ":" not in text:
        return tuple(sorted({read(part) for part in _parts(text, ",", option)}))
    parts = [read(part) for part in _parts(text, ":", option)]
    if len(parts) != 3:
        raise InputError(f"{option}: {text!r} is no range; write first:last:step, such as 16GiB:80GiB:8GiB.")
    first, last, step = parts
    if last < first or step <= 0:
        raise InputError(f"{option}: the range {text!r} is empty; the first value must not exceed the last.")
    count = int((last - first) / step + 1e-9) + 1
    if count > MOST_VALUES:
        raise InputError(f"{option}: the range {text!r} has {count} values; take a larger step, at most {MOST_VALUES}.")
    return tuple(first + index * step for index in range(count))


def parse_schedules(text: str, *, option: str = "--schedules") -> tuple[Schedule, ...]:
    """Schedules of pipelines by name.

    Raises:
        InputError: for an unknown one, with the near name.
    """
    known = [schedule.value for schedule in Schedule if schedule is not Schedule.NONE]
    names = _parts(text, ",", option)
    for name in names:
        if name not in known:
            raise InputError(f"{option}: no schedule {name!r} of pipelines.{did_you_mean(name, known)}")
    return tuple(dict.fromkeys(Schedule(name) for name in names))


def parse_sweep(texts: Iterable[str]) -> tuple[SweepAxis, ...]:
    """What `--sweep` takes, each time it is given.

    Raises:
        InputError: naming the part that cannot be read.

    Example:
        >>> [axis.quantity.value for axis in parse_sweep(["devices=8,16", "inter-bandwidth=x0.5,x1"])]
        ['devices', 'inter-bandwidth']
    """
    return tuple(_axis(text) for text in texts)


def _axis(text: str) -> SweepAxis:
    name, equals, values = text.partition("=")
    known = [quantity.value for quantity in Quantity]
    if name not in known:
        raise InputError(f"--sweep {text}: cannot vary {name!r}.{did_you_mean(name, known)}")
    option = f"--sweep {name}"
    if not equals or not values:
        raise InputError(f"{option}: no values; write for example {_EXAMPLES[Quantity(name)]}.")
    return SweepAxis(Quantity(name), parse_values(values, _reader(Quantity(name), option), option=option))


_EXAMPLES = {
    Quantity.MEMORY: "memory=16GiB:80GiB:8GiB",
    Quantity.DEVICES: "devices=8,16,32",
    Quantity.BATCH: "batch=64:512:64",
    Quantity.INTRA_BANDWIDTH: "intra-bandwidth=x0.5,x1,x2",
    Quantity.INTER_BANDWIDTH: "inter-bandwidth=x0.5,x1,x2",
}


def _reader(quantity: Quantity, option: str) -> Callable[[str], float]:
    if quantity is Quantity.MEMORY:
        return lambda part: parse_memory(part, option=option)
    if quantity.is_multiple:
        return lambda part: _multiple(part, option)
    return lambda part: parse_count(part, option=option)


def _multiple(text: str, option: str) -> float:
    try:
        number = float(text.removeprefix("x"))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise InputError(f"{option}: {text!r} is no multiple; write for example x0.5, x1 or x2.")
    return number


def _parts(text: str, separator: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(separator)]
    if not all(parts):
        raise InputError(f"{option}: {text!r} has an empty part.")
    return parts
