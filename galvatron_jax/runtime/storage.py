"""How parameters are stored between steps: stacked per run, split where a factor inside a dim is sharded.

A fused `qkv` kernel `(width, 3 · heads · head_dim)` sharded by heads is stored as `(width, 3, heads · head_dim)`: a
plain `PartitionSpec` then shards the right factor, and no step ever reshuffles it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from galvatron_jax.errors import InputError
from galvatron_jax.partition.layer_plan import BoundarySpec, ParameterPlan
from galvatron_jax.runtime.runs import Run, Way
from galvatron_jax.spec.model import PortRole
from galvatron_jax.trace.model import Traced

_SLICE = re.compile(r"(.*)\[(\d+)\]")


@dataclass(frozen=True)
class Piece:
    """One stored dim."""

    size: int
    storage: tuple[str, ...]
    optimizer: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """One stored array: a parameter, or the same parameter of all layers of a run, stacked."""

    key: str
    references: tuple[str, ...]
    """`param:PATH` or `param:PATH[i]` per layer."""
    stacked: bool
    shape: tuple[int, ...]
    """Shape of one parameter, as the model has it."""
    dtype: Any
    dims: tuple[tuple[Piece, ...], ...]
    """Per dim of the parameter, its stored dims."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Global shape of the stored array."""
        lead = (len(self.references),) if self.stacked else ()
        return lead + tuple(p.size for dim in self.dims for p in dim)

    def spec(self, *, optimizer: bool = False) -> PartitionSpec:
        """How the stored array is sharded; or the optimizer's arrays that mirror it."""
        lead = (None,) if self.stacked else ()
        axes = [p.optimizer if optimizer else p.storage for dim in self.dims for p in dim]
        return PartitionSpec(*lead, *((a if len(a) != 1 else a[0]) if a else None for a in axes))

    def boundary(self, *, optimizer: bool = False) -> BoundarySpec:
        """The same dim by dim.

        Raises:
            InputError: when a dim is sharded inside, which only the layer that owns the parameter can read.
        """
        if any(len(dim) > 1 for dim in self.dims):
            raise InputError(
                f"parameter {self.references[0]} is used by several layers but stored in a way that only one of them "
                "can read. Give these layers the same strategy."
            )
        return tuple(dim[0].optimizer if optimizer else dim[0].storage for dim in self.dims)

    def local_shape(self, mesh: Mapping[str, int], *, optimizer: bool = False) -> tuple[int, ...]:
        """Local shape of the stored array."""
        lead = (len(self.references),) if self.stacked else ()
        pieces = [(p.size, p.optimizer if optimizer else p.storage) for dim in self.dims for p in dim]
        return lead + tuple(size // math.prod(mesh[a] for a in axes) for size, axes in pieces)

    def pack(self, parameters: Sequence[Any]) -> Any:
        """From the model's arrays, one a layer, to the stored one."""
        shape = tuple(p.size for dim in self.dims for p in dim)
        arrays = [jnp.reshape(x, shape) for x in parameters]
        return jnp.stack(arrays) if self.stacked else arrays[0]

    def unpack(self, stored: Any) -> list[Any]:
        """From the stored array to the model's, one a layer."""
        parts = [stored[i] for i in range(len(self.references))] if self.stacked else [stored]
        return [jnp.reshape(x, self.shape) for x in parts]


@dataclass(frozen=True)
class Storage:
    """All stored arrays of a model, and where each port of each run finds its own."""

    groups: tuple[Group, ...]
    owned: Mapping[tuple[int, int], str]
    """From (run, port) to the key of the group it owns."""
    tied: Mapping[tuple[int, int], str]
    """From (run, port) to the group of a parameter that an earlier layer owns."""
    plans: Mapping[str, ParameterPlan]
    """Per key, how the owner plans it."""

    def group(self, key: str) -> Group:
        """A group by key."""
        return next(g for g in self.groups if g.key == key)

    def pack(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Stored arrays from the model's leaves by path."""
        return {g.key: g.pack([_leaf(parameters, r) for r in g.references]) for g in self.groups}

    def unpack(self, stored: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
        """The model's leaves by path."""
        found: dict[str, Any] = {}
        slices: dict[str, dict[int, Any]] = {}
        for group in self.groups:
            for reference, x in zip(group.references, group.unpack(stored[group.key]), strict=True):
                path = reference.removeprefix("param:")
                match = _SLICE.fullmatch(path)
                if match and match[1] in paths:
                    slices.setdefault(match[1], {})[int(match[2])] = x
                else:
                    found[path] = x
        for path, parts in slices.items():
            found[path] = jnp.stack([parts[i] for i in range(len(parts))])
        return {path: found[path] for path in paths}


def _leaf(leaves: Mapping[str, Any], reference: str) -> Any:
    path = reference.split(":", 1)[1]
    if path in leaves:
        return leaves[path]
    name, _, index = path.rpartition("[")
    return leaves[name][int(index[:-1])]


def make_storage(traced: Traced, runs: Sequence[Run], *, unread: bool = True) -> Storage:
    """Decides who owns each parameter (its first user) and how it is stored.

    Args:
        traced: the model.
        runs: of one stage.
        unread: whether parameters that no layer of the model reads are stored here too.
    """
    owner: dict[str, str] = {}
    groups: list[Group] = []
    owned: dict[tuple[int, int], str] = {}
    tied: dict[tuple[int, int], str] = {}
    plans: dict[str, ParameterPlan] = {}
    for number, run in enumerate(runs):
        entries = {entry.port: entry for entry in run.local.plan.parameters}
        for port, way in enumerate(run.inputs):
            if run.local.static.kind.inputs[port].role is not PortRole.PARAMETER:
                continue
            references = way.references if way.way is Way.STACKED else way.references[:1]
            if references[0] in owner:
                tied[number, port] = owner[references[0]]
                continue
            group = _group(traced, run, port, entries[port], references, stacked=way.way is Way.STACKED)
            groups.append(group)
            owned[number, port] = group.key
            plans[group.key] = entries[port]
            owner.update(dict.fromkeys(references, group.key))
    if unread:
        groups += _unread(traced)
    return Storage(tuple(groups), owned, tied, plans)


def _group(
    traced: Traced, run: Run, port: int, entry: ParameterPlan, references: Sequence[str], *, stacked: bool
) -> Group:
    value = run.local.static.kind.inputs[port].value
    factors = run.local.static.program.program.values[value].dims
    dims = tuple(
        _pieces([run.local.sizes[f] for f in dim], entry.storage[d], entry.optimizer[d])
        for d, dim in enumerate(factors)
    )
    aval = traced.avals[references[0]]
    key = references[0].removeprefix("param:")
    if stacked:
        key = f"{key} … {references[-1].removeprefix('param:')}"
    return Group(key, tuple(references), stacked, tuple(aval.shape), aval.dtype, dims)


def _pieces(
    sizes: Sequence[int], storage: Sequence[tuple[str, ...]], optimizer: Sequence[tuple[str, ...]]
) -> tuple[Piece, ...]:
    """A dim's stored dims: a new one begins at every factor that is sharded."""
    pieces: list[Piece] = []
    for size, stored, mirrored in zip(sizes, storage, optimizer, strict=True):
        if not pieces or stored or mirrored:
            pieces.append(Piece(size, stored, mirrored))
        else:
            last = pieces[-1]
            pieces[-1] = Piece(last.size * size, last.storage, last.optimizer)
    return tuple(pieces) or (Piece(1, (), ()),)


def _unread(traced: Traced) -> list[Group]:
    """Parameters that no layer reads: kept whole on every device."""
    read = {reference for layer in traced.spec.layers for reference in layer.inputs}
    read |= {_SLICE.sub(r"\1", reference) for reference in read}
    return [
        Group(
            p.path,
            (f"param:{p.path}",),
            False,
            p.shape,
            jnp.dtype(p.dtype),
            tuple((Piece(n, (), ()),) for n in p.shape),
        )
        for p in traced.spec.parameters
        if f"param:{p.path}" not in read
    ]
