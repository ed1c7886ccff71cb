"""`build_step`: a plan made to run, as one jitted train step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from galvatron_jax.errors import PlanMismatchError
from galvatron_jax.runtime.annotate import AnnotateExecutor, accumulate
from galvatron_jax.runtime.birth import birth_specs
from galvatron_jax.runtime.execution import Executor, make_executor, orders_dims
from galvatron_jax.runtime.optimizer import OptimizerProgram, make_optimizer
from galvatron_jax.runtime.pipeline import PipelineStep
from galvatron_jax.runtime.program import State, StepProgram
from galvatron_jax.runtime.results import measures, new_state
from galvatron_jax.runtime.runs import make_runs
from galvatron_jax.runtime.stage import make_stages
from galvatron_jax.runtime.storage import Storage
from galvatron_jax.runtime.synchronise import Synchroniser
from galvatron_jax.runtime.totals import Gradients
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.plan_checks import gradient_sum_faults
from galvatron_jax.trace.model import Traced


def build_step(
    traced: Traced,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    *,
    devices: Sequence[Any] | None = None,
) -> StepProgram:
    """Makes a plan run.

    Args:
        traced: the model traced at the plan's micro-batch.
        plan: what to run.
        optimizer: any optax optimizer.
        devices: the mesh's devices, slowest link first; all of JAX's by default.

    Raises:
        PlanMismatchError: when devices, layers or the micro-batch differ from the plan's, or gradients cannot be
            summed as it says.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) != plan.num_devices:
        raise PlanMismatchError(f"the plan is for {plan.num_devices} devices, {len(devices)} are given.")
    if traced.spec.microbatch * plan.num_microbatches != plan.global_batch:
        raise PlanMismatchError(
            f"the model was traced at {traced.spec.microbatch} examples; the plan has {plan.num_microbatches} "
            f"micro-batches of {plan.global_batch // plan.num_microbatches}."
        )
    if len(plan.strategies) != len(traced.spec.layers):
        raise PlanMismatchError(
            f"the plan has strategies for {len(plan.strategies)} layers, the model has {len(traced.spec.layers)}."
        )
    for fault in gradient_sum_faults(plan.gradient_sum_dtype, traced.spec, executor=plan.executor):
        raise PlanMismatchError(fault)
    names = tuple(axis.name for axis in plan.mesh) or ("device",)
    shape = tuple(axis.size for axis in plan.mesh) or (1,)
    mesh = Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
    stages, layouts = make_runs(traced, plan)
    if plan.executor == "annotate" and len(stages) > 1:
        raise PlanMismatchError(
            f"executor: `annotate` runs plans of one stage, this one has {len(stages)}; use the executor `local`."
        )
    ordered = orders_dims(devices[0])
    executors = [make_executor(traced, plan, runs, layouts, ordered=ordered) for runs in stages]
    if plan.executor == "annotate":
        local = executors[0]
        remats = tuple(strategy.remat for strategy in plan.strategies)
        whole = AnnotateExecutor(
            traced, local.runs, layouts, local.storage, local.repeats, ordered=False, mesh=mesh, remats=remats
        )
        return AnnotateStep(traced, plan, optimizer, mesh, layouts, whole)
    if len(executors) == 1:
        return Step(traced, plan, optimizer, mesh, layouts, executors[0])
    return PipelineStep(traced, plan, optimizer, mesh, layouts, *make_stages(executors))


@dataclass(frozen=True)
class Step(StepProgram):
    """A train step of one stage."""

    executor: Executor

    # ------------------------------------------------------------------------------------------ state

    @property
    def storage(self) -> Storage:
        """How parameters are stored."""
        return self.executor.storage

    @cached_property
    def optimizer_program(self) -> OptimizerProgram:
        """The optimizer on stored arrays."""
        return make_optimizer(self.optimizer, self.traced.functional.parameters, self.storage)

    def _state_shardings(self, shapes: State) -> State:
        stored = {g.key: self.sharding(g.spec()) for g in self.storage.groups}
        mirrored = {g.key: self.sharding(g.spec(optimizer=True)) for g in self.storage.groups}
        whole = self.sharding(PartitionSpec())
        return {
            "params": stored,
            "opt_state": self.optimizer_program.shardings(shapes["opt_state"], mirrored, whole),
            "model_state": dict.fromkeys(shapes["model_state"], whole),
            "step": whole,
        }

    def _init(self, seed: Any) -> State:
        parameters, model_state = self.traced.functional.init(seed)
        born = birth_specs(self.storage, self.traced.functional.parameters, mesh=self.layouts.mesh)
        parameters |= {
            path: lax.with_sharding_constraint(parameters[path], self.sharding(spec)) for path, spec in born.items()
        }
        params = self.storage.pack(parameters)
        return {
            "params": params,
            "opt_state": self.optimizer_program.init(params),
            "model_state": dict(model_state),
            "step": jnp.zeros((), jnp.int32),
        }

    def _to_tree(self, state: State) -> State:
        return self.optimizer_program.to_tree(self, state)

    def _from_tree(self, tree: State) -> State:
        return self.optimizer_program.from_tree(self, tree)

    def _parameters(self, params: dict[str, Any]) -> dict[str, Any]:
        return self.storage.unpack(params, list(self.traced.functional.parameters))

    # ------------------------------------------------------------------------------------------ the step

    def _step(self, state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        gradients, model_state, metrics = self.gradients(state["params"], state["model_state"], batch)
        params, opt_state = self.optimizer_program.update(self, gradients, state["opt_state"], state["params"])
        new = {"params": params, "opt_state": opt_state, "model_state": model_state, "step": state["step"] + 1}
        return new, metrics

    def gradients(
        self, params: Mapping[str, Any], model_state: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Synchronised gradients in the optimizer's layout, the new model state, and metrics."""
        whole = PartitionSpec()
        groups = self.storage.groups
        metrics = dict.fromkeys(self.metric_names, whole)
        local = jax.shard_map(
            self._local,
            mesh=self.mesh,
            in_specs=(
                {g.key: g.spec() for g in groups},
                dict.fromkeys(model_state, whole),
                {name: s.sharding.spec for name, s in self.batch_shapes.items()},
            ),
            out_specs=(
                {g.key: g.spec(optimizer=True) for g in groups},
                dict.fromkeys(model_state, whole),
                metrics,
            ),
            check_vma=False,
        )
        return local(dict(params), dict(model_state), dict(batch))

    # ------------------------------------------------------------------------------------------ on one device

    def _local(self, params: dict, model_state: dict, batch: dict) -> tuple[dict, dict, dict]:
        """All micro-batches on local arrays, then one synchronisation."""

        def one(
            state: dict, leaves: dict, totals: Gradients | None = None, *, params: dict = params
        ) -> tuple[dict, dict, Any, Gradients]:
            result = self.executor.microbatch(params, state, leaves, totals)
            return new_state(state, result.values), *measures(self.executor, result.values), result.gradients

        if self.plan.num_microbatches == 1:
            leaves = {name: x[0] for name, x in batch.items()}
            state, sums, weight, gradients = one(model_state, leaves)
        else:
            state, sums, weight, gradients = self._accumulate(one, params, model_state, batch)
        scale = 1.0 / weight
        metrics = {name: x * scale.astype(x.dtype) for name, x in sums.items()}
        return Synchroniser(self.executor).gradients(gradients, scale), state, metrics

    def _accumulate(self, one: Any, params: dict, model_state: dict, batch: dict) -> tuple[dict, dict, Any, Gradients]:
        first = {name: x[0] for name, x in batch.items()}
        shapes = jax.eval_shape(one, model_state, first)[1:]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def body(carry: tuple, leaves: dict) -> tuple[tuple, None]:
            state, totals = carry
            # Tied to what changes, so that XLA does not gather ZeRO-3's parameters once, ahead of the loop.
            held, leaves = lax.optimization_barrier((params, leaves))
            *before, gradients = totals
            state, *found, gradients = one(state, leaves, gradients, params=held)
            return (state, (*jax.tree.map(jnp.add, before, found), gradients)), None

        (state, totals), _ = lax.scan(body, (model_state, zeros), batch)
        return state, *totals

    # ------------------------------------------------------------------------------------------ after the update

    @property
    def publishes(self) -> bool:
        """Whether updated parameters must be gathered (ZeRO 1 and 2)."""
        return any(g.spec() != g.spec(optimizer=True) for g in self.storage.groups)

    def publish(self, params: dict[str, Any]) -> dict[str, Any]:
        """Updated parameters from the optimizer's layout back to storage."""
        groups = self.storage.groups
        gathered = jax.shard_map(
            Synchroniser(self.executor).publish,
            mesh=self.mesh,
            in_specs=({g.key: g.spec(optimizer=True) for g in groups},),
            out_specs={g.key: g.spec() for g in groups},
            check_vma=False,
        )
        return gathered(params)


@dataclass(frozen=True)
class AnnotateStep(Step):
    """A train step of one stage that XLA partitions, by the plan's layouts as constraints."""

    executor: AnnotateExecutor

    def gradients(
        self, params: Mapping[str, Any], model_state: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Gradients in the optimizer's layout, the new model state, and metrics."""

        def one(params: dict, state: dict, leaves: dict) -> tuple[dict, dict, Any, Gradients]:
            result = self.executor.microbatch(params, state, leaves)
            gradients = self.executor.constrained(result.gradients)
            return new_state(state, result.values), *measures(self.executor, result.values), gradients

        state, sums, weight, gradients = accumulate(one, dict(params), dict(model_state), dict(batch))
        scale = 1.0 / weight
        metrics = {name: x * scale.astype(x.dtype) for name, x in sums.items()}
        return self.executor.stored_gradients(gradients, scale), state, metrics

    def publish(self, params: dict[str, Any]) -> dict[str, Any]:
        """Updated parameters from the optimizer's layout back to storage."""
        specs = {g.key: self.sharding(g.spec()) for g in self.storage.groups}
        return lax.with_sharding_constraint(params, specs)
