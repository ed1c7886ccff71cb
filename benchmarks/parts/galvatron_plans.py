"""Plans in Hetu-Galvatron's terms, and what one cost model says of them.

Seconds and bytes of layers, embedding and head are those of its formulas on its profiles
(`galvatron_jax.cost.galvatron`). They are put together in one way for every plan:

- Time: the forward and backward seconds of the stages go through a schedule, and the most that a stage's gradients
  cost once a step comes on top. `lockstep_s` is the makespan of this package's table of 1F1B that stashes residuals,
  `asynchronous_s` that of `one_f_one_b`. Between neighbours that groups of unlike size share, activations and
  gradients are moved.
- Memory: its own rule, with its rounding to whole MB. Stage `i` of `pp` holds `pp - i` micro-batches, beside
  `CONTEXT_BYTES` and one buffer for the plan's largest tensor-parallel group; none where no layer is tensor-parallel,
  which its search looks at by itself.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

from galvatron_jax.cost.galvatron import (
    CONTEXT_BYTES,
    GalvatronCost,
    GalvatronProfile,
    degrees_of,
    ends_cost,
    global_buffer_bytes,
    in_flight,
    layer_cost,
    published_step_seconds,
    reshard_seconds,
)
from galvatron_jax.cost.schedules import makespan, tick_kinds
from galvatron_jax.spec.galvatron import Degrees
from galvatron_jax.spec.galvatron.reading import MB
from galvatron_jax.spec.mesh import mesh_shape
from galvatron_jax.spec.plan import Plan, Schedule
from galvatron_jax.spec.strategy import SequenceParallel

from .one_f_one_b import step_seconds


@dataclass(frozen=True)
class DegreesPlan:
    """A plan for a model of embedding, repeated blocks and head."""

    global_batch: int
    num_microbatches: int
    embedding: Degrees
    head: Degrees
    """The same as `embedding` where there is one stage."""
    stages: tuple[tuple[Degrees, ...], ...]
    """The blocks of every stage."""

    @classmethod
    def of(cls, plan: Plan) -> DegreesPlan:
        """A plan that `Plan.from_galvatron` read."""
        mesh, pp = mesh_shape(plan.stage_mesh), plan.pipeline_degree
        embedding, *blocks, head = (degrees_of(strategy, mesh, pp=pp) for strategy in plan.strategies)
        counts = [stage.groups[-1].stop - stage.groups[0].start for stage in plan.stages]
        counts[0] -= 1
        counts[-1] -= 1
        stops = list(itertools.accumulate(counts))
        stages = tuple(tuple(blocks[stop - count : stop]) for stop, count in zip(stops, counts, strict=True))
        return cls(plan.global_batch, plan.num_microbatches, embedding, head, stages)

    @property
    def microbatch(self) -> int:
        """Examples of one micro-batch."""
        return self.global_batch // self.num_microbatches

    @property
    def largest_group(self) -> int | None:
        """Devices of the largest group that shares a layer by tensor parallelism; None where none does."""
        every = itertools.chain((self.embedding, self.head), *self.stages)
        return max((d.group for d in every if d.group > 1 and d.kind is not SequenceParallel.ULYSSES), default=None)

    def describe(self) -> str:
        """Every stage's strategies with the number of layers that have them, in its notation."""
        stages = (Counter(map(notation, stage)) for stage in self.stages)
        listed = " | ".join(", ".join(f"{count} x {name}" for name, count in stage.items()) for stage in stages)
        ends = dict.fromkeys(map(notation, (self.embedding, self.head)))
        plural = "" if self.num_microbatches == 1 else "es"
        return f"{self.num_microbatches} micro-batch{plural}: {listed}; ends {' and '.join(ends)}"


@dataclass(frozen=True)
class Priced:
    """What the cost model says of a plan."""

    lockstep_s: float
    asynchronous_s: float
    published_s: float
    """By the formula that its search reports."""
    stage_bytes: tuple[int, ...]
    """Of one device of every stage."""


def notation(degrees: Degrees) -> str:
    """A strategy such as `2-4*-1f-c`."""
    star = "*" if degrees.kind is SequenceParallel.MEGATRON else ""
    ulysses = "-sp" if degrees.kind is SequenceParallel.ULYSSES else ""
    sharded = "f" if degrees.zero == 3 else ""
    return f"{degrees.pp}-{degrees.group}{star}-{degrees.dp}{sharded}{'-c' if degrees.checkpoint else ''}{ulysses}"


def buffer_bytes(profile: GalvatronProfile, plan: DegreesPlan) -> float:
    """The buffer of every stage that its plan-wide largest group asks for."""
    devices = plan.embedding.group * plan.embedding.dp
    return global_buffer_bytes(profile, microbatch=plan.microbatch, stage_devices=devices, max_group=plan.largest_group)


def price(profile: GalvatronProfile, plan: DegreesPlan) -> Priced:
    """Seconds of a step and bytes of a plan.

    Raises:
        InputError: the batch does not divide, or the profile lacks a strategy's degrees.
    """
    batch = {"microbatch": plan.microbatch, "num_microbatches": plan.num_microbatches}
    pp = len(plan.stages)
    layers = [[layer_cost(profile, degrees, **batch) for degrees in stage] for stage in plan.stages]
    ends = [
        ends_cost(profile, plan.head if stage == pp - 1 else plan.embedding, stage=stage, **batch)
        for stage in range(pp)
    ]
    moved = [
        sum(reshard_seconds(profile, *pair, microbatch=plan.microbatch) for pair in itertools.pairwise(stage))
        for stage in plan.stages
    ]
    whole = [(*stage, end) for stage, end in zip(layers, ends, strict=True)]
    forward = [sum(cost.forward_s for cost in stage) + move for stage, move in zip(whole, moved, strict=True)]
    backward = [sum(cost.backward_s for cost in stage) + move for stage, move in zip(whole, moved, strict=True)]
    once = [sum(cost.synchronisation_s for cost in stage) for stage in whole]
    kinds = tick_kinds(schedule_of(pp), num_stages=pp, num_microbatches=plan.num_microbatches)
    return Priced(
        lockstep_s=float(makespan(kinds, forward, backward)) + max(once),
        asynchronous_s=step_seconds(forward, backward, once, num_microbatches=plan.num_microbatches),
        published_s=published_step_seconds(layers, ends, num_microbatches=plan.num_microbatches),
        stage_bytes=tuple(
            _bytes(stage, end, in_flight(pp, index)) + int(buffer_bytes(profile, plan) / MB) * MB
            for index, (stage, end) in enumerate(zip(layers, ends, strict=True))
        ),
    )


def schedule_of(pp: int) -> Schedule:
    """Its `pipedream_flush`, which keeps residuals."""
    return Schedule.ONE_F_ONE_B_STASH if pp > 1 else Schedule.NONE


def _bytes(layers: list[GalvatronCost], end: GalvatronCost, held: int) -> int:
    parts = [cost.static_bytes + held * cost.activation_bytes for cost in (*layers, end)]
    parts[-1] += CONTEXT_BYTES
    return sum(math.ceil(part / MB) * MB for part in parts)
