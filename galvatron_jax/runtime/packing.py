"""Arrays that differ from one group of devices to the next, in flat arrays of one size on all.

In one program every device has arrays of the same shapes. Stages with unlike layers do not: so what belongs to one is
laid end to end, one flat array per dtype, as long as the longest.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Name = TypeVar("Name", bound=Hashable)
Flats = dict[str, Any]
"""One-dimensional local arrays by dtype."""


@dataclass(frozen=True)
class Place:
    """Where an array lies in the flat array of its dtype."""

    shape: tuple[int, ...]
    dtype: Any
    offset: int
    words: tuple[int, ...]
    """Shape as stored: random keys as the words they consist of."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.words)

    @property
    def flat(self) -> str:
        """Which flat array holds it."""
        return _plain(self.dtype)


@dataclass(frozen=True)
class Packing(Generic[Name]):
    """Where the arrays of each case lie; a case is a stage, or a group of devices."""

    places: tuple[Mapping[Name, Place], ...]
    """Per case, by name."""

    @classmethod
    def of(cls, cases: Sequence[Mapping[Name, Any]]) -> Packing[Name]:
        """Lays arrays end to end.

        Args:
            cases: per case, what has a shape and a dtype, by name.
        """
        return cls(tuple(_places(case) for case in cases))

    def lengths(self, case: int) -> dict[str, int]:
        """Elements of one case, by dtype."""
        found: dict[str, int] = {}
        for place in self.places[case].values():
            found[place.flat] = max(found.get(place.flat, 0), place.offset + place.size)
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of each flat array: as many as the longest case needs."""
        found: dict[str, int] = {}
        for case in range(len(self.places)):
            for name, length in self.lengths(case).items():
                found[name] = max(found.get(name, 0), length)
        return dict(sorted(found.items()))

    def zeros(self) -> Flats:
        """Flat arrays of zeros."""
        return {name: jnp.zeros(size, name) for name, size in self.sizes.items()}

    def pack(self, case: int, arrays: Mapping[Name, Any]) -> Flats:
        """Flat arrays that hold the arrays of a case."""
        parts: dict[str, list[Any]] = {name: [] for name in self.sizes}
        for name, place in self.places[case].items():
            parts[place.flat].append(jnp.reshape(_words(arrays[name]), -1))
        lengths = self.lengths(case)
        for name, size in self.sizes.items():
            if size > lengths.get(name, 0):
                parts[name].append(jnp.zeros(size - lengths.get(name, 0), name))
        return {name: jnp.concatenate(found) if len(found) > 1 else found[0] for name, found in parts.items()}

    def unpack(self, case: int, flats: Mapping[str, Any]) -> dict[Name, Any]:
        """The arrays of a case."""
        return {name: self.read(case, name, flats) for name in self.places[case]}

    def read(self, case: int, name: Name, flats: Mapping[str, Any]) -> Any:
        """One array of a case."""
        place = self.places[case][name]
        found = lax.slice_in_dim(flats[place.flat], place.offset, place.offset + place.size)
        return _whole(jnp.reshape(found, place.words), place.dtype)

    def write(self, case: int, flats: Mapping[str, Any], arrays: Mapping[Name, Any]) -> Flats:
        """The flat arrays with some arrays of a case put in."""
        new = dict(flats)
        for name, x in arrays.items():
            place = self.places[case][name]
            new[place.flat] = lax.dynamic_update_slice_in_dim(
                new[place.flat], jnp.reshape(_words(x), -1), place.offset, axis=0
            )
        return new

    def add(self, case: int, flats: Mapping[str, Any], arrays: Mapping[Name, Any]) -> Flats:
        """The flat arrays with some arrays of a case added.

        One after another: reads of the arrays as they were, after the first write, would have XLA keep a copy.
        """
        new = dict(flats)
        for name, x in arrays.items():
            new = self.write(case, new, {name: self.read(case, name, new) + x})
        return new

    # ------------------------------------------------------------------------------------------ in slots

    def write_slot(
        self, case: int, flats: Mapping[str, Any], arrays: Mapping[Name, Any], *, slot: Any, strides: Mapping[str, int]
    ) -> Flats:
        """The flat arrays, cut into slots, with the arrays of a case in one slot.

        Args:
            case: which case.
            flats: pools of slots.
            arrays: all arrays of the case.
            slot: a traced number.
            strides: elements of a slot, by dtype.
        """
        new = dict(flats)
        for name, x in arrays.items():
            place = self.places[case][name]
            start = slot * strides[place.flat] + place.offset
            new[place.flat] = lax.dynamic_update_slice_in_dim(
                new[place.flat], jnp.reshape(_words(x), -1), start, axis=0
            )
        return new

    def read_slot(
        self, case: int, flats: Mapping[str, Any], *, slot: Any, strides: Mapping[str, int]
    ) -> dict[Name, Any]:
        """The arrays of a case in one slot."""
        found = {}
        for name, place in self.places[case].items():
            start = slot * strides[place.flat] + place.offset
            x = lax.dynamic_slice_in_dim(flats[place.flat], start, place.size)
            found[name] = _whole(jnp.reshape(x, place.words), place.dtype)
        return found


def _places(arrays: Mapping[Name, Any]) -> dict[Name, Place]:
    lengths: dict[str, int] = {}
    places = {}
    for name, x in arrays.items():
        words = jax.eval_shape(_words, jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)).shape
        place = Place(tuple(x.shape), x.dtype, lengths.get(_plain(x.dtype), 0), words)
        lengths[place.flat] = place.offset + place.size
        places[name] = place
    return places


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
