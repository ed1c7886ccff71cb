"""What must hold of every schedule table, checked entry by entry and apart from the formulas that made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from galvatron_jax.cost.schedules import IDLE, ScheduleTable, in_flight, slots
from galvatron_jax.spec.plan import Schedule

_Work = dict[tuple[int, int], int]
"""Tick in which each (virtual stage, micro-batch) is worked on."""


def check_table(table: ScheduleTable) -> None:
    """Checks that a table can run, gives every result, and costs what is said of its schedule.

    Every micro-batch passes every virtual stage once each way (the last one backward only, where backward recomputes);
    what arrives in a tick is used in it; a slot holds one input from its forward to its backward, and there are as few
    of them as can be; as many micro-batches are in flight, and as many ticks idle, as the formulas promise.

    Args:
        table: any table.

    Raises:
        ValueError: the first thing that does not hold, with its tick and stage.

    Example:
        >>> from galvatron_jax.cost.schedules import make_table
        >>> check_table(make_table(Schedule.GPIPE, num_stages=4, num_microbatches=6))
    """
    forward = _work(table, table.forward_stage, table.forward_microbatch, "forward")
    backward = _work(table, table.backward_stage, table.backward_microbatch, "backward")
    _check_complete(table, forward, backward)
    _check_order(table, forward, backward)
    _check_slots(table)
    _check_idle(table)


def idle_ticks(schedule: Schedule, *, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> int:
    """Ticks in which a group has no backward: the bubble, in ticks.

    1F1B and interleaving wait `2 (pp - 1)` and `(V + 1) pp - 2` ticks whatever the number of micro-batches, if it is a
    multiple of `pp`; a last group of fewer leaves its places empty in all chunks but one.
    """
    if schedule is Schedule.NONE:
        return 0
    if schedule is Schedule.GPIPE:
        return num_microbatches + 2 * (num_stages - 1)
    missing = -num_microbatches % num_stages
    return (num_chunks + 1) * num_stages - 2 + missing * (num_chunks - 1)


def _work(table: ScheduleTable, stages: np.ndarray, microbatches: np.ndarray, way: str) -> _Work:
    done: _Work = {}
    for tick, group, stage, microbatch in _entries(stages, microbatches):
        where = f"Tick {tick}, group {group}: the {way} of stage {stage} and micro-batch {microbatch}"
        if not 0 <= stage < table.num_virtual_stages or not 0 <= microbatch < table.num_microbatches:
            raise ValueError(f"{where} does not exist.")
        if stage % table.num_stages != group:
            raise ValueError(f"{where} lies on group {stage % table.num_stages}.")
        if (stage, microbatch) in done:
            raise ValueError(f"{where} has run before, in tick {done[stage, microbatch]}.")
        done[stage, microbatch] = tick
    return done


def _entries(stages: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Tick, group, virtual stage and value of every entry that is not idle."""
    if stages.shape != values.shape:
        raise ValueError(f"The arrays differ in shape: {stages.shape} and {values.shape}.")
    if ((stages == IDLE) != (values == IDLE)).any():
        raise ValueError("The arrays differ in where they are idle.")
    for tick, group in np.argwhere(stages != IDLE).tolist():
        yield tick, group, int(stages[tick, group]), int(values[tick, group])


def _check_complete(table: ScheduleTable, forward: _Work, backward: _Work) -> None:
    last = table.num_virtual_stages - 1
    for stage in range(table.num_virtual_stages):
        for microbatch in range(table.num_microbatches):
            name = f"stage {stage} and micro-batch {microbatch}"
            if (stage, microbatch) not in backward:
                raise ValueError(f"The backward of {name} never runs.")
            alone = table.recomputes and stage == last
            if alone and (stage, microbatch) in forward:
                raise ValueError(f"The forward of {name} runs, though its backward repeats it in the same tick.")
            if not alone and (stage, microbatch) not in forward:
                raise ValueError(f"The forward of {name} never runs.")


def _check_order(table: ScheduleTable, forward: _Work, backward: _Work) -> None:
    last = table.num_virtual_stages - 1
    for (stage, microbatch), tick in backward.items():
        begun = forward.get((stage, microbatch), tick)
        name = f"stage {stage} and micro-batch {microbatch}"
        if begun > tick:
            raise ValueError(f"The backward of {name} runs in tick {tick}, before its forward in tick {begun}.")
        if stage > 0 and begun != forward[stage - 1, microbatch] + 1:
            arrives = forward[stage - 1, microbatch] + 1
            raise ValueError(f"The input of {name} arrives in tick {arrives} but is used in tick {begun}.")
        if stage < last and tick != backward[stage + 1, microbatch] + 1:
            arrives = backward[stage + 1, microbatch] + 1
            raise ValueError(f"The gradient of {name} arrives in tick {arrives} but is used in tick {tick}.")


def _check_slots(table: ScheduleTable) -> None:
    """Replays what lies in the slots, and counts."""
    held: list[dict[int, tuple[int, int]]] = [{} for _ in range(table.num_stages)]
    most_held = [0] * table.num_stages
    most_in_flight: Counter[int] = Counter()
    for tick in range(table.num_ticks):
        for group, holds in enumerate(held):
            for slot, item in _begun(table, tick, group):
                if slot in holds:
                    raise ValueError(f"Tick {tick}, group {group}: slot {slot} still holds {holds[slot]}.")
                holds[slot] = item
            most_held[group] = max(most_held[group], len(holds))
            for stage, count in Counter(stage for stage, _ in holds.values()).items():
                most_in_flight[stage] = max(most_in_flight[stage], count)
            _release(table, tick, group, holds)
    if slots(table) != tuple(most_held):
        raise ValueError(f"The groups have {slots(table)} slots but hold at most {tuple(most_held)} inputs at once.")
    counted = tuple(most_in_flight[stage] for stage in range(table.num_virtual_stages))
    promised = in_flight(
        table.schedule,
        num_stages=table.num_stages,
        num_microbatches=table.num_microbatches,
        num_chunks=table.num_chunks,
    )
    if counted != promised:
        raise ValueError(f"The stages hold {counted} micro-batches at once, not {promised}.")


def _begun(table: ScheduleTable, tick: int, group: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Slots taken at the start of a tick, each with its (virtual stage, micro-batch)."""
    stage, microbatch = int(table.forward_stage[tick, group]), int(table.forward_microbatch[tick, group])
    arrival = int(table.arrival_slot[tick, group])
    if stage != IDLE:
        slot = int(table.forward_slot[tick, group])
        if arrival != (slot if stage else IDLE):
            raise ValueError(f"Tick {tick}, group {group}: what arrives goes to slot {arrival}, not {slot}.")
        yield slot, (stage, microbatch)
    stage, microbatch = int(table.backward_stage[tick, group]), int(table.backward_microbatch[tick, group])
    if table.recomputes and stage == table.num_virtual_stages - 1:
        yield arrival, (stage, microbatch)


def _release(table: ScheduleTable, tick: int, group: int, holds: dict[int, tuple[int, int]]) -> None:
    item = (int(table.backward_stage[tick, group]), int(table.backward_microbatch[tick, group]))
    if item[0] == IDLE:
        return
    slot = int(table.backward_slot[tick, group])
    if holds.pop(slot, None) != item:
        raise ValueError(f"Tick {tick}, group {group}: slot {slot} does not hold {item}.")


def _check_idle(table: ScheduleTable) -> None:
    promised = idle_ticks(
        table.schedule,
        num_stages=table.num_stages,
        num_microbatches=table.num_microbatches,
        num_chunks=table.num_chunks,
    )
    for group, idle in enumerate((table.backward_stage == IDLE).sum(axis=0).tolist()):
        if idle != promised:
            raise ValueError(f"Group {group} has no backward in {idle} ticks, not in {promised}.")
