"""One host's share of `pipeline_time.py`: whole steps of a pipeline, its stages alone, and ticks without work.

All of it runs the programs of the plan's own step. A stage's turn is the engine's, on arrays of the shapes that it has
there. A step whose table is idle has the permutes of every tick, the synchronisation and the update, and no more.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh, PartitionSpec

from galvatron_jax.cost.schedules import IDLE, ScheduleTable
from galvatron_jax.cost.sizes import LINE
from galvatron_jax.models import registry
from galvatron_jax.runtime.pipeline import PipelineStep
from galvatron_jax.runtime.program import State
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.trace.model import Traced, trace

OPTIMIZER = optax.sgd(1e-3, momentum=0.9)
CALM = 7
"""Samples in a row."""


class IdleStep(PipelineStep):
    """The step with nothing to do in its ticks."""

    @cached_property
    def table(self) -> ScheduleTable:
        busy = super().table
        idle = np.full_like(busy.forward_stage, IDLE)
        return dataclasses.replace(busy, forward_stage=idle, backward_stage=idle)


def measure(
    *, schedule: str, num_microbatches: int, global_batch: int, starts: list[int], sizes: dict[str, Any], steps: int
) -> dict[str, Any]:
    """Times on this host, each by both clocks, and the table."""
    traced = trace_gpt(sizes, global_batch // num_microbatches)
    plan = plan_of(traced, Schedule(schedule), num_microbatches, global_batch, starts)
    step = build_step(traced, plan, OPTIMIZER)
    assert isinstance(step, PipelineStep)
    tokens = np.random.default_rng(0).integers(0, sizes["vocab_size"], (global_batch, sizes["seq_length"] + 1))
    batch = step.place({"tokens": tokens.astype(np.int32)})
    idle = IdleStep(**{field.name: getattr(step, field.name) for field in dataclasses.fields(step)})
    state, measured = time_step(step, step.init(0), batch, steps)
    state, without_work = time_step(idle, state, batch, steps)
    stage = jax.process_index()
    turns = {f"{way}_s": time_turn(step, state, stage, way, batch, steps) for way in ("forward", "backward")}
    return {"step_s": measured, "idle_s": without_work, **turns}


def trace_gpt(sizes: dict[str, Any], microbatch: int) -> Traced:
    family = registry.family("gpt2")
    config = registry.model_config("gpt2", "small", tie_embeddings=False, **sizes)

    def make(seed: int | None) -> nnx.Module:
        return family.model(config, rngs=nnx.Rngs(jax.random.key(0 if seed is None else seed)))

    batch = family.example_batch(config, microbatch)
    return trace(nnx.eval_shape(lambda: make(0)), family.loss_fn, batch, make=make, name="gpt")


def plan_of(traced: Traced, schedule: Schedule, count: int, global_batch: int, starts: list[int]) -> Plan:
    """Two stages on two devices."""
    ends = [*starts[1:], len(traced.spec.layers)]
    stages = [
        Stage(groups=(LayerGroup(start=start, stop=stop, strategy=LayerStrategy()),))
        for start, stop in zip(starts, ends, strict=True)
    ]
    return Plan(
        model=traced.spec.name,
        mesh=(MeshAxis(name="a", size=2, level="inter"),),
        global_batch=global_batch,
        num_microbatches=count,
        schedule=schedule,
        stages=tuple(stages),
        pipeline_axes=("a",),
    )


def time_step(step: PipelineStep, state: State, batch: Any, steps: int) -> tuple[State, Clocked]:
    """Medians of whole steps; each begins when all hosts have ended the one before."""
    found = []
    for _ in range(steps + 2):
        jax.block_until_ready(state)
        watch = Watch()
        state, metrics = step.jitted(state, batch)
        jax.block_until_ready((state, metrics))
        found.append(watch.read())
    return state, calmest(found[2:])


def time_turn(step: PipelineStep, state: State, stage: int, way: str, batch: Any, steps: int) -> Clocked:
    """Medians of one stage's program on this host's device; zero where it has none.

    The difference between a call that takes the turns of all micro-batches and one that takes none. The hosts begin
    together: in a step, too, they work at the same time, and share a machine's caches and memory bandwidth.
    """
    program = turns(step, stage, way)
    leaves = {name: jnp.asarray(x.addressable_shards[0].data) for name, x in batch.items()}
    params = {name: jnp.asarray(x.addressable_shards[0].data)[0] for name, x in state["params"].items()}
    run, found, count = jax.jit(program) if program else None, [], step.plan.num_microbatches
    for number in range(steps + 1):
        read = []
        for turns_taken in (0, count):
            sync_global_devices(f"{way} {number} {turns_taken}")
            watch = Watch()
            if run:
                jax.block_until_ready(run(params, leaves, turns_taken))
            read.append(watch.read())
        none, all_of_them = read
        found.append(Clocked((all_of_them.wall_s - none.wall_s) / count, (all_of_them.cpu_s - none.cpu_s) / count))
    return calmest(found[1:]) if run else Clocked(0.0, 0.0)


class Clocked(NamedTuple):
    """Seconds by two clocks; that of the process's CPU time does not see other processes, nor what is waited for."""

    wall_s: float
    cpu_s: float
    spread_s: float = 0.0
    """Interquartile range by the first."""


class Watch:
    def __init__(self) -> None:
        self.begin = time.perf_counter(), time.process_time()

    def read(self) -> Clocked:
        return Clocked(time.perf_counter() - self.begin[0], time.process_time() - self.begin[1])


def calmest(found: list[Clocked]) -> Clocked:
    """Medians of the seven samples in a row that differ least: while other processes rest, if they ever do."""
    windows = [found[start : start + CALM] for start in range(max(1, len(found) - CALM + 1))]
    return min((median(window) for window in windows), key=lambda each: each.spread_s)


def median(found: list[Clocked]) -> Clocked:
    walls = [each.wall_s for each in found]
    low, _, high = statistics.quantiles(walls, n=4)
    return Clocked(statistics.median(walls), statistics.median(each.cpu_s for each in found), high - low)


def turns(step: PipelineStep, stage: int, way: str) -> Callable[[Any, Any, Any], Any] | None:
    """A function that takes a stage's turn on the first so many micro-batches, one after another."""
    mesh = Mesh(np.array(jax.local_devices()[:1]), step.mesh.axis_names)
    sizes = step.storage.stored.sizes

    def local(params: Any, leaves: Any, count: Any) -> Any:
        engine = step.engine(params)
        if not engine.works(engine.stages[stage], way):
            return None
        # XLA must not know that slots are empty, or their reader reads nothing.
        carry = lax.optimization_barrier(engine.begin({}, leaves)[0])
        # Each micro-batch has the slot that it has in the step, so that what is kept takes as long to write and read.
        slots = jnp.asarray(slots_of(step.table, stage, way))

        def body(number: Any, carry: Any) -> Any:
            # What comes in differs from turn to turn, so that no work can be done once for all.
            scale = jnp.where(number < 0, 0.0, 1.0)
            moved = {name: jax.tree.map(lambda x: x * scale, carry[name]) for name in ("received", "cotangents")}
            return engine.turn(stage, way, {**carry, **moved}, leaves, number, slots[number])

        return lax.fori_loop(0, count, body, carry)

    whole = PartitionSpec()
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(whole, whole, whole), out_specs=whole, check_vma=False)
    params = {name: jax.ShapeDtypeStruct((lines, LINE), name) for name, lines in sizes.items()}
    return None if jax.eval_shape(mapped, params, leaves_of(step), 1) is None else mapped


def slots_of(table: ScheduleTable, stage: int, way: str) -> np.ndarray:
    """Slot of each micro-batch in a stage's turns. int32[micro-batches]."""
    here = getattr(table, f"{way}_stage") == stage
    found = np.zeros(table.num_microbatches, np.int32)
    found[getattr(table, f"{way}_microbatch")[here]] = getattr(table, f"{way}_slot")[here]
    return found


def leaves_of(step: PipelineStep) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in step.batch_shapes.items()}
