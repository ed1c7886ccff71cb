"""Pipeline schedules as data: who works on which micro-batch in which tick, and how long that takes.

One table serves the runtime (which scans its rows), the cost model (which adds up its ticks) and the timeline picture.
Layers run in order of *virtual stages*; virtual stage `k` lies on device group `k % num_stages`. In each tick every
group does at most one forward, then at most one backward; then activations move to the next virtual stage, gradients to
the one before. What arrives at the start of a tick is used in that very tick, so only a stage's input (and, where the
schedule stashes, its residuals) waits in a buffer: from its forward to its backward.

Sources: GPipe (Huang et al., 2019); 1F1B (Narayanan et al., PipeDream-Flush, 2021); interleaving (Narayanan et al.,
Megatron-LM, 2021). Here in lockstep: stage `i` of 1F1B holds `2 (pp - 1 - i) + 1` micro-batches rather than `pp - i`,
which lets every group do a forward and a backward in each tick although they exchange values after every tick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from galvatron_jax.errors import InputError
from galvatron_jax.spec.plan import Schedule

IDLE = -1
"""Entry of a table where a group has nothing to do."""

_RECOMPUTING = frozenset({Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED})

_BLOCK = 1 << 20
"""Numbers per temporary when many candidates are priced at once: 8 MiB."""


WAYS = ("forward", "backward")
"""What a tick may hold, in order."""


@dataclass(frozen=True)
class Phase:
    """Ticks that run one after another in one loop."""

    ways: tuple[str, ...]
    """Which of `WAYS` they may hold. Values move on along these alone."""
    start: int
    """First tick."""
    stop: int
    """The one after the last."""

    @property
    def length(self) -> int:
        """Ticks."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class ScheduleTable:
    """A schedule, tick by tick. The arrays are read-only and shared.

    With two groups and three micro-batches, 1F1B that stashes has five ticks: group 1 does forward and backward of
    micro-batches 0, 1, 2 in ticks 1, 2, 3; group 0 does their forwards in ticks 0, 1, 2, their backwards in 2, 3, 4.

    Example:
        >>> table = make_table(Schedule.ONE_F_ONE_B_STASH, num_stages=2, num_microbatches=3)
        >>> table.forward_microbatch.T.tolist()
        [[0, 1, 2, -1, -1], [-1, 0, 1, 2, -1]]
        >>> table.backward_microbatch.T.tolist()
        [[-1, -1, 0, 1, 2], [-1, 0, 1, 2, -1]]
    """

    schedule: Schedule
    num_stages: int
    """Groups of devices."""
    num_chunks: int
    """Virtual stages on each."""
    num_microbatches: int
    forward_stage: np.ndarray
    """Virtual stage whose forward runs; -1 where none does, as in all of these. int32[ticks, groups]"""
    forward_microbatch: np.ndarray
    """int32[ticks, groups]"""
    forward_slot: np.ndarray
    """Where, among its group's slots, the stage's input and residuals stay until backward. int32[ticks, groups]"""
    backward_stage: np.ndarray
    """Virtual stage whose backward runs, after the forward of the tick. int32[ticks, groups]"""
    backward_microbatch: np.ndarray
    """int32[ticks, groups]"""
    backward_slot: np.ndarray
    """Where the stage's input and residuals lie; free again in the next tick. int32[ticks, groups]"""

    @property
    def num_ticks(self) -> int:
        """Rows of the table."""
        return len(self.forward_stage)

    @property
    def num_virtual_stages(self) -> int:
        """Virtual stages over all groups."""
        return self.num_stages * self.num_chunks

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All ticks, in order; forwards by themselves where all of them come before the first backward.

        Example:
            >>> table = make_table(Schedule.GPIPE, num_stages=2, num_microbatches=3)
            >>> [(phase.ways, phase.start, phase.stop) for phase in table.phases]
            [(('forward',), 0, 4), (('backward',), 4, 8)]
        """
        first = int((self.backward_stage != IDLE).any(axis=1).argmax())
        if (self.forward_stage[first:] != IDLE).any():
            return (Phase(WAYS, 0, self.num_ticks),)
        return (Phase(WAYS[:1], 0, first), Phase(WAYS[1:], first, self.num_ticks))

    def ticks(self, way: str) -> int:
        """Ticks of the phases in which there may be a `forward`, or a `backward`."""
        return sum(phase.length for phase in self.phases if way in phase.ways)

    @property
    def recomputes(self) -> bool:
        """Whether a backward begins with the forward, from the stage's input.

        The last virtual stage then has no forward of its own: its backward, in the same tick, would repeat it.
        """
        return recomputes(self.schedule)

    @cached_property
    def arrival_slot(self) -> np.ndarray:
        """Slot that takes the activation which comes in at the start of a tick; -1 if none does. int32[ticks, groups].

        The first virtual stage reads its input from the batch.
        """
        arrives = self.forward_stage > 0
        slot = np.where(arrives, self.forward_slot, IDLE)
        if self.recomputes:
            slot = np.where(self.backward_stage == self.num_virtual_stages - 1, self.backward_slot, slot)
        return _frozen(slot.astype(np.int32))


@dataclass(frozen=True, eq=False)
class TickKinds:
    """The ticks of a schedule, equal ones folded: all that a makespan needs. The arrays are read-only and shared."""

    num_stages: int
    """Groups of devices."""
    count: np.ndarray
    """Ticks of each kind. int64[kinds]"""
    forward: np.ndarray
    """Whether a virtual stage does a forward. bool[kinds, virtual stages]"""
    backward: np.ndarray
    """Whether a virtual stage does a backward. bool[kinds, virtual stages]"""

    @cached_property
    def forward_stage(self) -> np.ndarray:
        """Virtual stage whose forward a group runs; the number of virtual stages where idle. int64[kinds, groups]."""
        return _stage_at_work(self.forward, self.num_stages)

    @cached_property
    def backward_stage(self) -> np.ndarray:
        """Virtual stage whose backward a group runs; the number of virtual stages where idle. int64[kinds, groups]."""
        return _stage_at_work(self.backward, self.num_stages)


@dataclass(frozen=True)
class Task:
    """One forward or backward of a micro-batch, with its time in the step."""

    tick: int
    group: int
    """Of devices."""
    stage: int
    """Virtual stage."""
    microbatch: int
    backward: bool
    start_s: float
    end_s: float


@dataclass(frozen=True, eq=False)
class Timeline:
    """A table played through with given times."""

    table: ScheduleTable
    tasks: tuple[Task, ...]
    """In order of ticks, then groups, forward before backward."""
    total_s: float


def recomputes(schedule: Schedule) -> bool:
    """Whether backward begins with the forward of its stage, from the stage's kept input."""
    return schedule in _RECOMPUTING


def make_table(schedule: Schedule, *, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> ScheduleTable:
    """The table of a schedule.

    Args:
        schedule: which one.
        num_stages: groups of devices.
        num_microbatches: of one step.
        num_chunks: virtual stages per group.

    Raises:
        InputError: the schedule does not exist for these numbers.

    Example:
        >>> table = make_table(Schedule.INTERLEAVED, num_stages=2, num_microbatches=2, num_chunks=2)
        >>> table.forward_stage.T.tolist()
        [[0, 0, 2, 2, -1, -1, -1, -1], [-1, 1, 1, -1, -1, -1, -1, -1]]
        >>> table.backward_stage.T.tolist()
        [[-1, -1, -1, -1, 2, 2, 0, 0], [-1, -1, -1, 3, 3, 1, 1, -1]]
    """
    _check_numbers(schedule, num_stages, num_microbatches, num_chunks)
    return _table(schedule, num_stages, num_microbatches, num_chunks)


def slots(table: ScheduleTable) -> tuple[int, ...]:
    """Slots that each group of devices needs, over all its virtual stages.

    Example:
        >>> slots(make_table(Schedule.ONE_F_ONE_B, num_stages=4, num_microbatches=8))
        (7, 5, 3, 1)
    """
    return tuple(int(most) + 1 for most in table.backward_slot.max(axis=0))


def in_flight(schedule: Schedule, *, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> tuple[int, ...]:
    """Per virtual stage, the most micro-batches whose input it holds at once.

    Args:
        schedule: which one.
        num_stages: groups of devices.
        num_microbatches: of one step.
        num_chunks: virtual stages per group.

    Raises:
        InputError: the schedule does not exist for these numbers.

    Example:
        >>> in_flight(Schedule.INTERLEAVED, num_stages=2, num_microbatches=8, num_chunks=2)
        (4, 3, 2, 1)
    """
    _check_numbers(schedule, num_stages, num_microbatches, num_chunks)
    if schedule is Schedule.NONE:
        return (1,)
    if schedule is Schedule.GPIPE:
        return (num_microbatches,) * num_stages
    period = num_stages * num_chunks
    held = []
    for stage in range(period):
        # An input stays for `2 (period - 1 - stage) + 1` ticks; inputs come in bursts of `num_stages` per period.
        bursts, rest = divmod(2 * (period - 1 - stage) + 1, period)
        held.append(min(num_microbatches, bursts * num_stages + min(num_stages, rest)))
    return tuple(held)


def tick_kinds(schedule: Schedule, *, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> TickKinds:
    """The ticks of a schedule with equal ones folded, in order of their first one.

    As many kinds whatever the number of micro-batches: the middle of a schedule repeats.

    Args:
        schedule: which one.
        num_stages: groups of devices.
        num_microbatches: of one step.
        num_chunks: virtual stages per group.

    Raises:
        InputError: the schedule does not exist for these numbers.

    Example:
        >>> kinds = tick_kinds(Schedule.ONE_F_ONE_B_STASH, num_stages=2, num_microbatches=100)
        >>> kinds.count.tolist()
        [1, 1, 98, 1, 1]
    """
    _check_numbers(schedule, num_stages, num_microbatches, num_chunks)
    return _kinds(schedule, num_stages, num_microbatches, num_chunks)


def makespan(
    kinds: TickKinds, forward_s: np.ndarray | Sequence[float], backward_s: np.ndarray | Sequence[float]
) -> float | np.ndarray:
    """Seconds of a step's schedule: each tick lasts as long as its slowest group.

    Args:
        kinds: the schedule's ticks.
        forward_s: seconds of a micro-batch's forward, sending its result on included. float[..., virtual stages]
        backward_s: seconds of its backward, sending the gradient back (and what is recomputed) included.
            float[..., virtual stages]

    Returns:
        Seconds: a float, or float64[...] where the times have leading dims.

    Raises:
        InputError: not one time per virtual stage.

    Example:
        >>> kinds = tick_kinds(Schedule.ONE_F_ONE_B_STASH, num_stages=2, num_microbatches=3)
        >>> makespan(kinds, [1.0, 1.0], [2.0, 2.0])  # (3 + 2 - 1) × (1 + 2)
        12.0
    """
    num_virtual = kinds.forward.shape[1]
    forward, backward = np.broadcast_arrays(
        _times(forward_s, num_virtual, "forward_s"), _times(backward_s, num_virtual, "backward_s")
    )
    lead = forward.shape[:-1]
    # A last column of zeros stands for idleness.
    forward, backward = (np.pad(times.reshape(-1, num_virtual), ((0, 0), (0, 1))) for times in (forward, backward))
    rows = max(1, _BLOCK // max(1, kinds.forward_stage.size))
    seconds = np.empty(len(forward))
    for start in range(0, len(forward), rows):
        block = slice(start, start + rows)
        work = forward[block].take(kinds.forward_stage, axis=1) + backward[block].take(kinds.backward_stage, axis=1)
        # In this layout, and with no matrix product, rounding is the same however many candidates are priced together.
        seconds[block] = (work.max(axis=-1) * kinds.count).sum(axis=-1)
    return seconds.reshape(lead) if lead else float(seconds[0])


def simulate(
    table: ScheduleTable, forward_s: np.ndarray | Sequence[float], backward_s: np.ndarray | Sequence[float]
) -> Timeline:
    """Plays a table through: a tick ends when its slowest group has done its forward and backward.

    Args:
        table: the schedule.
        forward_s: as for `makespan`. float[virtual stages]
        backward_s: as for `makespan`. float[virtual stages]

    Raises:
        InputError: not one time per virtual stage.
    """
    forward = _times(forward_s, table.num_virtual_stages, "forward_s").tolist()
    backward = _times(backward_s, table.num_virtual_stages, "backward_s").tolist()
    tasks = []
    tick_start_s = 0.0
    for tick in range(table.num_ticks):
        tick_end_s = tick_start_s
        for group in range(table.num_stages):
            clock_s = tick_start_s
            for is_backward, seconds, stages, microbatches in (
                (False, forward, table.forward_stage, table.forward_microbatch),
                (True, backward, table.backward_stage, table.backward_microbatch),
            ):
                stage = int(stages[tick, group])
                if stage == IDLE:
                    continue
                end_s = clock_s + seconds[stage]
                microbatch = int(microbatches[tick, group])
                tasks.append(Task(tick, group, stage, microbatch, is_backward, clock_s, end_s))
                clock_s = end_s
            tick_end_s = max(tick_end_s, clock_s)
        tick_start_s = tick_end_s
    return Timeline(table=table, tasks=tuple(tasks), total_s=tick_start_s)


def bubble_share(timeline: Timeline) -> float:
    """Share of the groups' time in which they wait, from 0 to 1.

    Example:
        >>> table = make_table(Schedule.ONE_F_ONE_B_STASH, num_stages=2, num_microbatches=3)
        >>> bubble_share(simulate(table, [1.0, 1.0], [2.0, 2.0]))  # (pp - 1) / (m + pp - 1)
        0.25
    """
    available_s = timeline.table.num_stages * timeline.total_s
    if not available_s:
        return 0.0
    busy_s = sum(task.end_s - task.start_s for task in timeline.tasks)
    return max(0.0, 1.0 - busy_s / available_s)  # Rounding alone could make it negative.


def _check_numbers(schedule: Schedule, num_stages: int, num_microbatches: int, num_chunks: int) -> None:
    for name, value in (
        ("num_stages", num_stages),
        ("num_microbatches", num_microbatches),
        ("num_chunks", num_chunks),
    ):
        if value < 1:
            raise InputError(f"{name} is {value}, but a schedule needs at least 1. Give a positive number.")
    if schedule is Schedule.NONE and num_stages > 1:
        others = ", ".join(other for other in Schedule if other is not Schedule.NONE)
        raise InputError(
            f"Schedule 'none' runs a single stage, but num_stages is {num_stages}. "
            f"Choose one of {others}, or num_stages=1."
        )
    if schedule is not Schedule.NONE and num_stages == 1:
        raise InputError(
            f"Schedule '{schedule}' is for several stages, but num_stages is 1. "
            "Choose schedule 'none', or at least 2 stages."
        )
    if schedule is Schedule.INTERLEAVED and num_chunks == 1:
        raise InputError(
            "Schedule 'interleaved' needs at least 2 chunks per group of devices, but num_chunks is 1. "
            "Choose schedule '1f1b', or num_chunks=2 or more."
        )
    if schedule is not Schedule.INTERLEAVED and num_chunks > 1:
        raise InputError(
            f"Schedule '{schedule}' has one chunk per group of devices, but num_chunks is {num_chunks}. "
            "Choose schedule 'interleaved', or num_chunks=1."
        )


def _ticks(
    schedule: Schedule, num_stages: int, num_microbatches: int, num_chunks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tick of every forward and of every backward, each int64[virtual stages, micro-batches]."""
    period = num_stages * num_chunks
    stage = np.arange(period)[:, None]
    microbatch = np.arange(num_microbatches)[None, :]
    if schedule is Schedule.GPIPE:
        return stage + microbatch, num_microbatches + 2 * (num_stages - 1) - stage + microbatch
    # A group of devices takes `num_stages` micro-batches through its first chunk, then through its next one; forwards
    # and backwards are two dense streams of such items, and each stage lags one tick behind its neighbour.
    item = microbatch // num_stages * period + microbatch % num_stages
    return item + stage, item + 2 * (period - 1) - stage


@lru_cache(maxsize=64)
def _table(schedule: Schedule, num_stages: int, num_microbatches: int, num_chunks: int) -> ScheduleTable:
    forward, backward = _ticks(schedule, num_stages, num_microbatches, num_chunks)
    num_virtual = num_stages * num_chunks
    slot = _assign_slots(forward, backward, num_stages)
    stage, microbatch = np.indices(forward.shape)
    group = stage % num_stages
    kept = num_virtual - 1 if recomputes(schedule) else num_virtual

    def fill(ticks: np.ndarray, values: np.ndarray, stages: int) -> np.ndarray:
        entries = np.full((int(backward.max()) + 1, num_stages), IDLE, np.int32)
        entries[ticks[:stages], group[:stages]] = values[:stages]
        return _frozen(entries)

    return ScheduleTable(
        schedule=schedule,
        num_stages=num_stages,
        num_chunks=num_chunks,
        num_microbatches=num_microbatches,
        forward_stage=fill(forward, stage, kept),
        forward_microbatch=fill(forward, microbatch, kept),
        forward_slot=fill(forward, slot, kept),
        backward_stage=fill(backward, stage, num_virtual),
        backward_microbatch=fill(backward, microbatch, num_virtual),
        backward_slot=fill(backward, slot, num_virtual),
    )


def _assign_slots(first: np.ndarray, last: np.ndarray, num_stages: int) -> np.ndarray:
    """Gives every input the lowest slot of its group that is free from its first tick to its last.

    A new slot is opened only when all lower ones are taken, so there are as many as inputs held at once: the fewest.

    Args:
        first: tick of the forward. int64[virtual stages, micro-batches]
        last: tick of the backward; the slot is free in the tick after. int64[virtual stages, micro-batches]
        num_stages: groups of devices.

    Returns:
        int64[virtual stages, micro-batches]
    """
    num_ticks = int(last.max()) + 1
    group = np.broadcast_to(np.arange(len(first))[:, None] % num_stages, first.shape)
    begins, ends = np.full((2, num_ticks, num_stages), IDLE)
    # A group begins at most one forward and ends at most one backward per tick.
    begins[first, group] = np.arange(first.size).reshape(first.shape)
    ends[last, group] = np.arange(first.size).reshape(first.shape)
    begun, ended = np.cumsum(begins != IDLE, axis=0), np.cumsum(ends != IDLE, axis=0)
    most = int((begun - ended + (ends != IDLE)).max())
    free = np.ones((num_stages, most), bool)
    slot = np.empty(first.size, np.int64)
    for begin, end in zip(begins, ends, strict=True):
        groups = np.flatnonzero(begin != IDLE)
        lowest = free[groups].argmax(axis=1)
        slot[begin[groups]] = lowest
        free[groups, lowest] = False
        groups = np.flatnonzero(end != IDLE)
        free[groups, slot[end[groups]]] = True
    return slot.reshape(first.shape)


@lru_cache(maxsize=4096)
def _kinds(schedule: Schedule, num_stages: int, num_microbatches: int, num_chunks: int) -> TickKinds:
    short = _short_microbatches(schedule, num_stages, num_microbatches)
    forward, backward, kind = _folded(schedule, num_stages, short, num_chunks)
    repeats = np.ones(len(kind), np.int64)
    period = num_stages * num_chunks
    left_out = num_microbatches - short
    if schedule is Schedule.NONE:
        repeats += left_out
    elif schedule is Schedule.GPIPE:
        repeats[[num_stages - 1, short + 2 * (num_stages - 1)]] += left_out
    elif left_out:
        # Here all forwards and backwards have begun and none has ended: the schedule repeats itself every period.
        repeats[2 * period : 3 * period] += left_out // num_stages
    count = np.zeros(len(forward), np.int64)
    np.add.at(count, kind, repeats)
    return TickKinds(num_stages=num_stages, count=_frozen(count), forward=forward, backward=backward)


def _short_microbatches(schedule: Schedule, num_stages: int, num_microbatches: int) -> int:
    """Micro-batches of the shortest run of the schedule that has every kind of tick of the whole."""
    if schedule is Schedule.NONE:
        return 1
    if schedule is Schedule.GPIPE:
        return min(num_microbatches, num_stages)
    full_groups, ragged = divmod(num_microbatches, num_stages)
    return min(full_groups, 3) * num_stages + ragged


@lru_cache(maxsize=256)
def _folded(
    schedule: Schedule, num_stages: int, num_microbatches: int, num_chunks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ticks: their forwards and backwards, bool[kinds, virtual stages], and the kind of every tick."""
    ticks = _ticks(schedule, num_stages, num_microbatches, num_chunks)
    num_virtual = num_stages * num_chunks
    stage = np.arange(num_virtual)[:, None]
    at_work = np.zeros((2, int(ticks[1].max()) + 1, num_virtual), bool)
    at_work[0, ticks[0], stage] = True
    at_work[1, ticks[1], stage] = True
    if recomputes(schedule):
        at_work[0, :, -1] = False
    packed = np.packbits(at_work, axis=-1).swapaxes(0, 1)
    firsts: dict[bytes, int] = {}
    kind = np.array([firsts.setdefault(row.tobytes(), len(firsts)) for row in packed])
    first = np.unique(kind, return_index=True)[1]
    return _frozen(at_work[0, first]), _frozen(at_work[1, first]), _frozen(kind)


def _stage_at_work(at_work: np.ndarray, num_stages: int) -> np.ndarray:
    """Which virtual stage each group works on in each kind of tick, from bool[kinds, virtual stages]."""
    kinds, num_virtual = at_work.shape
    by_chunk = at_work.reshape(kinds, -1, num_stages)
    stage = by_chunk.argmax(axis=1) * num_stages + np.arange(num_stages)
    return _frozen(np.where(by_chunk.any(axis=1), stage, num_virtual))


def _times(seconds: np.ndarray | Sequence[float], num_virtual: int, name: str) -> np.ndarray:
    times = np.asarray(seconds, np.float64)
    if times.ndim == 0 or times.shape[-1] != num_virtual:
        raise InputError(
            f"{name} has shape {times.shape}, but the schedule has {num_virtual} virtual stages. "
            "Give one time per virtual stage, in the order of the layers, as the last dim."
        )
    return times


def _frozen(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values
