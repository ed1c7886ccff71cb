"""One host's share of `pipeline_time.py`: whole steps of a pipeline, its stages alone, and ticks without work.

All of it runs the programs of the plan's own step. A stage's turn is the engine's, on arrays of the shapes that it has
there. A step whose table is idle has the permutes of every tick, the synchronisation and the update, and no more.
"""

from __future__ import annotations

import dataclasses
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
WARM_UP = 2
"""Rounds that do not count."""


class IdleStep(PipelineStep):
    """The step with nothing to do in its ticks."""

    @cached_property
    def table(self) -> ScheduleTable:
        busy = super().table
        idle = np.full_like(busy.forward_stage, IDLE)
        return dataclasses.replace(busy, forward_stage=idle, backward_stage=idle)


def measure(
    *, schedule: str, num_microbatches: int, global_batch: int, starts: list[int], sizes: dict[str, Any], rounds: int
) -> list[dict[str, Clocked]]:
    """Times on this host, round by round: the machine's speed changes, and what is compared should meet the same."""
    traced = trace_gpt(sizes, global_batch // num_microbatches)
    plan = plan_of(traced, Schedule(schedule), num_microbatches, global_batch, starts)
    step = build_step(traced, plan, OPTIMIZER)
    assert isinstance(step, PipelineStep)
    tokens = np.random.default_rng(0).integers(0, sizes["vocab_size"], (global_batch, sizes["seq_length"] + 1))
    batch = step.place({"tokens": tokens.astype(np.int32)})
    idle = IdleStep(**{field.name: getattr(step, field.name) for field in dataclasses.fields(step)})
    state, stage, found = step.init(0), jax.process_index(), []
    ways = [Turn(step, state, stage, way, batch) for way in ("forward", "backward")]
    for _ in range(rounds + WARM_UP):
        state, whole = time_step(step, state, batch)
        state, without_work = time_step(idle, state, batch)
        found.append({"step_s": whole, "idle_s": without_work, **{f"{turn.way}_s": turn.time() for turn in ways}})
    return found[WARM_UP:]


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


def time_step(step: PipelineStep, state: State, batch: Any) -> tuple[State, Clocked]:
    """One step, which begins when all hosts have ended what was before."""
    jax.block_until_ready(state)
    sync_global_devices("step")
    watch = Watch()
    state, metrics = step.jitted(state, batch)
    jax.block_until_ready((state, metrics))
    return state, watch.read()


class Turn:
    """One stage's program on this host's device.

    The hosts begin together: in a step, too, they work at the same time, and share a machine's caches and memory
    bandwidth.
    """

    def __init__(self, step: PipelineStep, state: State, stage: int, way: str, batch: Any):
        program = turns(step, stage, way)
        self.way = way
        self._run, self._count = jax.jit(program) if program else None, step.plan.num_microbatches
        self._leaves = {name: jnp.asarray(x.addressable_shards[0].data) for name, x in batch.items()}
        self._params = {name: jnp.asarray(x.addressable_shards[0].data)[0] for name, x in state["params"].items()}

    def time(self) -> Clocked:
        """Of a micro-batch: a call that takes the turns of all, less one that takes none. Zero without a program."""
        read = []
        for count in (0, self._count):
            sync_global_devices(f"{self.way} {count}")
            watch = Watch()
            if self._run:
                jax.block_until_ready(self._run(self._params, self._leaves, count))
            read.append(watch.read())
        none, every = read
        if self._run is None:
            return Clocked(0.0, 0.0)
        return Clocked((every.wall_s - none.wall_s) / self._count, (every.cpu_s - none.cpu_s) / self._count)


class Clocked(NamedTuple):
    """Seconds by two clocks; that of the process's CPU time does not see other processes, nor what is waited for."""

    wall_s: float
    cpu_s: float


class Watch:
    def __init__(self) -> None:
        self.begin = time.perf_counter(), time.process_time()

    def read(self) -> Clocked:
        return Clocked(time.perf_counter() - self.begin[0], time.process_time() - self.begin[1])


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
