"""The best plan by Hetu-Galvatron's formulas on its profiles, found by this package's solvers.

The space is that of its search: per layer the strategies that it has, 50 on 8 devices (powers of two of tensor
parallelism or Ulysses, ZeRO-2 or ZeRO-3, full recomputation or none), and every number of pipeline stages and of
micro-batches that divides. It is wider in two ways: stages hold unlike numbers of layers, and embedding and head,
where they are in unlike stages, have unlike strategies.

What is minimised is `Priced.lockstep_s`, within the memory rule of `galvatron_plans`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from galvatron_jax.cost.galvatron import (
    CONTEXT_BYTES,
    GalvatronCost,
    GalvatronProfile,
    ends_cost,
    global_buffer_bytes,
    in_flight,
    layer_cost,
    reshard_seconds,
)
from galvatron_jax.errors import InfeasibleError, InputError
from galvatron_jax.search.layers import solve
from galvatron_jax.search.partition import solve_pipeline
from galvatron_jax.search.pipeline import Cut, Pipeline, StageOptions
from galvatron_jax.search.sketch import chain_of
from galvatron_jax.spec.galvatron import Degrees
from galvatron_jax.spec.strategy import SequenceParallel
from galvatron_jax.units import format_bytes

from .galvatron_plans import DegreesPlan, price, schedule_of

MEGATRON, ULYSSES = SequenceParallel.MEGATRON, SequenceParallel.ULYSSES

_WORTH_A_LOOK = 1.01
"""Factor on the best known seconds up to which another setting is solved: what is polished gets faster."""


@dataclass(frozen=True)
class Found:
    """The best plan found."""

    plan: DegreesPlan
    seconds: float
    bound_s: float
    """Nothing in the space is faster; `seconds` where the plan is proven to be the best."""


def search(profile: GalvatronProfile, *, num_devices: int, global_batch: int, usable_bytes: int) -> Found:
    """The fastest plan that fits.

    Args:
        profile: Of a model whose blocks are alike, and of a machine.
        num_devices: Devices of the machine.
        global_batch: Examples of a step.
        usable_bytes: Of every device.

    Raises:
        InfeasibleError: nothing fits.
        InputError: the model's blocks are of several types.
    """
    if len(profile.memory.layers) > 1:
        raise InputError(f"{profile.memory.source}: has {len(profile.memory.layers)} types of layers; expected one.")
    best, bound_s = None, math.inf
    for setting in settings(profile, num_devices=num_devices, global_batch=global_batch):
        known_s = best.seconds if best is not None else math.inf
        found, bound = solve_setting(setting, usable_bytes=usable_bytes, upper_s=_WORTH_A_LOOK * known_s)
        bound_s = min(bound_s, bound)
        best = found if found is not None and found.seconds < known_s else best
    if best is None:
        raise InfeasibleError(
            f"No plan for {global_batch} examples on {num_devices} devices fits {format_bytes(usable_bytes)} of each. "
            "Give more memory, or a smaller batch."
        )
    return replace(best, bound_s=min(best.seconds, bound_s))


# ---------------------------------------------------------------------------------------------------- the space


@dataclass(frozen=True, eq=False)
class Table:
    """Strategies of one place in the model, with their costs."""

    degrees: tuple[Degrees, ...]
    costs: tuple[GalvatronCost, ...]

    def restricted(self, max_group: int | None) -> Table:
        """Those whose tensor-parallel groups are no larger; for None, those without tensor parallelism."""
        kept = [i for i, d in enumerate(self.degrees) if d.kind is not MEGATRON or d.group <= (max_group or 0)]
        return Table(tuple(self.degrees[i] for i in kept), tuple(self.costs[i] for i in kept))

    def options(self, groups: tuple[int, ...]) -> StageOptions:
        """The same for a pipeline.

        Args:
            groups: Sizes of the groups that share a layer, of one boundary class each. Layers of one class have
                nothing to move between them, nor has anything beside embedding and head, or at the cut between stages.
        """
        seconds = np.array([(c.forward_s, c.backward_s, c.synchronisation_s) for c in self.costs])
        held = np.array([(math.ceil(c.static_bytes), math.ceil(c.activation_bytes)) for c in self.costs])
        nothing = np.zeros((len(groups) or 1, 2))
        return StageOptions(
            strategies=(),
            forward_s=seconds[:, 0],
            backward_s=seconds[:, 1],
            once_s=seconds[:, 2],
            static_bytes=held[:, 0],
            residual_bytes=held[:, 1],
            workspace_bytes=np.zeros(len(held), np.int64),
            boundary=np.array([groups.index(d.group) if groups else 0 for d in self.degrees]),
            num_classes=len(nothing),
            enter_s=nothing,
            leave_s=nothing,
        )


@dataclass(frozen=True, eq=False)
class Setting:
    """One number of stages and of micro-batches, and one largest tensor-parallel group."""

    profile: GalvatronProfile
    global_batch: int
    num_microbatches: int
    pp: int
    max_group: int | None
    """None where no layer is tensor-parallel."""
    stage_devices: int
    blocks: Table
    ends: tuple[Table, ...]
    """Of embedding and head; one where they are in one stage."""

    @property
    def microbatch(self) -> int:
        """Examples of one micro-batch."""
        return self.global_batch // self.num_microbatches

    @property
    def fixed_bytes(self) -> int:
        """Context and buffer."""
        size = {"microbatch": self.microbatch, "stage_devices": self.stage_devices, "max_group": self.max_group}
        return CONTEXT_BYTES + math.ceil(global_buffer_bytes(self.profile, **size))

    def restricted(self, max_group: int | None) -> Setting:
        """With no larger tensor-parallel groups."""
        return Setting(
            self.profile, self.global_batch, self.num_microbatches, self.pp, max_group, self.stage_devices,
            self.blocks.restricted(max_group), tuple(table.restricted(max_group) for table in self.ends),
        )  # fmt: skip


def settings(profile: GalvatronProfile, *, num_devices: int, global_batch: int) -> Iterator[Setting]:
    """The whole space: every strategy for every place is in some of these."""
    for pp in (1, *sorted(profile.hardware.p2p_bytes_per_s)):
        if num_devices % pp or pp > profile.num_layers:
            continue
        for count in range(pp, global_batch + 1):
            if global_batch % count:
                continue
            whole = _whole(profile, num_devices // pp, pp, global_batch, count)
            groups = sorted({degrees.group for degrees in whole.blocks.degrees if degrees.kind is MEGATRON})
            restricted = (whole.restricted(max_group) for max_group in (None, *groups))
            yield from (setting for setting in restricted if setting.blocks.degrees)


def _whole(profile: GalvatronProfile, stage_devices: int, pp: int, global_batch: int, count: int) -> Setting:
    every = tuple(strategies(profile, pp=pp, stage_devices=stage_devices, microbatch=global_batch // count))
    size = {"microbatch": global_batch // count, "num_microbatches": count}
    blocks = Table(every, tuple(layer_cost(profile, degrees, **size) for degrees in every))
    plain = tuple(degrees for degrees in every if not degrees.checkpoint)
    ends = tuple(
        Table(plain, tuple(ends_cost(profile, degrees, stage=stage, **size) for degrees in plain))
        for stage in sorted({0, pp - 1})
    )
    return Setting(profile, global_batch, count, pp, None, stage_devices, blocks, ends)


def strategies(profile: GalvatronProfile, *, pp: int, stage_devices: int, microbatch: int) -> Iterator[Degrees]:
    """What its search lets a layer do: groups as measured, ZeRO-2 or ZeRO-3 wherever there are replicas."""
    hardware = profile.hardware
    for group in sorted(profile.memory.layers[0].activation_bytes):
        dp = stage_devices // group
        if stage_devices % group or microbatch % dp:
            continue
        tables = ((MEGATRON, hardware.allreduce_seconds), (ULYSSES, hardware.alltoall_seconds))
        kinds = [kind for kind, table in tables if group in table] if group > 1 else [SequenceParallel.NONE]
        for kind, zero, checkpoint in itertools.product(kinds, (2, 3) if dp > 1 else (0,), (False, True)):
            yield Degrees(pp, group, kind, dp, zero, checkpoint)


# ---------------------------------------------------------------------------------------------------- solving


@dataclass(frozen=True, eq=False)
class FewerInFlight(Pipeline):
    """A pipeline under the memory rule of 1F1B without a common tick."""

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """Per stage, its `pp - i` micro-batches."""
        return tuple(in_flight(self.degree, stage) for stage in range(self.degree))

    def residuals_kept(self, stage: int) -> int:
        """As many: its memory model knows no copy outside of the pool."""
        return self.in_flight[stage]


def pipeline(setting: Setting) -> Pipeline:
    """A setting as the problem that this package's search solves: embedding, blocks, and head."""
    groups = tuple(sorted({degrees.group for degrees in setting.blocks.degrees}))
    one_of = [next(d for d in setting.blocks.degrees if d.group == group) for group in groups]
    moved = [[reshard_seconds(setting.profile, a, b, microbatch=setting.microbatch) for b in one_of] for a in one_of]
    block, ends = setting.blocks.options(groups), [table.options(()) for table in setting.ends]
    count = setting.profile.num_layers
    layers = (ends[0], *[block] * count, *ends[1:])
    between = np.stack([np.array(moved)] * 2, axis=-1)
    moves = (
        np.zeros((1, len(groups), 2)), *[between] * (count - 1), *[np.zeros((len(groups), 1, 2))] * (len(ends) - 1),
    )  # fmt: skip
    return FewerInFlight(
        schedule=schedule_of(setting.pp),
        degree=setting.pp,
        num_chunks=1,
        num_microbatches=setting.num_microbatches,
        layers=layers,
        repeats=(None,) * len(layers),
        moves=moves,
        cuts=(Cut(),) * len(layers),
        fixed_bytes=setting.fixed_bytes,
    )


def solve_setting(setting: Setting, *, usable_bytes: int, upper_s: float) -> tuple[Found | None, float]:
    """The best plan found of one setting that takes less than `upper_s`; and what none of its plans undercuts."""
    problem = pipeline(setting)
    found, bound_s = _solve(setting, problem, usable_bytes, upper_s)
    room = usable_bytes
    # Bytes are exact here, where the rule of memory rounds them up for every layer.
    while found is not None and (over := max(price(setting.profile, found.plan).stage_bytes) - usable_bytes) > 0:
        room -= over
        found, _ = _solve(setting, problem, room, upper_s)
    return found, bound_s


def _solve(setting: Setting, problem: Pipeline, room: int, upper_s: float) -> tuple[Found | None, float]:
    bound_s = math.inf
    if setting.pp == 1:
        m = setting.num_microbatches
        chain = chain_of(problem, problem.residuals_kept(0), np.array([m, m, 1.0]), 0, len(problem.layers))
        solution = solve(chain, budget_bytes=room - setting.fixed_bytes, upper_s=upper_s).solution
        starts = (0,)
    else:
        outcome = solve_pipeline(problem, budget_bytes=room, upper_s=upper_s)
        solution, bound_s = outcome.solution, outcome.bound_s
        starts = solution.starts if solution is not None else ()
    if solution is None:
        return None, bound_s
    bound_s = min(bound_s, solution.seconds)
    return Found(_plan(setting, starts, solution.options), solution.seconds, bound_s), bound_s


def _plan(setting: Setting, starts: tuple[int, ...], options: tuple[int, ...]) -> DegreesPlan:
    count = setting.profile.num_layers
    blocks = [setting.blocks.degrees[option] for option in options[1 : count + 1]]
    # Layer 0 is the embedding.
    cuts = (0, *(start - 1 for start in starts[1:]), count)
    embedding = setting.ends[0].degrees[options[0]]
    return DegreesPlan(
        global_batch=setting.global_batch,
        num_microbatches=setting.num_microbatches,
        embedding=embedding,
        head=setting.ends[1].degrees[options[-1]] if setting.pp > 1 else embedding,
        stages=tuple(tuple(blocks[start:stop]) for start, stop in itertools.pairwise(cuts)),
    )
