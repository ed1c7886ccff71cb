"""A train step of several pipeline stages: one program over all devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from galvatron_jax.cost.schedules import ScheduleTable, make_table
from galvatron_jax.runtime.clocks import Clock
from galvatron_jax.runtime.engine import Engine
from galvatron_jax.runtime.hlo import check_deadlocks
from galvatron_jax.runtime.optimizer_state import nested
from galvatron_jax.runtime.packing import Flats, Packing
from galvatron_jax.runtime.program import State, StepProgram
from galvatron_jax.runtime.stage import Stage
from galvatron_jax.runtime.stage_optimizer import StageOptimizer, make_stage_optimizer
from galvatron_jax.runtime.stage_storage import Place, StageStorage
from galvatron_jax.runtime.synchronise import Synchroniser
from galvatron_jax.runtime.turns import take_turn
from galvatron_jax.spec.program import sum_dtype


@dataclass(frozen=True)
class PipelineStep(StepProgram):
    """A train step of several stages.

    The state's parameters are one flat array per dtype, `(devices, lines, LINE)`: each device has those of its stages.
    """

    stages: tuple[Stage, ...]
    clock: Clock | None
    """Of the state that several stages share."""

    @cached_property
    def table(self) -> ScheduleTable:
        """Who works on what in each tick."""
        plan = self.plan
        degree = plan.pipeline_degree
        return make_table(
            plan.schedule,
            num_stages=degree,
            num_microbatches=plan.num_microbatches,
            num_chunks=len(self.stages) // degree,
        )

    @cached_property
    def storage(self) -> StageStorage:
        """How parameters are stored."""
        return StageStorage(self.stages, self.plan.pipeline_degree, self.plan.pipeline_axes)

    @cached_property
    def optimizer_program(self) -> StageOptimizer:
        """The optimizer on the stages' parameters."""
        return make_stage_optimizer(self.optimizer, self.traced.functional.parameters, self.storage)

    # ------------------------------------------------------------------------------------------ state

    @property
    def _everywhere(self) -> PartitionSpec:
        """Every device has a row of its own."""
        return PartitionSpec(self.mesh.axis_names)

    def _state_shardings(self, shapes: State) -> State:
        whole, rows = self.sharding(PartitionSpec()), self.sharding(self._everywhere)
        program = self.optimizer_program
        if program.update is None:
            own = program.own_specs(dict(self.mesh.shape))
            leaves = [whole] * len(program.layout.tree.shapes)
            for position, (_, path) in program.layout.tree.mirrored.items():
                leaves[position] = self.sharding(own[path])
            opt_state = program.layout.tree.tree.unflatten(leaves)
        else:
            opt_state = {
                "slots": jax.tree.map(lambda _: rows, shapes["opt_state"]["slots"]),
                "others": jax.tree.map(lambda _: whole, shapes["opt_state"]["others"]),
            }
        return {
            "params": dict.fromkeys(shapes["params"], rows),
            "opt_state": opt_state,
            "model_state": dict.fromkeys(shapes["model_state"], whole),
            "step": whole,
        }

    def _init(self, seed: Any) -> State:
        parameters, model_state = self.traced.functional.init(seed)
        tree = {
            "params": parameters,
            "opt_state": self.optimizer.init(nested(parameters)),
            "model_state": dict(model_state),
            "step": jnp.zeros((), jnp.int32),
        }
        return self._from_tree(tree)

    def _from_tree(self, tree: State) -> State:
        program, storage = self.optimizer_program, self.storage
        params = self._put_in(storage.whole.pack(tree["params"]), storage.stored, optimizer=False)
        opt_state = tree["opt_state"]
        if program.update is not None:
            packed = program.pack(opt_state)
            slots = [
                self._put_in(arrays, packing, optimizer=True)
                for arrays, packing in zip(packed["slots"], program.slots, strict=True)
            ]
            opt_state = {"slots": slots, "others": packed["others"]}
        return {**tree, "params": params, "opt_state": opt_state}

    def _to_tree(self, state: State) -> State:
        program = self.optimizer_program
        opt_state = state["opt_state"]
        if program.update is not None:
            slots = [
                self._take_out(flats, packing, optimizer=True)
                for flats, packing in zip(opt_state["slots"], program.slots, strict=True)
            ]
            opt_state = program.unpack({"slots": slots, "others": opt_state["others"]})
        return {**state, "params": self._parameters(state["params"]), "opt_state": opt_state}

    def _parameters(self, params: Flats) -> dict[str, Any]:
        arrays = self._take_out(params, self.storage.stored, optimizer=False)
        return self.storage.whole.unpack(arrays, list(self.traced.functional.parameters))

    def _take_out(self, flats: Flats, packing: Packing[Place], *, optimizer: bool) -> dict[str, Any]:
        specs = self.storage.specs(optimizer=optimizer)
        held = {key for case in packing.places for _, key in case}

        def local(flats: Flats) -> dict[str, Any]:
            return self.storage.take_out(_row(flats), packing, optimizer=optimizer)

        out = {key: spec for key, spec in specs.items() if key in held}
        return self._map(local, (dict.fromkeys(flats, self._everywhere),), out)(flats)

    def _put_in(self, arrays: Mapping[str, Any], packing: Packing[Place], *, optimizer: bool) -> Flats:
        specs = self.storage.specs(optimizer=optimizer)
        arrays = {
            key: lax.with_sharding_constraint(x, NamedSharding(self.mesh, specs[key])) for key, x in arrays.items()
        }

        def local(arrays: Mapping[str, Any]) -> Flats:
            return _as_row(self.storage.put_in(arrays, packing, optimizer=optimizer))

        out = dict.fromkeys(packing.sizes, self._everywhere)
        return self._map(local, ({key: specs[key] for key in arrays},), out)(arrays)

    def _map(self, local: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    # ------------------------------------------------------------------------------------------ the step

    def _step(self, state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        program, whole, rows = self.optimizer_program, PartitionSpec(), self._everywhere
        params, model_state = state["params"], state["model_state"]
        flats = dict.fromkeys(params, rows)
        inputs = (flats, dict.fromkeys(model_state, whole), {n: s.sharding.spec for n, s in self.batch_shapes.items()})
        found = (dict.fromkeys(model_state, whole), dict.fromkeys(self.metric_names, whole))
        if program.update is None:
            mirrored = dict.fromkeys(self.storage.mirrored.sizes, rows)
            local = self._map(self._gradients, inputs, (mirrored, *found))
            gradients, model_state, metrics = local(params, model_state, batch)
            params, opt_state = self._update_own(gradients, state["opt_state"], params)
        else:
            slots = [dict.fromkeys(packing.sizes, rows) for packing in program.slots]
            others = dict.fromkeys(state["opt_state"]["others"], whole)
            local = self._map(self._local, (*inputs, slots, others), (flats, *found, slots, others))
            params, model_state, metrics, new_slots, new_others = local(
                params, model_state, batch, list(state["opt_state"]["slots"]), state["opt_state"]["others"]
            )
            opt_state = {"slots": new_slots, "others": new_others}
        new = {"params": params, "opt_state": opt_state, "model_state": model_state, "step": state["step"] + 1}
        return new, metrics

    @cached_property
    def _executable(self) -> Any:
        """The compiled step, which cannot deadlock."""
        check_deadlocks(self.compiled.as_text())
        return self.compiled

    def _local(
        self, params: Flats, model_state: dict, batch: dict, slots: list[Flats], others: dict
    ) -> tuple[Flats, dict, dict, list[Flats], dict]:
        """The whole step on one device."""
        gradients, state, metrics = self._gradients(params, model_state, batch)
        new, new_slots, others = self.optimizer_program.update_stored(
            _row(gradients), [_row(slot) for slot in slots], others, _row(params)
        )
        return _as_row(new), state, metrics, [_as_row(slot) for slot in new_slots], others

    def _gradients(self, params: Flats, model_state: dict, batch: dict) -> tuple[Flats, dict, dict]:
        """Synchronised gradients in the optimizer's layout, new model state and metrics."""
        outcome = self.engine(_row(params)).run(model_state, batch)
        scale = 1.0 / outcome.weight
        metrics = {name: x * scale.astype(x.dtype) for name, x in outcome.sums.items()}
        return _as_row(self._synchronised(outcome.gradients, scale)), outcome.state, metrics

    def engine(self, params: Flats) -> Engine:
        """What runs the schedule on local stored parameters."""
        sums = self.storage.accumulated
        return Engine(self.table, self.stages, self.plan.pipeline_axes, params, sums, self._unpack, self.clock)

    def _unpack(self, stage: int, flats: Flats) -> dict[str, Any]:
        """A stage's stored arrays by key; those of layers in a loop row by row."""
        stored, case = self.storage.stored, stage % self.storage.degree
        groups = self.stages[stage].executor.storage.groups
        return {
            group.key: (stored.rows if group.stacked else stored.read)(case, (stage, group.key), flats)
            for group in groups
        }

    def _synchronised(self, sums: Flats, scale: Any) -> Flats:
        """Sums over data axes inside each group of devices, then over the groups that share parameters."""
        storage = self.storage

        def shared(case: int, arrays: tuple[Flats, dict]) -> tuple[Flats, dict]:
            flats, totals = arrays
            new = storage.with_exchanged(case, storage.mirrored.view(case, flats), totals)
            return storage.mirrored.write(case, flats, new), totals

        here, cases = lax.axis_index(storage.axes), range(storage.degree)
        reduced = {case: partial(self._reduced, case, scale) for case in cases}
        flats, parts = take_turn(here, reduced, (sums, storage.nothing_exchanged()))
        if not storage.shared:
            return flats
        dtypes = {reference: sum_dtype(str(x.dtype), self.plan.gradient_sum_dtype) for reference, x in parts.items()}
        totals = lax.psum({reference: x.astype(dtypes[reference]) for reference, x in parts.items()}, storage.axes)
        totals = {reference: x.astype(parts[reference].dtype) for reference, x in totals.items()}
        return take_turn(here, {case: partial(shared, case) for case in cases}, (flats, totals))[0]

    def _reduced(self, case: int, scale: Any, arrays: tuple[Flats, dict]) -> tuple[Flats, dict]:
        """Sums over data axes inside one group of devices, in the place of what is summed; and what it shares."""
        storage, flats = self.storage, arrays[0]
        sums, mirrored = storage.accumulated, storage.mirrored
        for stage in storage.stages[case :: storage.degree]:
            done: set[str] = set()
            for batch in stage.synchronised_batches:
                own = {
                    port: sums.places[case][stage.number, *port].part(batch.rows).read(flats) for port in batch.names
                }
                found = Synchroniser(stage.executor).summed(own, scale)
                # All is read before anything is written: XLA would else keep a copy.
                found, flats = lax.optimization_barrier((found, flats))
                for key, x in found.items():
                    place = stage.number, key
                    again = key in done and batch.rows is None
                    total = x + mirrored.read(case, place, flats) if again else x
                    flats, done = mirrored.write(case, flats, {place: total}, rows=batch.rows), done | {key}
            flats = mirrored.write(case, flats, self._without_gradient(stage, done))
        return flats, storage.exchanged(case, mirrored.view(case, flats))

    def _without_gradient(self, stage: Stage, done: set[str]) -> dict[Place, Any]:
        groups, mesh = stage.executor.storage.groups, stage.executor.layouts.mesh
        return {
            (stage.number, group.key): jnp.zeros(group.local_shape(mesh, optimizer=True), group.dtype)
            for group in groups
            if group.key not in done
        }

    def _update_own(self, gradients: Flats, opt_state: Any, params: Flats) -> tuple[Flats, Any]:
        """The update on the model's own arrays, taken out of the stages and put back."""
        storage, program = self.storage, self.optimizer_program
        arrays = [
            self._take_out(gradients, storage.mirrored, optimizer=True),
            self._take_out(params, storage.stored, optimizer=False),
        ]
        new, opt_state = program.update_own(arrays[0], opt_state, arrays[1])
        return self._put_in(new, storage.stored, optimizer=False), opt_state


def _row(flats: Mapping[str, Any]) -> Flats:
    """A device's own row of flat arrays."""
    return {name: x[0] for name, x in flats.items()}


def _as_row(flats: Mapping[str, Any]) -> Flats:
    return {name: x[None] for name, x in flats.items()}
