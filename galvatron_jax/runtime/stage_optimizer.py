"""Any optax optimizer on the parameters of pipeline stages.

Where the update is proved to treat stored arrays alike (see `optimizer_proof`), each device runs it on its own parts of
its own stages' parameters. Only scalars that combine all parameters, such as a global norm, cross stages. Otherwise the
parameters are taken out, updated as the model's own arrays, and put back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec

from galvatron_jax.runtime.optimizer import trace_update, update_fn
from galvatron_jax.runtime.optimizer_expression import COMBINE, IDENTITY, Evaluation, Node, StoredUpdate
from galvatron_jax.runtime.optimizer_proof import UnprovedError, prove
from galvatron_jax.runtime.optimizer_state import StoredState, flat, model_specs, nested
from galvatron_jax.runtime.packing import Batch, Flats, Packing, Range, View, in_batches
from galvatron_jax.runtime.stage import Stage
from galvatron_jax.runtime.stage_storage import Place, StageStorage
from galvatron_jax.runtime.storage import Group
from galvatron_jax.runtime.synchronise import Synchroniser
from galvatron_jax.runtime.turns import take_turn

logger = logging.getLogger(__name__)

_ACROSS: dict[str, Callable[[Any, tuple[str, ...]], Any]] = {
    "add": lax.psum, "max": lax.pmax, "min": lax.pmin, "and": lax.pmin, "or": lax.pmax,
}  # fmt: skip


def _across(combine: str, x: Any, axes: tuple[str, ...]) -> Any:
    """Combines over devices."""
    if not axes:
        return x
    whole = x.astype(jnp.int32) if x.dtype == np.bool_ else x
    return _ACROSS[combine](whole, axes).astype(x.dtype)


class StageEvaluation(Evaluation):
    """An update of one stage's arrays, on the parts that a device has of them."""

    def __init__(
        self,
        update: StoredUpdate,
        storage: StageStorage,
        stage: Stage,
        arrays: Mapping[str, Mapping[str, Any]],
        slots: Sequence[Mapping[str, Any]],
        others: Mapping[int, Any],
        totals: Mapping[int, Any],
        rows: Range | None = None,
    ) -> None:
        groups = stage.executor.storage.groups
        mesh = stage.executor.layouts.mesh
        self.nodes, self.layout = update.expressions.nodes, update.layout
        self.owned = [g.key for g in groups if (stage.number, g.key) not in storage.copies]
        self.sliced = {g.key: update.sliced[storage.owner_of(g).key] for g in groups}
        self.shapes = {g.key: g.local_shape(mesh, optimizer=True) for g in groups}
        if rows is not None:
            self.shapes = {key: (rows[1] - rows[0], *shape[1:]) for key, shape in self.shapes.items()}
        self.stacked = {g.key: g.stacked for g in groups}
        self.axes = {g.key: _axes(g) for g in groups}
        self.arrays, self.slots, self.others = arrays, slots, others
        self.known = {(node, ""): x for node, x in totals.items()}

    def sharing(self, key: str) -> list[str]:
        """The stage's groups that hold slices of the parameter that one group has slices of."""
        if not self.sliced[key] or key not in self.owned:
            return [key]
        return [k for k in self.owned if self.layout.owners[k] == self.layout.owners[key]]

    def _own(self, combine: str, operand: int, key: str) -> Any:
        return _across(combine, super()._own(combine, operand, key), self.axes[key])

    def terms(self, node: int) -> Mapping[str, int]:
        """Per group of this stage, the scalar that a total combines."""
        return {key: term for key, term in super().terms(node).items() if key in self.owned}

    def partial(self, node: int) -> Any | None:
        """What this stage adds to a total; None where that is nothing."""
        for place in self._needs(node, ""):
            self.value(*place)
        return self.total(node) if self.terms(node) else None


def _axes(group: Group) -> tuple[str, ...]:
    """Mesh axes that split a stored array in the optimizer's layout."""
    return tuple(name for dim in group.dims for piece in dim for name in piece.optimizer)


class _Arrays(NamedTuple):
    """What an update reads, as local flat arrays."""

    gradients: Flats
    slots: list[Flats]
    others: dict[int, Any]
    params: Flats


@dataclass(frozen=True)
class StageOptimizer:
    """An optimizer for the parameters of pipeline stages."""

    optimizer: optax.GradientTransformation
    parameters: Mapping[str, Any]
    """Shapes by path."""
    storage: StageStorage
    layout: StoredState
    update: StoredUpdate | None
    """The update of stored arrays, where there is one."""

    # ------------------------------------------------------------------------------------------ state

    @cached_property
    def slots(self) -> tuple[Packing, ...]:
        """Where the arrays of each slot lie."""
        return tuple(
            self.storage.packing(optimizer=True, dtype=self._dtype_in(slot)) for slot in self.layout.tree.slots
        )

    def _dtype_in(self, slot: Any) -> Callable[[int, Group], Any]:
        def dtype(stage: int, group: Group) -> Any:
            path = self.layout.owners[self.storage.owner_of(group).key][0]
            return self.layout.tree.shapes[slot.leaves[path]].dtype if path in slot.leaves else None

        return dtype

    def pack(self, state: Any) -> dict[str, Any]:
        """Stored arrays by key, per slot, and the other leaves, of the state for the model's own arrays."""
        slots, others = self.layout.split(self.layout.pack(state))
        return {"slots": slots, "others": {str(position): leaf for position, leaf in others.items()}}

    def unpack(self, stored: Mapping[str, Any]) -> Any:
        """The inverse of `pack`."""
        others = {int(position): leaf for position, leaf in stored["others"].items()}
        return self.layout.unpack(self.layout.join(stored["slots"], others))

    def own_specs(self, mesh: Mapping[str, int]) -> dict[str, PartitionSpec]:
        """How the model's own arrays are spread over all devices, by path."""
        specs, degree = {}, self.storage.degree
        for path, spec in model_specs(self.storage.whole, self.parameters).items():
            shape = self.parameters[path].shape
            axes = [_names(part) for part in (*spec, *[None] * (len(shape) - len(spec)))]
            parts = [n // int(np.prod([mesh[a] for a in names])) for n, names in zip(shape, axes, strict=True)]
            dim = next((d for d, n in enumerate(parts) if n and n % degree == 0), None)
            if dim is not None:
                axes[dim] = (*axes[dim], *self.storage.axes)
            specs[path] = PartitionSpec(*(names or None for names in axes))
        return specs

    # ------------------------------------------------------------------------------------------ on stored arrays

    def update_stored(
        self, gradients: Flats, slots: Sequence[Flats], others: Mapping[str, Any], params: Flats
    ) -> tuple[Flats, list[Flats], dict[str, Any]]:
        """New parameters and state, on local flat arrays; inside a `shard_map`.

        Args:
            gradients: in the optimizer's layout, shared parameters summed.
            slots: the state's flat arrays.
            others: its other leaves, by position.
            params: as stored.
        """
        assert self.update is not None
        leaves = {int(position): leaf for position, leaf in others.items()}
        arrays, totals = _Arrays(gradients, list(slots), leaves, params), {}
        for level in self._levels:
            totals |= self._totals(level, arrays, totals)
        programs = {case: partial(self._case, case, gradients, leaves, totals) for case in range(self.storage.degree)}
        new, new_slots = take_turn(lax.axis_index(self.storage.axes), programs, (params, list(slots)))
        plain = _Plain(self.update, leaves, totals)
        after = {str(position): plain.value(node) for position, node in self.update.others.items()}
        return new, new_slots, {position: after.get(position, leaf) for position, leaf in others.items()}

    def _evaluation(
        self, stage: Stage, current: Callable[[], _Arrays], totals: Mapping[int, Any], rows: Range | None = None
    ) -> StageEvaluation:
        """The update of one stage's arrays, or of some of their rows, each read when it is needed."""
        assert self.update is not None
        case, storage = stage.number % self.storage.degree, self.storage

        def read(packing: Packing[Place], key: str, flats: Flats) -> Any:
            return packing.places[case][stage.number, key].part(rows).read(flats)

        def gradient(key: str) -> Any:
            return read(storage.mirrored, key, current().gradients)

        def parameter(key: str) -> Any:
            return Synchroniser(stage.executor).narrow({key: read(storage.stored, key, current().params)})[key]

        def slot(index: int, key: str) -> Any:
            return read(self.slots[index], key, current().slots[index])

        arrays = {"gradient": View(gradient), "parameter": View(parameter)}
        slots = [View(partial(slot, index)) for index in range(len(self.slots))]
        return StageEvaluation(self.update, storage, stage, arrays, slots, current().others, totals, rows)

    def _case(
        self,
        case: int,
        gradients: Flats,
        leaves: dict[int, Any],
        totals: Mapping[int, Any],
        arrays: tuple[Flats, list[Flats]],
    ) -> tuple[Flats, list[Flats]]:
        """What one group of devices does with its parameters and state.

        Some arrays after others, all of which are read before anything is written: XLA would else keep a copy.
        """
        update, storage = self.update, self.storage
        assert update is not None
        now = _Arrays(gradients, arrays[1], leaves, arrays[0])

        def current() -> _Arrays:
            return now

        for stage in storage.stages[case :: storage.degree]:
            whole = self._evaluation(stage, current, totals)
            for batch in self.batches(stage, whole):
                rows, names = batch.rows, batch.names
                run = whole if rows is None else self._evaluation(stage, current, totals, rows)
                owners = {key: storage.owner_of(storage.group(stage.number, key)).key for key in names}
                updated = {key: run.whole(update.parameters[owner], key) for key, owner in owners.items()}
                states = [
                    {key: run.whole(nodes[owner], key) for key, owner in owners.items() if owner in nodes}
                    for nodes in update.slots
                ]
                published = Synchroniser(stage.executor).publish(updated)
                (published, states), now = lax.optimization_barrier(((published, states), now))
                params = storage.stored.write(case, now.params, _at(stage.number, published), rows=rows)
                slots = [
                    packing.write(case, flat, _at(stage.number, state), rows=rows)
                    for packing, flat, state in zip(self.slots, now.slots, states, strict=True)
                ]
                now = now._replace(params=params, slots=slots)
        return now.params, now.slots

    def by_rows(self, group: Group) -> bool:
        """Whether some layers of a stored array may be updated without the others."""
        assert self.update is not None
        return group.stacked and not self.update.sliced[self.storage.owner_of(group).key]

    def batches(self, stage: Stage, run: StageEvaluation) -> Iterator[Batch[str]]:
        """Keys of a stage's arrays, as they are updated together; those with slices of one parameter always are.

        Slices may be reduced as one.
        """
        groups, mesh = {g.key: g for g in stage.executor.storage.groups}, stage.executor.layouts.mesh
        parts: dict[str, list[str]] = {}
        for key in groups:
            parts.setdefault(next(iter(run.sharing(key)), key), []).append(key)
        shapes = {first: groups[first].local_shape(mesh) for first in parts}
        arrays = {first: jax.ShapeDtypeStruct(shape, groups[first].dtype) for first, shape in shapes.items()}
        for batch in in_batches(arrays, lambda key: self.by_rows(groups[key])):
            yield Batch(tuple(key for first in batch.names for key in parts[first]), batch.rows)

    # ------------------------------------------------------------------------------------------ over all parameters

    @cached_property
    def _levels(self) -> list[list[int]]:
        """The totals that the update needs, in steps: each needs those of earlier steps only."""
        assert self.update is not None
        nodes = self.update.expressions.nodes
        depth: dict[int, int] = {}
        for number, node in enumerate(nodes):  # Operands come before what they are used in.
            below = [*node.operands, *(node.payload[1].values() if node.kind == "total" else ())]
            depth[number] = max((depth[i] for i in below), default=0) + (node.kind == "total")
        needed = self._needed()
        totals = [n for n in sorted(needed) if nodes[n].kind == "total"]
        return [[n for n in totals if depth[n] == level] for level in sorted({depth[n] for n in totals})]

    def _needed(self) -> set[int]:
        update = self.update
        assert update is not None
        nodes = update.expressions.nodes
        todo = [*update.parameters.values(), *update.others.values()]
        todo += [node for slot in update.slots for node in slot.values()]
        found: set[int] = set()
        while todo:
            number = todo.pop()
            if number not in found:
                found.add(number)
                node = nodes[number]
                todo += [*node.operands, *(node.payload[1].values() if node.kind == "total" else ())]
        return found

    def _totals(self, level: Sequence[int], arrays: _Arrays, totals: Mapping[int, Any]) -> dict[int, Any]:
        """Totals over all stages."""
        cases = range(self.storage.degree)
        combines = [self._node(number).payload[0] for number in level]
        dtypes: dict[int, Any] = {}
        for case in cases:
            shapes = jax.eval_shape(partial(self._partials, level, case), arrays, dict(totals))
            dtypes |= {number: parts[0].dtype for number, parts in zip(level, shapes, strict=True) if parts}

        def run(case: int, nothing: list[Any]) -> list[Any]:
            parts = self._partials(level, case, arrays, totals)
            return [reduce(COMBINE[c], p, n) for c, p, n in zip(combines, parts, nothing, strict=True)]

        axes = self.storage.axes
        nothing = [jnp.asarray(IDENTITY[c], dtypes[n]) for c, n in zip(combines, level, strict=True)]
        found = take_turn(lax.axis_index(axes), {case: partial(run, case) for case in cases}, nothing)
        return {n: _across(c, x, axes) for n, c, x in zip(level, combines, found, strict=True)}

    def _node(self, number: int) -> Node:
        assert self.update is not None
        return self.update.expressions.nodes[number]

    def _partials(self, level: Sequence[int], case: int, arrays: _Arrays, totals: Mapping[int, Any]) -> list[list[Any]]:
        """Per total, what the stages of one group of devices add to it."""
        stages = self.storage.stages[case :: self.storage.degree]
        runs = [self._evaluation(stage, lambda: arrays, totals) for stage in stages]
        found = [[run.partial(number) for run in runs] for number in level]
        return [[x for x in parts if x is not None] for parts in found]

    # ------------------------------------------------------------------------------------------ on the model's arrays

    def update_own(self, gradients: Mapping[str, Any], state: Any, params: Mapping[str, Any]) -> tuple[dict, Any]:
        """New parameters by key and state, where the update must see the model's own arrays.

        Args:
            gradients: stored arrays by key, outside the flat ones.
            state: the optimizer's.
            params: as the gradients.
        """
        paths = list(self.parameters)
        own = [nested(self.storage.whole.unpack(arrays, paths)) for arrays in (gradients, params)]
        new, state = update_fn(self.optimizer)(own[0], state, own[1])
        return self.storage.whole.pack(flat(new)), state


class _Plain(Evaluation):
    """What does not differ between parameters, once the totals are known."""

    def __init__(self, update: StoredUpdate, others: Mapping[int, Any], totals: Mapping[int, Any]) -> None:
        self.nodes, self.others = update.expressions.nodes, others
        self.known = {(node, ""): x for node, x in totals.items()}


def _at(stage: int, arrays: Mapping[str, Any]) -> dict[Place, Any]:
    return {(stage, key): x for key, x in arrays.items()}


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def make_stage_optimizer(
    optimizer: optax.GradientTransformation, parameters: Mapping[str, Any], storage: StageStorage
) -> StageOptimizer:
    """Prepares an optimizer for pipeline stages.

    Args:
        optimizer: any optax optimizer whose update needs gradients, state and parameters only.
        parameters: their shapes by path.
        storage: how they are stored.

    Raises:
        InputError: when the optimizer does not run on these parameters.
    """
    tree, closed = trace_update(optimizer, parameters)
    layout = StoredState(tree, storage.whole, dict(parameters))
    try:
        update = prove(closed, layout)
        _check_slices(update, storage)
    except UnprovedError as reason:
        logger.info("The optimizer updates the model's own arrays, taken out of the stages, since %s.", reason)
        return StageOptimizer(optimizer, dict(parameters), storage, layout, None)
    return StageOptimizer(optimizer, dict(parameters), storage, layout, update)


def _check_slices(update: StoredUpdate, storage: StageStorage) -> None:
    """A reduction over one parameter must not need its slices in several stages.

    Sums of sums (a global norm) may: they take the slices one by one.

    Raises:
        UnprovedError: where one does.
    """
    stages: dict[tuple[str, ...], set[int]] = {}
    for number, group in storage.owned:
        if update.sliced[group.key]:
            stages.setdefault(update.layout.owners[group.key], set()).add(number)
    split = [owners for owners, numbers in stages.items() if len(numbers) > 1]
    if not split:
        return
    nodes = update.expressions.nodes
    used = {operand for node in nodes for operand in node.operands}
    used |= {
        term
        for node in nodes
        if node.kind == "total"
        for term in node.payload[1].values()
        if nodes[term].payload != node.payload[0]
    }
    if any(node.kind == "own" and number in used for number, node in enumerate(nodes)):
        raise UnprovedError(f"{split[0][0]} is stacked over layers of several stages, and reduced as one array")
