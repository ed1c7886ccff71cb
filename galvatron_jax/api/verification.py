"""`verify_plan`: compiles a plan's step by XLA's GPU compiler for devices that are not here, and reads the result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import jax
import optax

from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.api.planning import LossFn, Request, make_request
from galvatron_jax.cost.step import price_plan
from galvatron_jax.errors import PlanMismatchError
from galvatron_jax.runtime.collectives import Collectives, compiled_collectives, predicted_collectives
from galvatron_jax.runtime.pipeline import PipelineStep
from galvatron_jax.runtime.program import StepProgram
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.plan_checks import check_plan
from galvatron_jax.verify.replay import replay
from galvatron_jax.verify.targets import read_target, target_devices
from galvatron_jax.verify.verification import CollectiveCheck, CompiledMemory, Verification, Volume


def verify_plan(
    model: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    example_batch: Any,
    *,
    plan: Plan | str | PathLike[str],
    target: str,
    memory_per_device: str | int | None = None,
) -> Verification:
    """Compiles the train step of a plan for GPUs that need not be here, and says what it needs beside the prediction.

    Set `JAX_PLATFORMS=cpu` before Python starts, and install the `verify` extra; no GPU is needed.

    Args:
        model: as `train_step` takes it.
        loss_fn: likewise.
        optimizer: likewise.
        example_batch: likewise; the global batch.
        plan: a plan, or the path of one.
        target: the devices, such as `h100x64`.
        memory_per_device: what must hold the step; all of the device's memory by default.

    Raises:
        InputError: when there is no such target, or the compiler is not installed.
        PlanMismatchError: when the plan is for another model, batch or number of devices.
    """
    given = Plan.load(plan) if isinstance(plan, (str, PathLike)) else plan
    request = make_request(
        model, loss_fn, optimizer, example_batch, memory_per_device=memory_per_device, num_microbatches=None
    )
    return verify_request(request, given, target=target)


def verify_request(request: Request, plan: Plan, *, target: str) -> Verification:
    """The same of a request that was checked.

    Raises:
        GalvatronError: as `verify_plan`.
    """
    name, cluster = read_target(target)
    devices = target_devices(name, cluster.num_devices)
    seconds: dict[str, float] = {}
    if plan.global_batch != request.global_batch:
        raise PlanMismatchError(
            f"The plan is for {plan.global_batch} examples per step, the example batch has {request.global_batch}. "
            "Give the plan's batch."
        )
    with _timed(seconds, "trace"):
        # Fingerprints are those of the model at the global batch, prices too.
        whole = request.trace()
        check_plan(plan, whole.spec, cluster.num_devices)
        traced = request.trace(num_microbatches=plan.num_microbatches) if plan.num_microbatches > 1 else whole
        memory = optimizer_memory(request.optimizer, whole.spec)
        prediction = price_plan(whole.spec, plan, cluster=cluster, optimizer=memory)
        step = build_step(traced, plan, request.optimizer, devices=devices)
    with _timed(seconds, "lower"):
        step.lowered  # noqa: B018
    with _timed(seconds, "compile"):
        compiled = step.compiled
    with _timed(seconds, "replay"):
        table = step.table if isinstance(step, PipelineStep) else None
        span = replay(compiled.as_text(), cluster, table=table)
        collectives = compare_collectives(step)
    budget = cluster.device.memory_bytes if request.memory_bytes is None else request.memory_bytes
    return Verification(
        plan=plan,
        cluster=cluster,
        prediction=prediction,
        memory=CompiledMemory.of(compiled),
        budget_bytes=budget,
        collectives=collectives,
        replay=span,
        seconds=seconds,
    )


def compare_collectives(step: StepProgram, compiled: jax.stages.Compiled | None = None) -> tuple[CollectiveCheck, ...]:
    """Predicted and compiled collectives of a step, kind by kind and group by group; those of no bytes left out.

    Args:
        step: a step; compiled for this if it has not been.
        compiled: its program, where it was compiled in another way.
    """
    predicted = _volumes(predicted_collectives(step))
    found, nothing = _volumes(compiled_collectives(step, compiled=compiled)), Volume(0, 0)
    return tuple(
        CollectiveCheck(
            operation=operation,
            axes=axes,
            members=_members(step, axes),
            predicted=predicted.get((operation, axes), nothing),
            compiled=found.get((operation, axes), nothing),
        )
        for operation, axes in sorted(predicted.keys() | found.keys())
    )


def _volumes(collectives: Collectives) -> dict[tuple[str, tuple[str, ...]], Volume]:
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for one, count in collectives.items():
        counts[one.kind, one.axes] += count
        sizes[one.kind, one.axes] += one.bytes * count
    return {key: Volume(counts[key], size) for key, size in sizes.items() if size}


def _members(step: StepProgram, axes: tuple[str, ...]) -> int:
    count = 1
    for axis in axes:
        count *= step.mesh.shape.get(axis, 1)
    return count


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
