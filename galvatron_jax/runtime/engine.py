"""The schedule's table made to run: a scan over its ticks, on local arrays of every device.

In each tick a device does at most one forward and one backward, as its row of the table says: the virtual stages'
programs stand one after another, and each device runs its own (see `turns`), so stages may be as unlike as they please.
Values move on between ticks by two permutes along the pipeline axes; by one where a schedule ends all forwards before
it begins a backward, which are two scans then. Permutes stand outside of the stages' programs: they wait for all
devices, and in a program that only some of them run would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from galvatron_jax.cost.schedules import Phase, ScheduleTable, slots
from galvatron_jax.cost.sizes import LINE
from galvatron_jax.runtime.clocks import Clock
from galvatron_jax.runtime.packing import Flats, Packing
from galvatron_jax.runtime.results import measures, new_state
from galvatron_jax.runtime.stage import Stage
from galvatron_jax.runtime.totals import PackedTotals
from galvatron_jax.runtime.turns import take_turn


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


class _Moved(NamedTuple):
    """What came from other stages at the start of a tick."""

    received: Flats
    cotangents: Flats


_PASSED = {"forward": "received", "backward": "cotangents"}
"""What moves on after each way."""


class _Work(NamedTuple):
    """What a device does in a tick, one way."""

    moved: _Moved
    batch: Mapping[str, Any]
    microbatch: Any
    slot: Any


@dataclass
class Engine:
    """Runs a schedule. Only inside a `shard_map` that is manual over every mesh axis."""

    table: ScheduleTable
    stages: tuple[Stage, ...]
    axes: tuple[str, ...]
    """Mesh axes along which the groups of devices lie."""
    params: Flats
    """Stored parameters."""
    gradients: Packing[tuple[int, int, int]]
    """Where their sums lie, by (stage, run, port)."""
    unpack: Callable[[int, Flats], Mapping[str, Any]]
    """From a virtual stage and stored parameters to the stage's own, by key."""
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

    def kept(self, state: Mapping[str, Any], batch: Mapping[str, Any]) -> Packing[str]:
        """What each stage keeps of a micro-batch from its forward to its backward."""
        return Packing.of([self._kept_shapes(stage, state, batch) for stage in self.stages])

    def _kept_shapes(self, stage: Stage, state: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        if self.table.recomputes:
            # The last stage's input is used in the tick in which it comes.
            return {} if stage.last else jax.eval_shape(stage.inputs_to_keep, state, stage.received_shapes)

        def keep(state: Any, batch: Any, received: Any) -> dict[str, Any]:
            return self._forward(stage, self.unpack(stage.number, self.params), state, _slice(batch, 0), received)[0]

        return jax.eval_shape(keep, state, batch, stage.received_shapes)

    # ------------------------------------------------------------------------------------------ running

    def run(self, state: Mapping[str, Any], batch: Mapping[str, Any]) -> Outcome:
        """All micro-batches.

        Args:
            state: model state by path, whole.
            batch: local leaves of all micro-batches by path; dim 0 is the micro-batch.
        """
        carry, after = self.begin(state, batch)
        for phase in self.table.phases:

            def tick(carry: dict[str, Any], row: Mapping[str, Any], phase: Phase = phase) -> tuple[dict, None]:
                return self._tick(carry, row, batch, phase.ways), None

            carry, _ = lax.scan(tick, carry, self._rows(phase))
        sums, weight = lax.psum((carry["sums"], carry["weight"]), self.axes)
        return Outcome(carry["gradients"], self._agreed(state, carry["state"]) | after, sums, weight)

    def begin(self, state: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ticks hand on to one another, before the first; and the shared state after all, by path."""
        self.ticking, after = self.clock.before_each(state, self.table.num_microbatches) if self.clock else ({}, {})
        self.kept_packing = self.kept(state, batch)
        self.strides = self._strides()
        sums, weight = self._zero_measures(state, batch)
        carry = {
            "pool": {name: jnp.zeros((lines, LINE), name) for name, lines in self._pool_sizes().items()},
            "gradients": self.gradients.zeros(),
            "state": dict(state),
            "sums": sums,
            "weight": weight,
            "received": self.received.zeros(),
            "cotangents": self.handed_back.zeros(),
        }
        return carry, after

    def turn(
        self, number: int, way: str, carry: Mapping[str, Any], batch: Mapping[str, Any], microbatch: Any, slot: Any
    ) -> dict[str, Any]:
        """One virtual stage's program by itself, as a tick runs it: what is to be timed.

        Args:
            number: of the stage.
            way: `forward` or `backward`.
            carry: as `begin` gave it.
            batch: as for `run`.
            microbatch: a traced number.
            slot: where its input lies, a traced number.
        """
        moved = _Moved(carry["received"], carry["cotangents"])
        rest = {name: x for name, x in carry.items() if name not in ("received", "cotangents")}
        program = self._program(self.stages[number], way, _Work(moved, batch, microbatch, slot))
        rest, found = program((rest, carry[_PASSED[way]]))
        return {**carry, **rest, _PASSED[way]: found}

    def _rows(self, phase: Phase) -> dict[str, Any]:
        columns = [f"{way}_{what}" for way in phase.ways for what in ("stage", "microbatch", "slot")]
        return {name: jnp.asarray(getattr(self.table, name)[phase.start : phase.stop]) for name in columns}

    def _strides(self) -> list[dict[str, int]]:
        """Per virtual stage, lines of a slot: chunks of one group share its slots."""
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

    def _tick(
        self, carry: dict[str, Any], row: Mapping[str, Any], batch: Mapping[str, Any], ways: Sequence[str]
    ) -> dict[str, Any]:
        """One row of the table: a forward, a backward, or both; and values moved on."""
        mine = {name: lax.dynamic_index_in_dim(x, self.group, keepdims=False) for name, x in row.items()}
        moved = _Moved(carry["received"], carry["cotangents"])
        rest = {name: x for name, x in carry.items() if name not in ("received", "cotangents")}
        passed = moved._asdict()
        for way in ways:
            work = _Work(moved, batch, mine[f"{way}_microbatch"], mine[f"{way}_slot"])
            programs = {
                stage.number: self._program(stage, way, work) for stage in self.stages if self.works(stage, way)
            }
            rest, passed[_PASSED[way]] = take_turn(mine[f"{way}_stage"], programs, (rest, passed[_PASSED[way]]))
        for way in ways:
            passed[_PASSED[way]] = self._shift(passed[_PASSED[way]], 1 if way == "forward" else -1)
        return {**rest, **passed}

    def works(self, stage: Stage, way: str) -> bool:
        """Whether a stage has a program: where the schedule recomputes, the last forward is part of a backward."""
        return way == "backward" or not (stage.last and self.table.recomputes)

    def _program(self, stage: Stage, way: str, work: _Work) -> Callable[[tuple[dict, Flats]], tuple[dict, Flats]]:
        run = self._run_forward if way == "forward" else self._run_backward

        def program(arrays: tuple[dict, Flats]) -> tuple[dict, Flats]:
            rest, _ = arrays
            # Tied to what changes, so that XLA does not gather ZeRO-3's parameters ahead of the loop, on all devices;
            # nor, compiling for CPUs, read a slot for a stage whose turn it is not.
            params, pool, weight = lax.optimization_barrier((self.params, rest["pool"], rest["weight"]))
            return run(stage, self.unpack(stage.number, params), {**rest, "pool": pool, "weight": weight}, work)

        return program

    def _shift(self, flats: Flats, way: int) -> Flats:
        """What the group before (or, for -1, behind) made."""
        degree = self.degree
        pairs = [(i, (i + way) % degree) for i in range(degree)]
        if self.table.num_chunks == 1:
            pairs = [(i, j) for i, j in pairs if j == i + way]
        return {name: lax.ppermute(x, self.axes, pairs) for name, x in flats.items()}

    # ------------------------------------------------------------------------------------------ branches

    def _forward(
        self,
        stage: Stage,
        params: Mapping[str, Any],
        state: Mapping[str, Any],
        batch: Mapping[str, Any],
        received: Mapping[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What a stage that stashes keeps, what it sends, and its results by sink."""
        sent, values, tapes = stage.forward(params, state, batch, received)
        seed = self._seed(stage, values) if stage.last else None
        kept, self.names[stage.number] = stage.tapes_to_keep(tapes, seed)
        return kept, sent, values

    def _run_forward(
        self, stage: Stage, params: Mapping[str, Any], rest: dict[str, Any], work: _Work
    ) -> tuple[dict[str, Any], Flats]:
        number, state = stage.number, self._state(rest, work.microbatch)
        received = self.received.unpack(number, work.moved.received)
        leaves = _slice(work.batch, work.microbatch)
        if self.table.recomputes:
            kept = stage.inputs_to_keep(state, received)
            sent, values, _ = stage.forward(params, state, leaves, received)
        else:
            kept, sent, values = self._forward(stage, params, state, leaves, received)
        pool = self.kept_packing.write_slot(number, rest["pool"], kept, slot=work.slot, strides=self.strides[number])
        passed = work.moved.received if stage.last else self.received.pack(number + 1, sent)
        return self._with_results(stage, {**rest, "pool": pool}, values), passed

    def _run_backward(
        self, stage: Stage, params: Mapping[str, Any], rest: dict[str, Any], work: _Work
    ) -> tuple[dict[str, Any], Flats]:
        number, again = stage.number, self.table.recomputes
        state, seed = self._state(rest, work.microbatch), None
        leaves = _slice(work.batch, work.microbatch)
        if stage.last and again:
            # Its forward is here alone.
            received = self.received.unpack(number, work.moved.received)
            _, values, tapes = stage.forward(params, state, leaves, received)
            seed, rest = self._seed(stage, values), self._with_results(stage, rest, values)
        else:
            kept = self.kept_packing.read_slot(number, rest["pool"], slot=work.slot, strides=self.strides[number])
            if again:
                tapes = stage.again(params, *stage.inputs_kept(state, kept, leaves))
            else:
                tapes, seed = stage.tapes_kept(kept, self.names[number], params, state, leaves)
        totals = PackedTotals(self.gradients, rest["gradients"], case=number % self.degree, stage=number)
        handed = stage.backward(tapes, self._cotangents(stage, work.moved.cotangents, seed), totals)
        return {**rest, "gradients": totals.flats}, self.handed_back.pack(number, handed)

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
            values = stage.forward(self.unpack(stage.number, self.params), state, _slice(batch, 0), received)[1]
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


def _slice(batch: Mapping[str, Any], microbatch: Any) -> dict[str, Any]:
    return {name: lax.dynamic_index_in_dim(x, microbatch, keepdims=False) for name, x in batch.items()}


def _from_group(x: Any, mine: Any, axes: tuple[str, ...]) -> Any:
    """An array as the devices that hold it have it, on all."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = _from_group(jax.random.key_data(x), mine, axes)
        return jax.random.wrap_key_data(words, impl=str(jax.random.key_impl(x)))
    whole = x.astype(jnp.int32) if x.dtype == np.bool_ else x
    return lax.psum(jnp.where(mine, whole, jnp.zeros_like(whole)), axes).astype(x.dtype)
