"""An optimizer's state: the arrays in it that mirror parameters, and how these are stored.

`init` of optax on the model's own tree gives, for Adam, `(count, mu={"head": {"kernel": ...}}, nu=...)`: `mu` and `nu`
are slots, with one array per parameter. Stored, every slot has one array per group instead, at the group's first
parameter.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import PartitionSpec

from galvatron_jax.errors import InputError
from galvatron_jax.runtime.storage import Group, Storage

_SLICE = re.compile(r"(.*)\[\d+\]$")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that an optimizer sees: leaves by path, as nested dicts.

    Raises:
        InputError: when one path goes through another's leaf.

    Example:
        >>> nested({"blocks/0/kernel": 1, "blocks/1/kernel": 2})
        {'blocks': {'0': {'kernel': 1}, '1': {'kernel': 2}}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                break
        if not isinstance(place, dict) or name in place:
            raise InputError(f"parameter {path!r} has the path of another one; rename one of them, without a '/'.")
        place[name] = leaf
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    leaves: dict[str, Any] = {}
    for name, child in tree.items():
        if isinstance(child, dict):
            leaves |= flat(child, f"{prefix}{name}/")
        else:
            leaves[prefix + name] = child
    return leaves


def parameter_of(reference: str, paths: Mapping[str, Any]) -> str:
    """The path of the parameter that a reference names, whole or a slice of it."""
    path = reference.removeprefix("param:")
    return path if path in paths else _SLICE.sub(r"\1", path)


def is_slice(reference: str, paths: Mapping[str, Any]) -> bool:
    """Whether a reference names one layer's slice of a parameter."""
    return reference.removeprefix("param:") not in paths


@dataclass(frozen=True)
class Slot:
    """Arrays of the state that mirror parameters, such as Adam's `mu`."""

    name: str
    """Where in the state, for messages."""
    leaves: Mapping[str, int]
    """From a parameter's path to the position among the state's leaves."""


@dataclass(frozen=True)
class StateTree:
    """The state that optax gives for the model's own parameters."""

    tree: Any
    """Its `PyTreeDef`."""
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    """Per leaf."""
    slots: tuple[Slot, ...]

    @cached_property
    def mirrored(self) -> dict[int, tuple[int, str]]:
        """From the position of a leaf to its slot and parameter; only leaves that mirror one."""
        return {i: (number, path) for number, slot in enumerate(self.slots) for path, i in slot.leaves.items()}


def state_tree(state: Any, parameters: Mapping[str, Any]) -> StateTree:
    """Finds the slots in a state, which is given as shapes."""
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    names = {tuple(path.split("/")): path for path in parameters}
    places: dict[tuple, dict[str, int]] = defaultdict(dict)
    for position, (path, leaf) in enumerate(paths):
        found = _mirrored(path, names)
        if found and parameters[found[1]].shape == leaf.shape:
            places[found[0]][found[1]] = position
    slots = tuple(Slot(jax.tree_util.keystr(before + after), leaves) for (before, after), leaves in places.items())
    return StateTree(tree, tuple(leaf for _, leaf in paths), slots)


def _mirrored(path: tuple, names: Mapping[tuple, str]) -> tuple[tuple, str] | None:
    """What is before and after the longest (then last) part of a key path that is a parameter's."""
    keys = [key.key if isinstance(key, jax.tree_util.DictKey) else None for key in path]
    for length in range(len(keys), 0, -1):
        for start in range(len(keys) - length, -1, -1):
            name = names.get(tuple(keys[start : start + length]))
            if name is not None:
                return (path[:start], path[start + length :]), name
    return None


@dataclass(frozen=True)
class StoredState:
    """The state with one array per slot and group."""

    tree: StateTree
    storage: Storage
    parameters: Mapping[str, Any]
    """Shapes by path."""

    @cached_property
    def owners(self) -> dict[str, tuple[str, ...]]:
        """Per group, its parameters."""
        return {
            group.key: tuple(dict.fromkeys(parameter_of(r, self.parameters) for r in group.references))
            for group in self.storage.groups
        }

    def groups(self, slot: Slot) -> tuple[Group, ...]:
        """The groups that a slot mirrors: of masked parameters it has nothing."""
        return tuple(g for g in self.storage.groups if self.owners[g.key][0] in slot.leaves)

    def split(self, state: Any) -> tuple[list[dict[str, Any]], dict[int, Any]]:
        """A stored state's arrays, per slot by key, and its other leaves by position."""
        slots: list[dict[str, Any]] = [{} for _ in self.tree.slots]
        others = {}
        for position, leaf in enumerate(self.tree.tree.flatten_up_to(state)):
            if position in self.tree.mirrored:
                slots[self.tree.mirrored[position][0]] |= leaf
            else:
                others[position] = leaf
        return slots, others

    def join(self, slots: Sequence[Mapping[str, Any]], others: Mapping[int, Any]) -> Any:
        """The inverse of `split`."""
        leaves: list[Any] = [others.get(i, {}) for i in range(len(self.tree.shapes))]
        for slot, arrays in zip(self.tree.slots, slots, strict=True):
            at: dict[int, dict[str, Any]] = defaultdict(dict)
            for key, array in arrays.items():
                at[slot.leaves[self.owners[key][0]]][key] = array
            for position in slot.leaves.values():
                leaves[position] = dict(at[position])
        return self.tree.tree.unflatten(leaves)

    def pack(self, state: Any) -> Any:
        """From the model's own state."""
        leaves = self.tree.tree.flatten_up_to(state)
        slots = [
            self._part(slot).pack({path: leaves[position] for path, position in slot.leaves.items()})
            for slot in self.tree.slots
        ]
        return self.join(slots, {i: x for i, x in enumerate(leaves) if i not in self.tree.mirrored})

    def unpack(self, state: Any) -> Any:
        """To the model's own state."""
        slots, leaves = self.split(state)
        for slot, arrays in zip(self.tree.slots, slots, strict=True):
            own = self._part(slot).unpack(arrays, list(slot.leaves))
            leaves |= {slot.leaves[path]: x for path, x in own.items()}
        return self.tree.tree.unflatten([leaves[i] for i in range(len(self.tree.shapes))])

    def _part(self, slot: Slot) -> Storage:
        return dataclasses.replace(self.storage, groups=self.groups(slot))


def model_specs(storage: Storage, parameters: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """How arrays shaped like the model's own parameters are sharded: as the optimizer's stored ones, dim by dim.

    A dim that is sharded inside, such as heads of a fused `qkv`, is whole: no `PartitionSpec` says it.
    """
    specs: dict[str, list[tuple[str, ...]]] = {}
    for group in storage.groups:
        inner = [dim[0].optimizer for dim in group.dims]
        for reference in group.references:
            path = parameter_of(reference, parameters)
            spec = [(), *inner] if is_slice(reference, parameters) else inner
            known = specs.setdefault(path, spec)
            specs[path] = [a if a == b else () for a, b in zip(known, spec, strict=True)]
    return {path: PartitionSpec(*(axes or None for axes in spec)) for path, spec in specs.items()}
