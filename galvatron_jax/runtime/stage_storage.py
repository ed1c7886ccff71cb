"""Where the parameters of pipeline stages are stored, and the way there from the model's own arrays and back.

Each group of devices holds its stages' parameters in flat arrays (see `packing`). A parameter that several stages use
has a copy in each; the first is its owner.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from galvatron_jax.runtime.packing import Flats, Packing
from galvatron_jax.runtime.stage import Stage
from galvatron_jax.runtime.storage import Group, Storage
from galvatron_jax.runtime.turns import take_turn

Place = tuple[int, str]
"""A stored array: its stage and key."""


@dataclass(frozen=True)
class Holder:
    """Where a stage holds a parameter."""

    stage: int
    key: str
    row: int | None
    """Among the layers of a stacked group; None in one that is not stacked."""


@dataclass(frozen=True)
class StageStorage:
    """The stored arrays of all stages."""

    stages: tuple[Stage, ...]
    degree: int
    """Groups of devices."""
    axes: tuple[str, ...]
    """Mesh axes along which they lie."""

    def group(self, stage: int, key: str) -> Group:
        """A stored array of a stage."""
        return self.stages[stage].executor.storage.group(key)

    @cached_property
    def holders(self) -> dict[str, list[Holder]]:
        """Per parameter reference, the stages that hold it; the owner first."""
        found: dict[str, list[Holder]] = defaultdict(list)
        for stage in self.stages:
            for group in stage.executor.storage.groups:
                for row, reference in enumerate(group.references):
                    found[reference].append(Holder(stage.number, group.key, row if group.stacked else None))
        return dict(found)

    @cached_property
    def copies(self) -> frozenset[Place]:
        """Stored arrays, by stage and key, all of whose parameters an earlier stage owns."""
        owners = {(holders[0].stage, holders[0].key) for holders in self.holders.values()}
        every = {(holder.stage, holder.key) for holders in self.holders.values() for holder in holders}
        return frozenset(every - owners)

    @cached_property
    def shared(self) -> dict[str, list[Holder]]:
        """The parameters that several stages hold."""
        return {reference: holders for reference, holders in self.holders.items() if len(holders) > 1}

    @cached_property
    def owned(self) -> tuple[tuple[int, Group], ...]:
        """Every stored array that is no copy, with its stage."""
        return tuple(
            (stage.number, group)
            for stage in self.stages
            for group in stage.executor.storage.groups
            if (stage.number, group.key) not in self.copies
        )

    @cached_property
    def whole(self) -> Storage:
        """All stages' stored arrays, none twice."""
        return Storage(tuple(group for _, group in self.owned), {}, {}, {})

    # ------------------------------------------------------------------------------------------ flat arrays

    @cached_property
    def stored(self) -> Packing[Place]:
        """Parameters, per group of devices, by (stage, key)."""
        return self.packing(optimizer=False)

    @cached_property
    def mirrored(self) -> Packing[Place]:
        """Gradients in the optimizer's layout, each where its sum was."""
        sums = {
            (stage.number, key): (stage.number, *port)
            for stage in self.stages
            for port, key in stage.executor.storage.owned.items()
            if port in stage.gradient_shapes
        }
        return self.packing(optimizer=True).laid_over(self._sums, lambda _, place: sums.get(place))

    @cached_property
    def accumulated(self) -> Packing[tuple[int, int, int]]:
        """Sums of gradients over micro-batches, by (stage, run, port), in the same flat arrays."""
        return replace(self._sums, least=self.mirrored.sizes)

    @cached_property
    def _sums(self) -> Packing[tuple[int, int, int]]:
        return Packing.of(
            [
                {
                    (stage.number, *port): shape
                    for stage in self.stages[group :: self.degree]
                    for port, shape in stage.gradient_shapes.items()
                }
                for group in range(self.degree)
            ],
            stacked=lambda name: self.stages[name[0]].stacks(*name[1:]),
        )

    def packing(
        self, *, optimizer: bool, dtype: Callable[[int, Group], Any] = lambda _, group: group.dtype
    ) -> Packing[Place]:
        """Where arrays lie that mirror parameters.

        Args:
            optimizer: whether they are in the optimizer's layout, rather than stored.
            dtype: of what mirrors a stage's stored array; None where nothing does.
        """
        cases: list[dict[Place, jax.ShapeDtypeStruct]] = [{} for _ in range(self.degree)]
        stacks: set[Place] = set()
        for stage in self.stages:
            for group in stage.executor.storage.groups:
                kind = dtype(stage.number, group)
                if kind is not None:
                    shape = group.local_shape(stage.executor.layouts.mesh, optimizer=optimizer)
                    place = stage.number, group.key
                    cases[stage.number % self.degree][place] = jax.ShapeDtypeStruct(shape, kind)
                    stacks |= {place} if group.stacked else set()
        return Packing.of(cases, stacked=stacks.__contains__)

    def owner_of(self, group: Group) -> Holder:
        """Who owns the (first) parameter of a stored array."""
        return self.holders[group.references[0]][0]

    # ------------------------------------------------------------------------------------------ the model's arrays

    def spread(self, stage: int, group: Group, *, optimizer: bool) -> tuple[int | None, PartitionSpec]:
        """How a stored array is spread over all devices, for as long as it is outside the flat arrays.

        Returns:
            The dim that is split along the pipeline axes too, if one can be; and the sharding.
        """
        spec = list(group.spec(optimizer=optimizer))
        spec += [None] * (len(group.stored_shape) - len(spec))
        local = group.local_shape(self.stages[stage].executor.layouts.mesh, optimizer=optimizer)
        dim = next((d for d, size in enumerate(local) if size % self.degree == 0 and size), None)
        if dim is not None:
            own = spec[dim] or ()
            spec[dim] = (*((own,) if isinstance(own, str) else own), *self.axes)
        return dim, PartitionSpec(*spec)

    def specs(self, *, optimizer: bool) -> dict[str, PartitionSpec]:
        """Sharding of every stored array outside the flat ones, by key."""
        return {group.key: self.spread(stage, group, optimizer=optimizer)[1] for stage, group in self.owned}

    def take_out(self, flats: Mapping[str, Any], packing: Packing[Place], *, optimizer: bool) -> dict[str, Any]:
        """Local arrays by key from local flat ones; inside a `shard_map`."""
        here = lax.axis_index(self.axes)
        found = {}
        for stage, group in self.owned:
            case = stage % self.degree
            if (stage, group.key) not in packing.places[case]:
                continue
            x = packing.read(case, (stage, group.key), flats)
            x = jnp.where(here == case, x, jnp.zeros_like(x))
            dim, _ = self.spread(stage, group, optimizer=optimizer)
            if dim is None:
                found[group.key] = lax.psum(x, self.axes)
            else:
                found[group.key] = lax.psum_scatter(x, self.axes, scatter_dimension=dim, tiled=True)
        return found

    def put_in(self, arrays: Mapping[str, Any], packing: Packing[Place], *, optimizer: bool) -> Flats:
        """The inverse of `take_out`; copies are filled from their owners."""
        whole = {}
        for stage, group in self.owned:
            if group.key in arrays:
                dim, _ = self.spread(stage, group, optimizer=optimizer)
                x = arrays[group.key]
                whole[group.key] = x if dim is None else lax.all_gather(x, self.axes, axis=dim, tiled=True)

        def put(case: int, flats: Flats) -> Flats:
            return packing.write(case, flats, self._of_case(case, packing, whole, optimizer=optimizer))

        programs = {case: partial(put, case) for case in range(self.degree)}
        return take_turn(lax.axis_index(self.axes), programs, packing.zeros())

    def _of_case(
        self, case: int, packing: Packing[Place], whole: Mapping[str, Any], *, optimizer: bool
    ) -> dict[Place, Any]:
        found = {}
        for stage, key in packing.places[case]:
            if (stage, key) not in self.copies:
                found[stage, key] = whole[key]
                continue
            group = self.group(stage, key)
            rows = []
            for reference in group.references:
                owner = self.holders[reference][0]
                x = whole[owner.key] if owner.row is None else whole[owner.key][owner.row]
                rows.append(self.moved(x, owner, Holder(stage, key, None), optimizer=optimizer))
            found[stage, key] = jnp.stack(rows) if group.stacked else rows[0]
        return found

    def moved(self, x: Any, source: Holder, target: Holder, *, optimizer: bool) -> Any:
        """One parameter from the layout of one holder to that of another."""
        before, after = self.group(source.stage, source.key), self.group(target.stage, target.key)
        if before.dims == after.dims:
            return x
        executor = self.stages[target.stage].executor
        bounds = before.boundary(optimizer=optimizer), after.boundary(optimizer=optimizer)
        x = executor.move(jnp.reshape(x, executor.local_shape(before.shape, bounds[0])), before.shape, *bounds)
        mesh = executor.layouts.mesh
        lead = 1 if after.stacked else 0
        return jnp.reshape(x, after.local_shape(mesh, optimizer=optimizer)[lead:])

    # ------------------------------------------------------------------------------------------ shared parameters

    def exchanged(self, case: int, arrays: Mapping[Place, Any]) -> dict[str, Any]:
        """What one group of devices adds to the gradients of shared parameters, in their owners' layouts.

        Args:
            case: the group of devices.
            arrays: its gradients in the optimizer's layout, by (stage, key).
        """
        found = self.nothing_exchanged()
        for reference, holders in self.shared.items():
            for holder in self._here(case, holders):
                x = arrays[holder.stage, holder.key]
                x = x if holder.row is None else x[holder.row]
                found[reference] = found[reference] + self.moved(x, holder, holders[0], optimizer=True)
        return found

    def nothing_exchanged(self) -> dict[str, Any]:
        """What a group of devices adds that holds no shared parameter."""
        found = {}
        for reference, (owner, *_) in self.shared.items():
            group, mesh = self.group(owner.stage, owner.key), self.stages[owner.stage].executor.layouts.mesh
            shape = group.local_shape(mesh, optimizer=True)[1 if group.stacked else 0 :]
            found[reference] = jnp.zeros(shape, group.dtype)
        return found

    def with_exchanged(self, case: int, arrays: Mapping[Place, Any], totals: Mapping[str, Any]) -> dict[Place, Any]:
        """Those gradients of one group of devices that hold shared parameters, with theirs summed over all stages."""
        new: dict[Place, Any] = {}
        for reference, holders in self.shared.items():
            for holder in self._here(case, holders):
                x = self.moved(totals[reference], holders[0], holder, optimizer=True)
                place = holder.stage, holder.key
                new[place] = x if holder.row is None else new.get(place, arrays[place]).at[holder.row].set(x)
        return new

    def _here(self, case: int, holders: Sequence[Holder]) -> Iterator[Holder]:
        return (holder for holder in holders if holder.stage % self.degree == case)
