"""Counting a planned pass: its collectives, FLOPs, traffic and peak of live temporaries."""

from __future__ import annotations

import math

from galvatron_jax.partition.instructions import Apply, Convert, Loop, Version
from galvatron_jax.partition.layer_plan import Collective, PhasePlan
from galvatron_jax.partition.layout import Role, Step, StepKind
from galvatron_jax.partition.planner import Pass
from galvatron_jax.partition.static import StaticProgram
from galvatron_jax.spec.profile import CollectiveKind


def collective(step: Step, size: int, dtype: str) -> Collective:
    """A step as the cost model counts it."""
    local = math.prod(step.shape) * size
    if step.kind is StepKind.ALL_GATHER:
        local *= step.size
    return Collective(CollectiveKind(step.kind.value), step.names, step.size, local, dtype=dtype)


def phase(planner: Pass, operations: set[int], program: StaticProgram) -> PhasePlan:
    """Counts of a planned pass."""
    collectives = _collectives(planner, program)
    moved, peak = _traffic(planner, program)
    return PhasePlan(
        instructions=tuple(planner.instructions),
        collectives=tuple(collectives),
        flops=planner.flops,
        bytes=moved,
        peak_bytes=int(peak),
        operations=len(operations),
    )


def _collectives(planner: Pass, program: StaticProgram) -> list[Collective]:
    """Collectives of a planned pass, those of loops as often as they run."""
    found: list[Collective] = []
    for instruction in planner.instructions:
        if isinstance(instruction, Convert):
            dtype = program.program.values[instruction.value].dtype
            size = program.itemsize[instruction.value]
            found += [collective(s, size, dtype) for s in instruction.steps if s.kind is not StepKind.SLICE]
        elif isinstance(instruction, Loop):
            body = planner.loops[instruction.operation]
            found += _collectives(body, body.program) * instruction.trips
        elif instruction.combine is not None:
            found.append(_combined(planner, instruction, *instruction.combine, program))
    return found


def _combined(
    planner: Pass, instruction: Apply, names: tuple[str, ...], how: str, program: StaticProgram
) -> Collective:
    value = instruction.results[0][0]
    dtype = program.program.values[value].dtype
    group = math.prod(a.size for a in planner.axes if a.role is not Role.STORAGE and set(a.names) <= set(names))
    local = math.prod(instruction.shapes[0]) * (4 if dtype == "bool" else program.itemsize[value])
    return Collective(CollectiveKind.ALL_REDUCE, names, group, local, how, "int32" if dtype == "bool" else dtype)


def _traffic(planner: Pass, program: StaticProgram) -> tuple[float, float]:
    """Bytes that unfused operations read and write, and the peak of live results.

    Elementwise operations fuse into their neighbours; what they make counts only when several operations read it.
    """
    uses: dict[Version, int] = {}
    for instruction in planner.instructions:
        read = [(instruction.value, instruction.source)] if isinstance(instruction, Convert) else instruction.operands
        for version in read:
            uses[version] = uses.get(version, 0) + 1
    moved = live = peak = 0.0
    alive: dict[Version, float] = {}
    for instruction in planner.instructions:
        if isinstance(instruction, Convert):
            read, made = [(instruction.value, instruction.source)], [(instruction.value, instruction.target)]
            fused = all(s.kind is StepKind.SLICE for s in instruction.steps)
        else:
            op = program.operations[instruction.operation]
            read, made = list(instruction.operands), list(instruction.results)
            fused = op.elementwise or op.free
            if isinstance(instruction, Loop):
                body = planner.loops[instruction.operation]
                inner_moved, inner_peak = _traffic(body, body.program)
                moved += inner_moved * instruction.trips
                peak = max(peak, live + inner_peak)
        for version in made:
            size = planner.local_bytes(*version)
            if not fused or uses.get(version, 0) > 1:
                alive[version] = size
                live += size
                moved += size
        if not fused:
            moved += sum(planner.local_bytes(*v) for v in read)
        peak = max(peak, live)
        for version in read:
            uses[version] -= 1
            if uses[version] == 0 and version in alive:
                live -= alive.pop(version)
    return moved, peak
