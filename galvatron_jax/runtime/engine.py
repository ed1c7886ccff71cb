"""The schedule's table made to run: one scan over its ticks, on local arrays of every device.

In each tick a device does at most one forward and one backward, as its row of the table says: a `switch` over the
virtual stages picks the program, so stages may be as unlike as they please. Values move on between ticks by two
permutes along the pipeline axes. These stand outside the switches: a permute waits for all devices, and inside a branch
that only some of them take it would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from galvatron_jax.cost.schedules import IDLE, ScheduleTable, slots
from galvatron_jax.runtime.clocks import Clock
from galvatron_jax.runtime.packing import Flats, Packing
from galvatron_jax.runtime.results import measures, new_state
from galvatron_jax.runtime.stage import Stage


def received_packing(stages: Sequence[Stage]) -> Packing[str]:
    """Where values lie that move on to the next stage; a case per stage that receives."""
    return Packing.of([stage.received_shapes for stage in stages])


def handed_back_packing(stages: Sequence[Stage]) -> Packing[str]:
    """Where cotangents lie that move back; a case per stage that hands back."""
    return Packing.of([stage.cotangent_shapes for stage in stages])


@dataclass(frozen=True)
class Outcome:
    """What all micro-batches give a device."""

    gradients: Flats
    """Packed as `Engine.gradients` says, sums over data axes pending."""
    state: dict[str, Any]
    """Model state by path, the same on all devices."""
    sums: dict[str, Any]
    """Metrics times weights, summed; the same on all devices."""
    weight: Any


@dataclass
class Engine:
    """Runs a schedule. Only inside a `shard_map` that is manual over every mesh axis."""

    table: ScheduleTable
    stages: tuple[Stage, ...]
    axes: tuple[str, ...]
    """Mesh axes along which the groups of devices lie."""
    unpack: Callable[[int], Mapping[str, Any]]
    """From a virtual stage to its stored arrays by key; read inside the stage's branches."""
    clock: Clock | None = None
    """Of the state that several stages share."""

    def __post_init__(self) -> None:
        self.group = lax.axis_index(self.axes)
        self.degree = self.table.num_stages
        self.names: dict[int, dict[str, str]] = {}
        """Per stage, which kept array stands for which."""

    # ------------------------------------------------------------------------------------------ shapes

    @cached_property
    def received(self) -> Packing[str]:
        """What stages receive."""
        return received_packing(self.stages)

    @cached_property
    def handed_back(self) -> Packing[str]:
        """Cotangents of what stages received."""
        return handed_back_packing(self.stages)

    @cached_property
    def gradients(self) -> Packing[tuple[int, int, int]]:
        """Accumulated gradients of each group of devices, by (stage, run, port)."""
        return Packing.of(
            [
                {
                    (stage.number, *name): shape
                    for stage in self.stages[group :: self.degree]
                    for name, shape in stage.gradient_shapes.items()
                }
                for group in range(self.degree)
            ]
        )

    def kept(self, state: Mapping[str, Any], batch: Mapping[str, Any]) -> Packing[str]:
        """What each stage keeps of a micro-batch from its forward to its backward."""
        return Packing.of([self._kept_shapes(stage, state, batch) for stage in self.stages])

    def _kept_shapes(self, stage: Stage, state: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        if self.table.recomputes:
            # The last stage's input is used in the tick in which it comes.
            return {} if stage.last else jax.eval_shape(stage.inputs_to_keep, state, stage.received_shapes)

        def keep(state: Any, batch: Any, received: Any) -> dict[str, Any]:
            return self._forward(stage, state, _slice(batch, 0), received)[0]

        return jax.eval_shape(keep, state, batch, stage.received_shapes)

    # ------------------------------------------------------------------------------------------ running

    def run(self, state: Mapping[str, Any], batch: Mapping[str, Any]) -> Outcome:
        """All micro-batches.

        Args:
            state: model state by path, whole.
            batch: local leaves of all micro-batches by path; dim 0 is the micro-batch.
        """
        self.ticking, after = self.clock.before_each(state, self.table.num_microbatches) if self.clock else ({}, {})
        self.kept_packing = self.kept(state, batch)
        self.strides = self._strides()
        sums, weight = self._zero_measures(state, batch)
        carry = {
            "pool": {name: jnp.zeros(size, name) for name, size in self._pool_sizes().items()},
            "gradients": self.gradients.zeros(),
            "state": dict(state),
            "sums": sums,
            "weight": weight,
            "received": self.received.zeros(),
            "cotangents": self.handed_back.zeros(),
        }
        final, _ = lax.scan(lambda c, row: (self._tick(c, row, batch), None), carry, self._rows())
        sums, weight = lax.psum((final["sums"], final["weight"]), self.axes)
        return Outcome(final["gradients"], self._agreed(state, final["state"]) | after, sums, weight)

    def _rows(self) -> dict[str, Any]:
        table = self.table
        columns = ("forward_stage", "forward_microbatch", "forward_slot")
        columns += ("backward_stage", "backward_microbatch", "backward_slot")
        return {name: jnp.asarray(getattr(table, name)) for name in columns}

    def _strides(self) -> list[dict[str, int]]:
        """Per virtual stage, elements of a slot: chunks of one group share its slots."""
        packing = self.kept_packing
        strides: list[dict[str, int]] = [{} for _ in range(self.degree)]
        for stage in self.stages:
            own = strides[stage.number % self.degree]
            for name, length in packing.lengths(stage.number).items():
                own[name] = max(own.get(name, 0), length)
        return [strides[stage.number % self.degree] for stage in self.stages]

    def _pool_sizes(self) -> dict[str, int]:
        counts = slots(self.table)
        sizes: dict[str, int] = {}
        for stage, strides in zip(self.stages, self.strides, strict=True):
            for name, stride in strides.items():
                sizes[name] = max(sizes.get(name, 0), stride * counts[stage.number % self.degree])
        return dict(sorted(sizes.items()))

    def _tick(self, carry: dict[str, Any], row: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        """One row of the table: a forward, a backward, and values moved on."""
        mine = {name: lax.dynamic_index_in_dim(x, self.group, keepdims=False) for name, x in row.items()}
        idle = len(self.stages)
        which = {way: jnp.where(mine[f"{way}_stage"] == IDLE, idle, mine[f"{way}_stage"]) for way in _WAYS}
        forwards = [self._forward_branch(stage) for stage in self.stages]
        backwards = [self._backward_branch(stage) for stage in self.stages]
        moved = {"forward": carry["received"], "backward": carry["cotangents"]}
        rest = {name: x for name, x in carry.items() if name not in ("received", "cotangents")}
        work = (rest, moved, batch, mine["forward_microbatch"], mine["forward_slot"])
        rest, sent = lax.switch(which["forward"], [*forwards, _idle("forward")], *work)
        work = (rest, moved, batch, mine["backward_microbatch"], mine["backward_slot"])
        rest, handed = lax.switch(which["backward"], [*backwards, _idle("backward")], *work)
        return {**rest, "received": self._shift(sent, 1), "cotangents": self._shift(handed, -1)}

    def _shift(self, flats: Flats, way: int) -> Flats:
        """What the group before (or, for -1, behind) made."""
        degree = self.degree
        pairs = [(i, (i + way) % degree) for i in range(degree)]
        if self.table.num_chunks == 1:
            pairs = [(i, j) for i, j in pairs if j == i + way]
        return {name: lax.ppermute(x, self.axes, pairs) for name, x in flats.items()}

    # ------------------------------------------------------------------------------------------ branches

    def _forward(
        self, stage: Stage, state: Mapping[str, Any], batch: Mapping[str, Any], received: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What a stage that stashes keeps, what it sends, and its results by sink."""
        sent, values, tapes = stage.forward(self.unpack(stage.number), state, batch, received)
        seed = self._seed(stage, values) if stage.last else None
        kept, self.names[stage.number] = stage.tapes_to_keep(tapes, seed)
        return kept, sent, values

    def _forward_branch(self, stage: Stage) -> Callable:
        number = stage.number

        def branch(rest: dict, moved: dict, batch: dict, microbatch: Any, slot: Any) -> tuple[dict, Flats]:
            received, state = self.received.unpack(number, moved["forward"]), self._state(rest, microbatch)
            leaves = _slice(batch, microbatch)
            if self.table.recomputes:
                kept = stage.inputs_to_keep(state, received)
                sent, values, _ = stage.forward(self.unpack(number), state, leaves, received)
            else:
                kept, sent, values = self._forward(stage, state, leaves, received)
            pool = self.kept_packing.write_slot(number, rest["pool"], kept, slot=slot, strides=self.strides[number])
            passed = moved["forward"] if stage.last else self.received.pack(number + 1, sent)
            return self._with_results(stage, {**rest, "pool": pool}, values), passed

        # Where the schedule recomputes, the last stage's forward is part of its backward.
        return _idle("forward") if stage.last and self.table.recomputes else branch

    def _backward_branch(self, stage: Stage) -> Callable:
        number, again = stage.number, self.table.recomputes

        def branch(rest: dict, moved: dict, batch: dict, microbatch: Any, slot: Any) -> tuple[dict, Flats]:
            leaves, params = _slice(batch, microbatch), self.unpack(number)
            state, seed = self._state(rest, microbatch), None
            if stage.last and again:
                # Its forward is here alone.
                _, values, tapes = stage.forward(params, state, leaves, self.received.unpack(number, moved["forward"]))
                seed, rest = self._seed(stage, values), self._with_results(stage, rest, values)
            else:
                kept = self.kept_packing.read_slot(number, rest["pool"], slot=slot, strides=self.strides[number])
                if again:
                    tapes = stage.again(params, *stage.inputs_kept(state, kept, leaves))
                else:
                    tapes, seed = stage.tapes_kept(kept, self.names[number], params, state, leaves)
            gradients, handed = stage.backward(tapes, self._cotangents(stage, moved["backward"], seed))
            found = {(number, *name): x for name, x in gradients.items()}
            added = self.gradients.add(number % self.degree, rest["gradients"], found)
            return {**rest, "gradients": added}, self.handed_back.pack(number, handed)

        return branch

    def _seed(self, stage: Stage, values: Mapping[str, Any]) -> Any:
        return next(iter(stage.executor.seed(values).values()))

    def _state(self, rest: Mapping[str, Any], microbatch: Any) -> dict[str, Any]:
        """Model state as a micro-batch sees it."""
        return {**rest["state"], **_slice(self.ticking, microbatch)}

    def _cotangents(self, stage: Stage, moved: Flats, seed: Any | None) -> dict[str, Any]:
        if not stage.last:
            return self.handed_back.unpack(stage.number + 1, moved)
        return {dict(stage.executor.traced.spec.results)["loss"]: seed}

    # ------------------------------------------------------------------------------------------ results

    def _with_results(self, stage: Stage, rest: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        rest = {**rest, "state": new_state(rest["state"], values)}
        if not stage.last:
            return rest
        sums, weight = measures(stage.executor, values)
        return {**rest, "sums": jax.tree.map(jnp.add, rest["sums"], sums), "weight": rest["weight"] + weight}

    def _zero_measures(self, state: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        stage = self.stages[-1]

        def measured(state: Any, batch: Any, received: Any) -> Any:
            values = stage.forward(self.unpack(stage.number), state, _slice(batch, 0), received)[1]
            return measures(stage.executor, values)

        shapes = jax.eval_shape(measured, state, batch, stage.received_shapes)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def _agreed(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        """State as the groups that change it left it, on all devices."""
        new = dict(before)
        for stage in self.stages:
            for path in stage.changes:
                new[path] = _from_group(after[path], self.group == stage.number % self.degree, self.axes)
        return new


_WAYS = ("forward", "backward")


def _idle(way: str) -> Callable:
    """The branch of a group that has nothing to do."""

    def branch(rest: dict, moved: dict, batch: dict, microbatch: Any, slot: Any) -> tuple[dict, Flats]:
        return rest, moved[way]

    return branch


def _slice(batch: Mapping[str, Any], microbatch: Any) -> dict[str, Any]:
    return {name: lax.dynamic_index_in_dim(x, microbatch, keepdims=False) for name, x in batch.items()}


def _from_group(x: Any, mine: Any, axes: tuple[str, ...]) -> Any:
    """An array as the devices that hold it have it, on all."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = _from_group(jax.random.key_data(x), mine, axes)
        return jax.random.wrap_key_data(words, impl=str(jax.random.key_impl(x)))
    whole = x.astype(jnp.int32) if x.dtype == np.bool_ else x
    return lax.psum(jnp.where(mine, whole, jnp.zeros_like(whole)), axes).astype(x.dtype)
