"""Equation-by-equation check of a planned layer against the unsharded one: names the first operation that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from galvatron_jax import _compat
from galvatron_jax.partition.layers import LocalPlan, plan_local
from galvatron_jax.partition.layout import NOWHERE, PENDING, Frame, Layout, convert
from galvatron_jax.runtime.emit import Evaluator, LayerProgram, run_steps
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.trace.flat import FlatProgram
from galvatron_jax.trace.model import Traced


@dataclass(frozen=True)
class Check:
    """One operation's result on the devices against the unsharded one."""

    phase: str
    """`forward` or `backward`."""
    operation: int
    primitive: str
    value: int
    layout: Layout
    error: float
    """Largest difference over the largest magnitude."""


def self_check(
    traced: Traced, kind: int, strategy: LayerStrategy, *, mesh: Mapping[str, int], seed: int = 0
) -> list[Check]:
    """Runs one layer kind on random inputs under a strategy and compares every floating result.

    Args:
        traced: the model.
        kind: index into `ModelSpec.kinds`.
        strategy: how to run it.
        mesh: axes with sizes; their product is the number of devices used.
        seed: of the inputs.

    Returns:
        One entry an operation, in order of execution; an error above 1e-4 in float32 is a fault.
    """
    size = traced.spec.microbatch
    local = plan_local(traced.spec.kinds[kind], strategy, mesh=mesh, microbatch=size, model_microbatch=size)
    flat = traced.programs[kind].flat
    reference = _reference(flat, _random_inputs(flat, seed))
    devices = np.array(jax.devices()[: int(np.prod(list(mesh.values())))]).reshape(tuple(mesh.values()))
    device_mesh = Mesh(devices, tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))
    checks: list[tuple[str, int, int, Layout]] = []

    def run(values: Mapping[int, Any]) -> Any:
        return lax.pmax(jnp.stack(_errors(local, flat, values, checks)), tuple(mesh))

    replicated = jax.shard_map(
        run, mesh=device_mesh, in_specs=(PartitionSpec(),), out_specs=PartitionSpec(), check_vma=False
    )
    errors = np.asarray(jax.jit(replicated)(reference))
    return [
        Check(phase, op, flat.operations[op].primitive.name, value, layout, float(error))
        for (phase, op, value, layout), error in zip(checks, errors, strict=True)
    ]


def _random_inputs(flat: FlatProgram, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    inputs = []
    for value in flat.inputs:
        aval = flat.avals[value]
        if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
            inputs.append(jax.random.key(seed))
        elif aval.is_float:
            inputs.append(jnp.asarray(rng.normal(size=aval.shape), aval.dtype))
        else:
            inputs.append(jnp.asarray(rng.integers(0, 2, size=aval.shape), aval.dtype))
    return inputs


def _reference(flat: FlatProgram, inputs: Sequence[Any]) -> dict[int, Any]:
    env: dict[int, Any] = dict(flat.constants)
    env.update(zip(flat.inputs, inputs, strict=True))
    for op in flat.operations:
        env.update(
            zip(op.results, _compat.bind_equation(op.primitive, op.params, [env[v] for v in op.operands]), strict=True)
        )
    return {v: x for v, x in env.items() if v not in flat.constants}


def _errors(
    local: LocalPlan, flat: FlatProgram, values: Mapping[int, Any], checks: list[tuple[str, int, int, Layout]]
) -> list[Any]:
    """Errors of both phases, each phase from right inputs."""
    checks.clear()
    program, kind, errors = LayerProgram(local, flat), local.static.kind, []

    def watcher(evaluator: Evaluator, phase: str) -> Any:
        def watch(operation: int, version: tuple[int, int], x: Any) -> None:
            value = version[0]
            aval = flat.avals[value]
            if not aval.is_float or 0 in aval.shape:
                return
            layout = local.layout_of(phase, version)
            whole = _whole(local, value, x, layout, aval.shape)
            scale = jnp.max(jnp.abs(values[value])) + 1e-6
            errors.append((jnp.max(jnp.abs(whole - values[value])) / scale).astype(jnp.float32))
            checks.append((phase, operation, value, layout))

        return watch

    for phase in ("forward", "backward"):
        evaluator = Evaluator(local, flat)
        evaluator.watch = watcher(evaluator, phase)
        for port, layout in zip(kind.inputs, local.inputs, strict=True):
            evaluator.env[port.value, 0] = _shard(local, program, port.value, values[port.value], layout)
        if phase == "backward":
            for residual in local.residuals:
                x = _shard(local, program, residual.value, values[residual.value], residual.layout, residual.lazy)
                evaluator.env[residual.value, residual.backward_version] = x
            for port, layout in zip(kind.outputs, local.cotangents, strict=True):
                if port.cotangent is not None:
                    evaluator.env[port.cotangent, 0] = _shard(
                        local, program, port.cotangent, values[port.cotangent], layout
                    )
        evaluator.run(getattr(local, phase))
    return errors


def _frame(local: LocalPlan, value: int, lazy: frozenset[int] = frozenset()) -> Frame:
    program = local.static.program
    dims = program.dim_of[value]
    sizes = tuple(1 if dims[p] in lazy else local.sizes[f] for p, f in enumerate(program.positions[value]))
    return Frame(sizes, program.ascending[value])


def _shard(
    local: LocalPlan, program: LayerProgram, value: int, x: Any, layout: Layout, lazy: frozenset[int] = frozenset()
) -> Any:
    """This device's shard of a whole value; where it is pending, the first device's summand is all of it."""
    for dim in sorted(lazy):
        x = lax.slice_in_dim(x, 0, 1, axis=dim)
    axes = local.axes.axes
    pending = tuple(name for axis, place in zip(axes, layout, strict=True) if place == PENDING for name in axis.names)
    placed = tuple(NOWHERE if place == PENDING else place for place in layout)
    steps = convert(axes, _frame(local, value, lazy), (NOWHERE,) * len(axes), placed)
    shape = list(program.shape(value, layout))
    for dim in lazy:
        shape[dim] = 1
    shard = run_steps(x, steps, tuple(shape))
    return jnp.where(lax.axis_index(pending) == 0, shard, jnp.zeros_like(shard)) if pending else shard


def _whole(local: LocalPlan, value: int, x: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """The whole value from its shards."""
    dims = local.static.program.dim_of[value]
    lazy = frozenset(d for d in dims if x.shape[d] == 1 and shape[d] != 1 and _unsharded(dims, layout, d))
    axes = local.axes.axes
    steps = convert(axes, _frame(local, value, lazy), layout, (NOWHERE,) * len(axes))
    target = tuple(1 if d in lazy else n for d, n in enumerate(shape))
    return jnp.broadcast_to(run_steps(x, steps, target), shape)


def _unsharded(dims: Sequence[int], layout: Layout, dim: int) -> bool:
    return not any(place >= 0 and dims[place] == dim for place in layout)
