"""Arrays that differ from one group of devices to the next, in flat arrays of one size on all.

In one program every device has arrays of the same shapes. Stages with unlike layers do not: so what belongs to one is
laid end to end, one flat array per dtype, as long as the longest. It consists of lines of `LINE` elements, and every
array begins a new one: their numbers stay within 32 bits where those of elements would not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from galvatron_jax.cost.sizes import LINE, lines_of

Name = TypeVar("Name", bound=Hashable)
Other = TypeVar("Other", bound=Hashable)
Range = tuple[int, int]
"""Of rows: the first, and the one after the last."""
Flats = dict[str, Any]
"""Local arrays by dtype. [lines, LINE]"""
_BATCH_BYTES = 2**25
"""About as much as XLA's GPU compiler puts into one collective, 30 MB by default."""
_PART_BYTES = 2**28
"""Of a stack of layers, worked on at once: an update has several arrays of this size beside what it changes."""


@dataclass(frozen=True)
class Place:
    """Where an array lies in the flat array of its dtype."""

    shape: tuple[int, ...]
    dtype: Any
    first: int
    """Line that it begins with."""
    words: tuple[int, ...]
    """Shape as stored: random keys as the words they consist of."""
    stacked: bool = False
    """Whether its rows along dim 0 begin a new line each."""

    @property
    def rows(self) -> int:
        """Arrays that begin a line."""
        return self.words[0] if self.stacked else 1

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of one of them, as stored."""
        return self.words[1:] if self.stacked else self.words

    @property
    def lines(self) -> int:
        """Of all rows."""
        return self.rows * lines_of(math.prod(self.row))

    @property
    def flat(self) -> str:
        """Which flat array holds it."""
        return _plain(self.dtype)

    def part(self, rows: Range | None) -> Place:
        """Where some of its rows lie; None for all."""
        if rows is None:
            return self
        begin, end = rows
        first = self.first + begin * lines_of(math.prod(self.row))
        lead = (end - begin,)
        return replace(self, first=first, shape=lead + self.shape[1:], words=lead + self.words[1:])

    def read(self, flats: Mapping[str, Any], *, offset: Any = 0) -> Any:
        """The array, from flat ones; `offset` lines further on, which may be traced."""
        lines = lax.dynamic_slice_in_dim(flats[self.flat], self.first + offset, self.lines)
        return _whole(_from_lines(lines, self.row, self.rows if self.stacked else None), self.dtype)

    def write(self, flats: Mapping[str, Any], x: Any, *, offset: Any = 0) -> Flats:
        """The flat arrays with the array put in."""
        lines = _to_lines(jnp.reshape(_words(x), self.words), self.rows)
        flat = lax.dynamic_update_slice_in_dim(flats[self.flat], lines, self.first + offset, axis=0)
        return {**flats, self.flat: flat}


@dataclass(frozen=True)
class Rows:
    """Arrays of one shape in a flat array, each to be read by itself.

    A loop that took them all out of the flat array before it begins would have them twice.
    """

    flat: Any
    first: int
    """Line that row 0 begins with."""
    length: int
    shape: tuple[int, ...]
    """Of a row."""

    def __getitem__(self, index: Any) -> Any:
        """One row; the index may be traced."""
        lines = lines_of(math.prod(self.shape))
        return _from_lines(lax.dynamic_slice_in_dim(self.flat, self.first + index * lines, lines), self.shape)

    def reshaped(self, shape: tuple[int, ...]) -> Rows:
        """The same, each row in another shape."""
        return Rows(self.flat, self.first, self.length, shape)


class View(Mapping[Name, Any]):
    """Arrays by name, each read when it is asked for."""

    def __init__(self, read: Callable[[Name], Any]) -> None:
        self._read = read

    def __getitem__(self, name: Name) -> Any:
        return self._read(name)

    def __iter__(self) -> Iterator[Name]:
        raise TypeError("the names are not known")

    def __len__(self) -> int:
        raise TypeError("the names are not known")


@dataclass(frozen=True)
class Packing(Generic[Name]):
    """Where the arrays of each case lie; a case is a stage, or a group of devices."""

    places: tuple[Mapping[Name, Place], ...]
    """Per case, by name."""
    least: Mapping[str, int] = field(default_factory=dict)
    """Lines that flat arrays have at least."""

    @classmethod
    def of(
        cls, cases: Sequence[Mapping[Name, Any]], *, stacked: Callable[[Name], bool] = lambda _: False
    ) -> Packing[Name]:
        """Lays arrays end to end.

        Args:
            cases: per case, what has a shape and a dtype, by name.
            stacked: whether an array's rows begin a new line each, by name.
        """
        return cls(tuple(_places(case, stacked) for case in cases))

    def laid_over(self, below: Packing[Other], where: Callable[[int, Name], Other | None]) -> Packing[Name]:
        """The same arrays in the flat arrays of another packing: each in the place of another array, which it replaces.

        Args:
            below: the other packing.
            where: from a case and a name to the array to replace; None for one that lies behind all others.
        """
        cases = []
        for case, places in enumerate(self.places):
            ends, found = below.lengths(case), {}
            for name, place in places.items():
                other = where(case, name)
                free = None if other is None else below.places[case][other]
                if free is not None and free.flat == place.flat and free.lines >= place.lines:
                    found[name] = replace(place, first=free.first)
                else:
                    found[name] = replace(place, first=ends.get(place.flat, 0))
                    ends[place.flat] = ends.get(place.flat, 0) + place.lines
            cases.append(found)
        return Packing(tuple(cases), below.sizes)

    def lengths(self, case: int) -> dict[str, int]:
        """Lines of one case, by dtype."""
        found: dict[str, int] = {}
        for place in self.places[case].values():
            found[place.flat] = max(found.get(place.flat, 0), place.first + place.lines)
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Lines of each flat array: as many as the longest case needs."""
        found = dict(self.least)
        for case in range(len(self.places)):
            for name, length in self.lengths(case).items():
                found[name] = max(found.get(name, 0), length)
        return dict(sorted(found.items()))

    def zeros(self) -> Flats:
        """Flat arrays of zeros."""
        return {name: jnp.zeros((lines, LINE), name) for name, lines in self.sizes.items()}

    def pack(self, case: int, arrays: Mapping[Name, Any]) -> Flats:
        """Flat arrays that hold the arrays of a case."""
        parts: dict[str, list[Any]] = {name: [] for name in self.sizes}
        for name, place in self.places[case].items():
            parts[place.flat].append(_to_lines(jnp.reshape(_words(arrays[name]), place.words), place.rows))
        lengths = self.lengths(case)
        for name, lines in self.sizes.items():
            rest = lines - lengths.get(name, 0)
            if rest or not parts[name]:
                parts[name].append(jnp.zeros((rest, LINE), name))
        return {name: jnp.concatenate(found) if len(found) > 1 else found[0] for name, found in parts.items()}

    def unpack(self, case: int, flats: Mapping[str, Any]) -> dict[Name, Any]:
        """The arrays of a case."""
        return {name: self.read(case, name, flats) for name in self.places[case]}

    def view(self, case: int, flats: Mapping[str, Any]) -> Mapping[Name, Any]:
        """The arrays of a case, each read when it is asked for."""
        return View(lambda name: self.read(case, name, flats))

    def read(self, case: int, name: Name, flats: Mapping[str, Any]) -> Any:
        """One array of a case."""
        return self.places[case][name].read(flats)

    def rows(self, case: int, name: Name, flats: Mapping[str, Any]) -> Rows:
        """One stacked array of a case, to be read row by row."""
        place = self.places[case][name]
        return Rows(flats[place.flat], place.first, place.rows, place.row)

    def write(
        self, case: int, flats: Mapping[str, Any], arrays: Mapping[Name, Any], *, rows: Range | None = None
    ) -> Flats:
        """The flat arrays with some arrays of a case put in, or with some of their rows."""
        new = dict(flats)
        for name, x in arrays.items():
            new = self.places[case][name].part(rows).write(new, x)
        return new

    def add(self, case: int, flats: Mapping[str, Any], name: Name, x: Any, *, row: Any | None = None) -> Flats:
        """The flat arrays with something added to one array of a case, or to one row of it, whose number may be traced.

        What is added to is read from the flat arrays as they are by then, so that XLA need not keep them as they were.
        """
        place, offset = self.places[case][name], 0
        if row is not None:
            place, offset, x = place.part((0, 1)), row * lines_of(math.prod(place.row)), x[None]
        return place.write(flats, place.read(flats, offset=offset) + x, offset=offset)

    # ------------------------------------------------------------------------------------------ in slots

    def write_slot(
        self, case: int, flats: Mapping[str, Any], arrays: Mapping[Name, Any], *, slot: Any, strides: Mapping[str, int]
    ) -> Flats:
        """The flat arrays, cut into slots, with the arrays of a case in one slot.

        Args:
            case: which case.
            flats: pools of slots.
            arrays: some arrays of the case.
            slot: a traced number.
            strides: lines of a slot, by dtype.
        """
        new = dict(flats)
        for name, x in arrays.items():
            place = self.places[case][name]
            new = place.write(new, x, offset=slot * strides[place.flat])
        return new

    def read_slot(
        self, case: int, flats: Mapping[str, Any], *, slot: Any, strides: Mapping[str, int]
    ) -> dict[Name, Any]:
        """The arrays of a case in one slot."""
        return {name: place.read(flats, offset=slot * strides[place.flat]) for name, place in self.places[case].items()}


@dataclass(frozen=True)
class Batch(Generic[Name]):
    """Arrays to work on together; or some rows of one."""

    names: tuple[Name, ...]
    rows: Range | None = None


def in_batches(arrays: Mapping[Name, Any], stacked: Callable[[Name], bool]) -> Iterator[Batch[Name]]:
    """Arrays, in order, in batches that are worth a collective and take little room.

    Args:
        arrays: what has a shape and a dtype, by name.
        stacked: whether an array may be worked on row by row.
    """
    names: list[Name] = []
    held = 0
    for name, x in arrays.items():
        size = math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        parts = row_parts(x) if stacked(name) else [None]
        if names and (held + size > _BATCH_BYTES or len(parts) > 1):
            yield Batch(tuple(names))
            names, held = [], 0
        if len(parts) > 1:
            yield from (Batch((name,), rows) for rows in parts)
        else:
            names, held = [*names, name], held + size
    if names:
        yield Batch(tuple(names))


def row_parts(x: Any) -> list[Range | None]:
    """Ranges of rows of a stack, each of which takes little room; None alone where all do."""
    rows = max(x.shape[0], 1)
    each = max(1, _PART_BYTES * rows // max(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize, 1))
    if each >= rows:
        return [None]
    return [(begin, min(begin + each, rows)) for begin in range(0, rows, each)]


def _places(arrays: Mapping[Name, Any], stacked: Callable[[Name], bool]) -> dict[Name, Place]:
    lengths: dict[str, int] = {}
    places = {}
    for name, x in arrays.items():
        words = jax.eval_shape(_words, jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)).shape
        place = Place(tuple(x.shape), x.dtype, lengths.get(_plain(x.dtype), 0), words, stacked(name))
        lengths[place.flat] = place.first + place.lines
        places[name] = place
    return places


def _to_lines(x: Any, rows: int) -> Any:
    """Rows of an array, each filled up with zeros to whole lines. [rows * lines, LINE]."""
    size = x.size // max(rows, 1)
    x, rest = jnp.reshape(x, (rows, size)), -size % LINE
    return jnp.reshape(jnp.pad(x, ((0, 0), (0, rest))) if rest else x, (rows * lines_of(size), LINE))


def _from_lines(lines: Any, shape: tuple[int, ...], rows: int | None = None) -> Any:
    """The inverse of `_to_lines`: one array, or a stack of them."""
    size = math.prod(shape)
    x = jnp.reshape(lines, (1 if rows is None else rows, lines_of(size) * LINE))
    x = x if x.shape[1] == size else x[:, :size]
    return jnp.reshape(x, shape if rows is None else (rows, *shape))


def _is_key(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _plain(dtype: Any) -> str:
    return "uint32" if _is_key(dtype) else str(jnp.dtype(dtype))


def _words(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x.dtype) else x


def _whole(x: Any, dtype: Any) -> Any:
    if not _is_key(dtype):
        return x
    return jax.random.wrap_key_data(x, impl=_implementation(dtype))


def _implementation(dtype: Any) -> str:
    """The name of a key type's generator."""
    names: list[str] = []

    def look(key: Any) -> Any:
        names.append(str(jax.random.key_impl(key)))
        return key

    jax.eval_shape(look, jax.ShapeDtypeStruct((), dtype))
    return names[0]
