"""Whether a plan fits a model and a set of devices: every reason why not, at once. And whether it can be run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from galvatron_jax.errors import InputError, PlanMismatchError
from galvatron_jax.spec.mesh import mesh_shape, prime_factors
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import LayerGroup, Plan, Schedule
from galvatron_jax.spec.program import FLOAT_BYTES
from galvatron_jax.spec.validation import did_you_mean

EXECUTORS = ("local", "annotate")
_LEVELS = ("inter", "intra")


def check_plan(plan: Plan, model: ModelSpec, num_devices: int) -> None:
    """Makes sure that a plan is one for a model and so many devices.

    Args:
        plan: The plan, found by the search or written by hand.
        model: The model it is to train.
        num_devices: Devices there are.

    Raises:
        PlanMismatchError: naming everything that differs.
    """
    faults = [
        *_mesh_faults(plan, num_devices),
        *_model_faults(plan, model),
        *_cover_faults(plan, len(model.layers)),
        *_axis_faults(plan),
        *_pipeline_faults(plan),
        *_batch_faults(plan),
        *_executor_faults(plan),
        *_gradient_sum_faults(plan, model),
    ]
    if faults:
        heading = f"This plan for {plan.model!r} cannot train {model.name!r} on {_count(num_devices, 'device')}:"
        raise PlanMismatchError("\n  ".join([heading, *faults]))


def _mesh_faults(plan: Plan, num_devices: int) -> Iterator[str]:
    sizes = " x ".join(f"{axis.name}={axis.size}" for axis in plan.mesh) or "no axes"
    if plan.num_devices != num_devices:
        yield f"mesh: {sizes} makes {plan.num_devices} devices, but there are {num_devices}; search anew for these."
    for name, count in Counter(axis.name for axis in plan.mesh).items():
        if count > 1:
            yield f"mesh: the axis name {name!r} is used {count} times."
    for index, axis in enumerate(plan.mesh):
        factors = prime_factors(axis.size)
        if len(factors) != 1:
            split = (
                f"; use {len(factors)} axes of sizes {', '.join(map(str, factors))}" if factors else "; leave it out"
            )
            yield f"mesh[{index}].size: axis {axis.name!r} has size {axis.size}, which is not prime{split}."
        if axis.level not in _LEVELS:
            yield f"mesh[{index}].level: {axis.level!r} is no link level.{did_you_mean(axis.level, _LEVELS)}"
    levels = [axis.level for axis in plan.mesh if axis.level in _LEVELS]
    if levels != sorted(levels):
        yield "mesh: axes of level 'inter' (between nodes, the slowest links) must come before those of level 'intra'."


def _model_faults(plan: Plan, model: ModelSpec) -> Iterator[str]:
    if plan.model_fingerprint is None or plan.model_fingerprint == model.fingerprint:
        return
    differences = []
    planned = max((group.stop for stage in plan.stages for group in stage.groups), default=0)
    if plan.model != model.name:
        differences.append(f"its name ({plan.model!r} in the plan, {model.name!r} here)")
    if planned != len(model.layers):
        differences.append(f"its number of layers ({planned} in the plan, {len(model.layers)} here)")
    what = " and ".join(differences) or "its operations, shapes or dtypes (name and number of layers agree)"
    yield (
        f"model_fingerprint: the plan was made for {plan.model_fingerprint}, this model is {model.fingerprint}; "
        f"what differs: {what}. Search anew, or remove model_fingerprint to use the plan all the same."
    )


def _cover_faults(plan: Plan, num_layers: int) -> Iterator[str]:
    """Every layer in exactly one group, groups in the model's order."""
    position = 0
    for place, group in _groups(plan):
        if group.start >= group.stop:
            yield f"{place}: holds no layers (start {group.start}, stop {group.stop})."
            continue
        if group.start > position:
            yield f"{place}: starts at layer {group.start}; {_layers(position, group.start)} in no group."
        elif group.start < position:
            yield (
                f"{place}: starts at layer {group.start}, but the groups before it reach layer {position - 1}; "
                "groups must follow each other without overlap."
            )
        position = max(position, group.stop)
    if position > num_layers:
        yield f"stages: the groups end after layer {position - 1}, but the model's last layer is {num_layers - 1}."
    if position < num_layers:
        yield f"stages: {_layers(position, num_layers)} in no group; the model has {_count(num_layers, 'layer')}."
    for index, stage in enumerate(plan.stages):
        if not stage.groups:
            yield f"stages[{index}]: holds no layers."


def _axis_faults(plan: Plan) -> Iterator[str]:
    """Axes that the mesh lacks, or that serve twice."""
    known = [axis.name for axis in plan.mesh]
    uses = [("pipeline_axes", plan.pipeline_axes), ("batch_axes", plan.batch_axes)]
    for place, group in _groups(plan):
        strategy = group.strategy
        kinds = (("dp", strategy.dp), ("tp", strategy.tp), ("sp", strategy.sp))
        uses += [(f"{place}.strategy.{kind}", axes) for kind, axes in kinds]
        # Megatron's sequence parallelism works over the tp axes themselves.
        serving = [*strategy.replicas, *strategy.tp]
        twice = sorted(axis for axis, count in Counter(serving).items() if count > 1)
        if twice:
            yield f"{place}.strategy: {_axes(twice)} more than once ({strategy.short()}); each axis may serve one kind."
    for place, axes in uses:
        for axis in dict.fromkeys(axes):
            if axis not in known:
                hint = did_you_mean(axis, known) if known else " The mesh has no axes."
                yield f"{place}: the mesh has no axis {axis!r}.{hint}"
    for place, axes in uses[:2]:
        if len(set(axes)) < len(axes):
            yield f"{place}: {', '.join(axes)} names an axis twice."


def _batch_faults(plan: Plan) -> Iterator[str]:
    if plan.global_batch < 1 or plan.num_microbatches < 1:
        yield (
            f"global_batch {plan.global_batch} and num_microbatches {plan.num_microbatches}: both must be at least 1."
        )
        return
    microbatch, rest = divmod(plan.global_batch, plan.num_microbatches)
    if rest:
        yield (
            f"global_batch: {plan.global_batch} examples do not divide into {plan.num_microbatches} micro-batches; "
            f"use {plan.global_batch - rest} or {plan.global_batch - rest + plan.num_microbatches} examples."
        )
        return
    shape = mesh_shape(plan.mesh)
    uses = [(f"{place}.strategy.dp", group.strategy.dp) for place, group in _groups(plan)]
    first_use = {axes: place for place, axes in reversed([("batch_axes", plan.batch_axes), *uses])}
    for axes, place in first_use.items():
        degree = 1
        for axis in axes:
            degree *= shape.get(axis, 1)
        if degree and microbatch % degree:
            yield (
                f"{place}: micro-batches of {_count(microbatch, 'example')} ({plan.global_batch} in "
                f"{plan.num_microbatches}) do not divide over {degree} devices; "
                f"make global_batch a multiple of {degree * plan.num_microbatches}, or use fewer micro-batches."
            )


def _executor_faults(plan: Plan) -> Iterator[str]:
    if plan.executor not in EXECUTORS:
        yield f"executor: no executor {plan.executor!r}.{did_you_mean(plan.executor, EXECUTORS)}"
    elif plan.executor == "annotate" and len(plan.stages) > 1:
        yield f"executor: `annotate` runs plans of one stage, this one has {len(plan.stages)}; use `local`."


def _gradient_sum_faults(plan: Plan, model: ModelSpec) -> Iterator[str]:
    for fault in gradient_sum_faults(plan.gradient_sum_dtype, model, executor=plan.executor):
        yield f"gradient_sum_dtype: {fault}"


def gradient_sum_faults(dtype: str | None, model: ModelSpec, *, executor: str = "local") -> Iterator[str]:
    """Why an executor cannot sum a model's gradients in a type; None is their own."""
    if dtype is None:
        return
    if dtype not in FLOAT_BYTES:
        yield f"{dtype!r} is no type to sum gradients in.{did_you_mean(dtype, FLOAT_BYTES)}"
        return
    own = sorted({parameter.dtype for parameter in model.parameters})
    if not any(dtype == each or FLOAT_BYTES[dtype] < FLOAT_BYTES.get(each, 0) for each in own):
        yield f"{dtype} is not narrower than the gradients, which are {' or '.join(own)}; use None."
    if executor == "annotate":
        yield "`annotate` leaves it to XLA in which type gradients are summed; use `local`, or None."


def check_gradient_sums(dtype: str | None, model: ModelSpec, *, executor: str = "local") -> None:
    """Makes sure that an executor can sum a model's gradients in a type.

    Raises:
        InputError: when it cannot, naming the first reason.
    """
    for fault in gradient_sum_faults(dtype, model, executor=executor):
        raise InputError(fault)


def _pipeline_faults(plan: Plan) -> Iterator[str]:
    """Stages that do not lie on the mesh or fit the schedule, and strategies that use the axes along which they lie."""
    yield from _schedule_faults(plan)
    known, names = [axis.name for axis in plan.mesh], ", ".join(plan.pipeline_axes)
    if not set(plan.pipeline_axes) <= set(known):
        return  # Named among the axes that the mesh lacks.
    leading = known[: len(plan.pipeline_axes)]
    if list(plan.pipeline_axes) != leading:
        yield (
            f"pipeline_axes: {names} must be the first axes of the mesh, in its order, for stages lie along the "
            f"slowest links; here that is {', '.join(leading)}."
        )
    uses = [("batch_axes", plan.batch_axes)]
    for place, group in _groups(plan):
        uses.append((f"{place}.strategy", (*group.strategy.replicas, *group.strategy.tp)))
    for place, axes in uses:
        taken = sorted(set(axes) & set(plan.pipeline_axes))
        if taken:
            yield f"{place}: stages lie along {', '.join(taken)} (pipeline_axes); spread each over the other axes only."


def _schedule_faults(plan: Plan) -> Iterator[str]:
    """One stage, schedule `none` and no pipeline axes belong together; else stages must fill the groups of devices."""
    count, names = len(plan.stages), ", ".join(plan.pipeline_axes)
    if count <= 1:
        if plan.schedule is not Schedule.NONE:
            yield f"schedule: {plan.schedule.value!r} orders several stages, but the plan has one; use 'none'."
        if names:
            yield f"pipeline_axes: stages lie along {names}, but the plan has one stage; leave it empty."
        return
    if plan.schedule is Schedule.NONE:
        others = ", ".join(repr(schedule.value) for schedule in Schedule if schedule is not Schedule.NONE)
        yield f"schedule: 'none' runs one stage, but the plan has {count}; use one of {others}."
    if not names:
        yield f"pipeline_axes: missing; {count} stages lie along the first axes of the mesh, which must be named."
    shape = mesh_shape(plan.mesh)
    degree = math.prod(shape.get(name, 0) for name in set(plan.pipeline_axes))
    if not names or not degree:
        return
    chunks, rest = divmod(count, degree)
    where = f"stages: {count} stages do not fit {degree} groups of devices (pipeline_axes {names})"
    if plan.schedule is Schedule.INTERLEAVED and (rest or chunks < 2):
        yield f"{where}; 'interleaved' needs the same number on each, at least 2: {2 * degree}, {3 * degree}, ..."
    elif plan.schedule is not Schedule.INTERLEAVED and count != degree:
        yield f"{where}; make {degree}, or use 'interleaved' with a multiple."


def _groups(plan: Plan) -> Iterator[tuple[str, LayerGroup]]:
    for stage_index, stage in enumerate(plan.stages):
        for group_index, group in enumerate(stage.groups):
            yield f"stages[{stage_index}].groups[{group_index}]", group


def _layers(start: int, stop: int) -> str:
    return f"layer {start} is" if stop - start == 1 else f"layers {start} to {stop - 1} are"


def _axes(names: list[str]) -> str:
    return f"axis {names[0]} serves" if len(names) == 1 else f"axes {', '.join(names)} serve"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
