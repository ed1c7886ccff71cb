"""`build_step`: a plan made to run, as one jitted train step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from galvatron_jax.errors import InputError, PlanMismatchError
from galvatron_jax.runtime.birth import birth_specs
from galvatron_jax.runtime.emit import run_steps
from galvatron_jax.runtime.execution import Executor, Gradients, spec_of
from galvatron_jax.runtime.optimizer import OptimizerProgram, make_optimizer
from galvatron_jax.runtime.runs import Run, Way, make_runs, mesh_sizes
from galvatron_jax.runtime.storage import Group, Storage, make_storage
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.strategy import Remat
from galvatron_jax.trace.functional import named_leaves
from galvatron_jax.trace.model import Traced

State = dict[str, Any]
"""`params` (stored arrays by key), `opt_state` (optax's), `model_state` (by path), `step` (int32)."""


def build_step(
    traced: Traced,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    *,
    devices: Sequence[Any] | None = None,
) -> Step:
    """Makes a plan run.

    Args:
        traced: the model traced at the plan's micro-batch.
        plan: what to run; one stage.
        optimizer: any optax optimizer.
        devices: the mesh's devices, slowest link first; all of JAX's by default.

    Raises:
        PlanMismatchError: when devices, layers or the micro-batch differ from the plan's.
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
    sizes = mesh_sizes(plan)
    names = tuple(sizes) or ("device",)
    shape = tuple(sizes.values()) or (1,)
    mesh = Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
    runs, layouts = make_runs(traced, plan)
    storage = make_storage(traced, runs)
    strategies = [plan.strategies[run.start] for run in runs]
    repeats = [strategy.remat is not Remat.NONE or strategy.zero == 3 for strategy in strategies]
    executor = Executor(traced, runs, layouts, storage, repeats)
    return Step(traced, plan, optimizer, mesh, executor)


@dataclass(frozen=True)
class Step:
    """A train step: `state, metrics = step(state, batch)`."""

    traced: Traced
    plan: Plan
    optimizer: optax.GradientTransformation
    mesh: Mesh
    executor: Executor

    # ------------------------------------------------------------------------------------------ state

    @property
    def storage(self) -> Storage:
        """How parameters are stored."""
        return self.executor.storage

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """A sharding over the plan's mesh."""
        return NamedSharding(self.mesh, spec)

    @cached_property
    def optimizer_program(self) -> OptimizerProgram:
        """The optimizer on stored arrays."""
        return make_optimizer(self.optimizer, self.traced.functional.parameters, self.storage)

    @cached_property
    def state_shapes(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(self._init, 0)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self._state_shardings(shapes)
        )

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
        born = birth_specs(self.storage, self.traced.functional.parameters, mesh=self.executor.layouts.mesh)
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

    def init(self, seed: int | None = None) -> State:
        """The state before the first step, every array born sharded."""
        shardings = jax.tree.map(lambda s: s.sharding, self.state_shapes)
        return jax.jit(partial(self._init, seed), out_shardings=shardings)()

    def to_tree(self, state: State) -> State:
        """The state with the model's own leaves by path, whatever the plan."""
        return self.optimizer_program.to_tree(self, state)

    def from_tree(self, tree: State) -> State:
        """A state of this plan from what `to_tree` gave under any plan."""
        shardings = jax.tree.map(lambda s: s.sharding, self.state_shapes)
        return jax.jit(partial(self.optimizer_program.from_tree, self), out_shardings=shardings)(tree)

    def parameters(self, state: State) -> dict[str, Any]:
        """The model's parameters by path."""
        return self.storage.unpack(state["params"], list(self.traced.functional.parameters))

    # ------------------------------------------------------------------------------------------ the step

    def __call__(self, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        """Runs one optimizer step. The state given is donated.

        Args:
            state: as the last call gave it.
            batch: pytree of arrays with the global batch as dim 0.
        """
        if self.mesh.devices.flat[0].platform == "cpu":
            # Virtual devices share one pool of threads: two steps in flight can block each other's collectives.
            jax.block_until_ready(state)
        return self.jitted(state, self.place(batch))

    def place(self, batch: Any) -> dict[str, Any]:
        """A global batch as micro-batches on the devices: per leaf `(microbatches, examples, ...)`, sharded."""
        leaves = named_leaves(batch)
        if set(leaves) != set(self.traced.batch_names):
            raise InputError(
                f"the batch has leaves {sorted(leaves)}, the step was built for {self.traced.batch_names}."
            )
        placed = {}
        for name in self.traced.batch_names:
            shape = self.batch_shapes[name]
            leaf = leaves[name]
            if math.prod(np.shape(leaf)) != math.prod(shape.shape):
                raise InputError(
                    f"batch leaf {name!r} has shape {np.shape(leaf)}; the plan wants {self.plan.global_batch} examples "
                    f"of {shape.shape[2:]}."
                )
            placed[name] = self._put(leaf, shape)
        return placed

    def _put(self, leaf: Any, shape: jax.ShapeDtypeStruct) -> Any:
        if isinstance(leaf, jax.Array):
            if leaf.shape == shape.shape and leaf.sharding == shape.sharding:
                return leaf
            return jax.device_put(jnp.reshape(leaf, shape.shape).astype(shape.dtype), shape.sharding)
        array = np.asarray(leaf, dtype=shape.dtype).reshape(shape.shape)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: array[index])

    @cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a placed batch."""
        shapes = {}
        for name in self.traced.batch_names:
            reference = f"batch:{name}"
            aval = self.traced.avals[reference]
            spec = PartitionSpec(None, *self.executor.layouts.specs[reference])
            shapes[name] = jax.ShapeDtypeStruct(
                (self.plan.num_microbatches, *aval.shape), aval.dtype, sharding=self.sharding(spec)
            )
        return shapes

    @cached_property
    def jitted(self) -> Any:
        """The jitted step on a placed batch."""
        shardings = jax.tree.map(lambda s: s.sharding, self.state_shapes)
        return jax.jit(self._step, donate_argnums=0, out_shardings=(shardings, None))

    @cached_property
    def lowered(self) -> Any:
        """The lowered step: collectives as planned, before any combiner."""
        return self.jitted.lower(self.state_shapes, self.batch_shapes)

    @cached_property
    def compiled(self) -> Any:
        """The compiled step."""
        return self.lowered.compile()

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
        metrics = dict.fromkeys(self._metric_names(), whole)
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

    def _metric_names(self) -> list[str]:
        names = [sink for sink, _ in self.traced.spec.results if sink.split(":")[0] in ("loss", "aux")]
        return [name.removeprefix("aux:") for name in names]

    # ------------------------------------------------------------------------------------------ on one device

    def _local(self, params: dict, model_state: dict, batch: dict) -> tuple[dict, dict, dict]:
        """All micro-batches on local arrays, then one synchronisation."""

        def one(state: dict, leaves: dict, *, params: dict = params) -> tuple[dict, dict, Any, Gradients]:
            result = self.executor.microbatch(params, state, leaves)
            return self._new_state(state, result.values), *self._measures(result.values), result.gradients

        if self.plan.num_microbatches == 1:
            leaves = {name: x[0] for name, x in batch.items()}
            state, sums, weight, gradients = one(model_state, leaves)
        else:
            state, sums, weight, gradients = self._accumulate(one, params, model_state, batch)
        scale = 1.0 / weight
        metrics = {name: x * scale.astype(x.dtype) for name, x in sums.items()}
        return self._synchronise(gradients, scale), state, metrics

    def _accumulate(self, one: Any, params: dict, model_state: dict, batch: dict) -> tuple[dict, dict, Any, Gradients]:
        first = {name: x[0] for name, x in batch.items()}
        shapes = jax.eval_shape(one, model_state, first)[1:]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def body(carry: tuple, leaves: dict) -> tuple[tuple, None]:
            state, totals = carry
            # Tied to what changes, so that XLA does not gather ZeRO-3's parameters once, ahead of the loop.
            held, leaves = lax.optimization_barrier((params, leaves))
            state, *found = one(state, leaves, params=held)
            return (state, jax.tree.map(jnp.add, totals, tuple(found))), None

        (state, totals), _ = lax.scan(body, (model_state, zeros), batch)
        return state, *totals

    def _measures(self, values: Mapping[str, Any]) -> tuple[dict, Any]:
        """Metrics times the micro-batch's weight, and the weight."""
        weight = jnp.asarray(values.get("weight", 1.0), jnp.float32)
        sums = {}
        for sink, x in values.items():
            if sink.split(":")[0] not in ("loss", "aux"):
                continue
            reference = dict(self.traced.spec.results)[sink]
            spec = self.executor.layouts.specs.get(reference, ((),) * jnp.ndim(x))
            x = self.executor.move(x, self._shape(reference, x), spec, ((),) * jnp.ndim(x))
            x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
            sums[sink.removeprefix("aux:")] = x * weight.astype(x.dtype)
        return sums, weight

    def _shape(self, reference: str, x: Any) -> tuple[int, ...]:
        return self.executor.layouts.shapes.get(reference, jnp.shape(x))

    def _new_state(self, state: dict, values: Mapping[str, Any]) -> dict:
        new = dict(state)
        slices: dict[str, dict[int, Any]] = {}
        for sink, x in values.items():
            if not sink.startswith("state:"):
                continue
            path = sink.removeprefix("state:")
            if path in new:
                new[path] = x
            else:
                name, _, index = path.rpartition("[")
                slices.setdefault(name, {})[int(index[:-1])] = x
        for name, parts in slices.items():
            new[name] = jnp.stack([parts[i] for i in range(len(parts))])
        return {path: new[path].astype(state[path].dtype) if _plain(new[path]) else new[path] for path in state}

    def _synchronise(self, gradients: Gradients, scale: Any) -> dict[str, Any]:
        """Sums over data axes and micro-batches, in the layout of the optimizer, by key."""
        sizes = self.executor.layouts.mesh
        found: dict[str, Any] = {}
        for (number, port), x in gradients.items():
            run = self.executor.runs[number]
            key = self.storage.owned.get((number, port))
            x = self._reduced(run, port, x * scale.astype(x.dtype), stacked=run.inputs[port].way is Way.STACKED)
            if key is None:
                key, x = self._tied(number, run, port, x)
            group = self.storage.group(key)
            x = jnp.reshape(x, group.local_shape(sizes, optimizer=True))
            found[key] = found[key] + x if key in found else x
        for group in self.storage.groups:
            if group.key not in found:
                found[group.key] = jnp.zeros(group.local_shape(sizes, optimizer=True), group.dtype)
        return {g.key: found[g.key] for g in self.storage.groups}

    def _reduced(self, run: Run, port: int, x: Any, *, stacked: bool) -> Any:
        """One gradient from its accumulated layout to the optimizer's."""
        local = run.local
        value = local.static.kind.inputs[port].value
        entry = next(e for e in local.plan.parameters if e.port == port)
        whole = [math.prod(local.sizes[f] for f in dim) for dim in local.static.program.program.values[value].dims]
        axes = self.executor.layouts.mesh
        shape = tuple(
            n // math.prod(axes[a] for factor in dim for a in factor)
            for n, dim in zip(whole, entry.optimizer, strict=True)
        )
        return run_steps(x, local.sync[port], shape, lead=1 if stacked and run.length > 1 else 0)

    def _tied(self, number: int, run: Run, port: int, x: Any) -> tuple[str, Any]:
        """The gradient of a parameter that an earlier layer owns, in that layer's layout."""
        group: Group = self.storage.group(self.storage.tied[number, port])
        x = self.executor.move(x, group.shape, spec_of(run, port, optimizer=True), group.boundary(optimizer=True))
        if group.stacked:
            reference = run.inputs[port].references[0]
            rows = [x if r == reference else jnp.zeros_like(x) for r in group.references]
            x = jnp.stack(rows)
        return group.key, x

    # ------------------------------------------------------------------------------------------ after the update

    @property
    def publishes(self) -> bool:
        """Whether updated parameters must be gathered (ZeRO 1 and 2)."""
        return any(g.spec() != g.spec(optimizer=True) for g in self.storage.groups)

    def publish(self, params: dict[str, Any]) -> dict[str, Any]:
        """Updated parameters from the optimizer's layout back to storage."""
        groups = self.storage.groups
        gathered = jax.shard_map(
            self._publish,
            mesh=self.mesh,
            in_specs=({g.key: g.spec(optimizer=True) for g in groups},),
            out_specs={g.key: g.spec() for g in groups},
            check_vma=False,
        )
        return gathered(params)

    def _publish(self, params: dict[str, Any]) -> dict[str, Any]:
        sizes, found = self.executor.layouts.mesh, dict(params)
        for (number, port), key in self.storage.owned.items():
            run, group = self.executor.runs[number], self.storage.group(key)
            steps = run.local.publish[port]
            if not steps:
                continue
            value = run.local.static.kind.inputs[port].value
            shape = self.executor.program(run).shape(value, run.local.inputs[port])
            x = jnp.reshape(
                params[key],
                params[key].shape[:1] + self._collapsed(run, port) if group.stacked else self._collapsed(run, port),
            )
            x = run_steps(x, steps, shape, lead=1 if group.stacked else 0)
            found[key] = jnp.reshape(x, group.local_shape(sizes))
        return found

    def _collapsed(self, run: Run, port: int) -> tuple[int, ...]:
        """Local shape of the optimizer's layout, dim by dim."""
        entry = next(e for e in run.local.plan.parameters if e.port == port)
        value = run.local.static.kind.inputs[port].value
        whole = [math.prod(run.local.sizes[f] for f in d) for d in run.local.static.program.program.values[value].dims]
        axes = self.executor.layouts.mesh
        return tuple(
            n // math.prod(axes[a] for factor in dim for a in factor)
            for n, dim in zip(whole, entry.optimizer, strict=True)
        )


def _plain(x: Any) -> bool:
    return not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
