"""A compiled step run through on paper: what its kernels and collectives take on a cluster that need not be here.

The compiler fixes the order of all instructions. Kernels run one after another on one stream, collectives on a second;
one that was started runs beside the kernels until something waits for it. Kernels take what a roofline says of their
FLOPs and bytes, collectives what ring formulas say of the links: the same assumptions as those of a search without
measurements, so that what differs from its prediction is the program: kernels, fusions, and what overlaps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from galvatron_jax.cost.compute import PUBLISHED_EFFICIENCY
from galvatron_jax.cost.schedules import WAYS, ScheduleTable
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.verify.hlo import Computation, Instruction, Module, read_module
from galvatron_jax.verify.traffic import Traffic, collective_of, traffic_seconds
from galvatron_jax.verify.work import FREE, Work, instruction_work

LAUNCH_S = 0.9e-6
"""Least time between the starts of two kernels beyond what the first computes: 3.8 µs for kernels of 2.9 µs, launched
one after another (Gray, "Getting started with CUDA graphs", NVIDIA developer blog, 2019)."""

_PEAKS = {"bf16": "bfloat16", "f16": "float16", "f32": "tensorfloat32", "f64": "float64"}
"""Rates of matrix products by element type; JAX lets those of float32 run in tensorfloat32 by default."""


@dataclass(frozen=True)
class Span:
    """What a stretch of the program takes."""

    seconds: float = 0.0
    compute_s: float = 0.0
    """Of kernels."""
    communication_s: float = 0.0
    """Of collectives, whether kernels hide them or not."""
    exposed_s: float = 0.0
    """During which kernels wait for collectives."""
    kernels: int = 0
    """Launched."""
    flops: float = 0.0
    """Of matrix products and convolutions."""
    bytes: int = 0
    """That kernels read and write."""
    traffic: Mapping[Traffic, int] = field(default_factory=Counter)
    """Collectives, with how often each runs."""

    def __add__(self, other: Span) -> Span:
        return Span(
            self.seconds + other.seconds,
            self.compute_s + other.compute_s,
            self.communication_s + other.communication_s,
            self.exposed_s + other.exposed_s,
            self.kernels + other.kernels,
            self.flops + other.flops,
            self.bytes + other.bytes,
            Counter(self.traffic) + Counter(other.traffic),
        )

    def times(self, count: int) -> Span:
        """The same so often."""
        return Span(
            self.seconds * count,
            self.compute_s * count,
            self.communication_s * count,
            self.exposed_s * count,
            self.kernels * count,
            self.flops * count,
            self.bytes * count,
            Counter({one: n * count for one, n in self.traffic.items()}),
        )


def replay(
    text: str, cluster: ClusterSpec, *, table: ScheduleTable | None = None, efficiency: float = PUBLISHED_EFFICIENCY
) -> Span:
    """Runs through one step of one device.

    Of a pipeline, each tick takes as long as the group of devices that works longest in it, since all wait for each
    other before the next; what is reported is those groups', tick by tick.

    Args:
        text: the compiled step, scheduled, as XLA prints it.
        cluster: devices, in the order of the program's partitions node by node, and links.
        table: the schedule of a pipeline, which says in which ticks a device takes its turns.
        efficiency: share of a device's peak that matrix products reach.

    Raises:
        ValueError: when the text is no scheduled module.
    """
    module = read_module(text)
    if not module.scheduled:
        raise ValueError("the module is not scheduled: compile it for a GPU, then take the text of what was compiled.")
    return _Replay(module, cluster, table, efficiency).run()


@dataclass
class _Clock:
    """Time within one computation."""

    now_s: float = 0.0
    link_free_s: float = 0.0
    """When the stream of collectives is through."""
    running: dict[str, float] = field(default_factory=dict)
    """When what was started will be done, by the name of its start."""
    span: Span = field(default_factory=Span)

    def add(self, span: Span) -> None:
        """Kernels, and what they wait for, one after another."""
        self.now_s += span.seconds
        self.span += span

    def wait(self, until_s: float) -> None:
        """Until a collective is done."""
        if until_s > self.now_s:
            self.span = replace(self.span, exposed_s=self.span.exposed_s + until_s - self.now_s)
            self.now_s = until_s

    def communicate(self, name: str, one: Traffic, seconds: float, *, blocking: bool) -> None:
        """Starts a collective."""
        done = max(self.now_s, self.link_free_s) + seconds
        self.link_free_s = done
        self.span += Span(communication_s=seconds, traffic=Counter({one: 1}))
        if blocking:
            self.wait(done)
        else:
            self.running[name] = done

    def finish(self) -> Span:
        """All of it, once nothing is running."""
        self.wait(max(self.running.values(), default=0.0))
        return replace(self.span, seconds=self.now_s)


@dataclass
class _Replay:
    module: Module
    cluster: ClusterSpec
    table: ScheduleTable | None
    efficiency: float
    _known: dict[tuple[str, frozenset[str]], Span] = field(default_factory=dict)
    """By computation, and those of its loops that turn."""

    def run(self) -> Span:
        main = self.module.main
        turns = _turns(main)
        if self.table is None or not turns:
            return self.computation(main, frozenset(turns))
        return _longest(self.computation(main, chosen) for chosen in _shares(turns, self.table.num_stages))

    # -------------------------------------------------------------------------------------------- computations

    def computation(self, computation: Computation, turning: frozenset[str] | None = None) -> Span:
        """One run of a computation.

        Args:
            computation: of the module.
            turning: which of the loops that turn once or not at all do; None for all.
        """
        chosen = frozenset(_turns(computation)) if turning is None else turning
        key = computation.name, chosen
        if key not in self._known:
            clock = _Clock()
            for instruction in computation.instructions:
                self.instruction(clock, computation, instruction, chosen)
            self._known[key] = clock.finish()
        return self._known[key]

    def instruction(
        self, clock: _Clock, computation: Computation, instruction: Instruction, turning: frozenset[str]
    ) -> None:
        """Moves the clock over one instruction."""
        opcode = instruction.opcode
        if opcode in FREE:
            return
        traffic = collective_of(self.module, computation, instruction, per_node=self.cluster.devices_per_node)
        if traffic is not None:
            seconds = traffic_seconds(traffic, self.cluster)
            clock.communicate(instruction.name, traffic, seconds, blocking=_blocks(instruction))
        elif opcode.endswith("-done"):
            clock.wait(max((clock.running.pop(name, 0.0) for name in instruction.operands), default=0.0))
        elif opcode == "while":
            clock.add(self.loop(instruction, turning))
        elif opcode == "conditional":
            clock.add(_longest(self.computation(self.module.computations[name]) for name in instruction.called))
        elif opcode in ("call", "async-start"):
            clock.add(self.computation(self.module.computations[instruction.called[0]]))
        else:
            clock.add(self.kernel(instruction_work(self.module, computation, instruction)))

    def kernel(self, work: Work) -> Span:
        """One kernel, by the roofline (Williams et al., 2009)."""
        device = self.cluster.device
        computing = sum(flops / (self.peak(element) * self.efficiency) for element, flops in work.flops.items())
        moving = work.bytes / device.memory_bandwidth_bytes_per_s
        seconds = LAUNCH_S + max(computing, moving)
        return Span(seconds, seconds, kernels=1, flops=work.total_flops, bytes=work.bytes)

    def peak(self, element: str) -> float:
        """FLOP/s of matrix products; those of a type without a figure run at float32's."""
        peaks = self.cluster.device.peak_flops_per_s
        return peaks.get(_PEAKS.get(element, ""), peaks.get("float32", min(peaks.values())))

    # -------------------------------------------------------------------------------------------- loops

    def loop(self, instruction: Instruction, turning: frozenset[str]) -> Span:
        """All turns of a loop."""
        body = self.module.computations[_body(instruction)]
        if instruction.trips is None:
            return self.computation(body) if instruction.name in turning else Span()
        ticks = self.ticks(body, instruction.trips)
        if ticks is None:
            return self.computation(body).times(instruction.trips)
        total = Span()
        for groups, count in ticks.items():
            total += _longest(self.computation(body, chosen) for chosen in groups).times(count)
        return total

    def ticks(self, body: Computation, trips: int) -> Counter[frozenset[frozenset[str]]] | None:
        """How often each set of turns, a choice for every group of devices, occurs in a pipeline's loop over ticks.

        None where the loop is another one.
        """
        turns, table = _turns(body), self.table
        if table is None or not turns:
            return None
        # Where forwards have a loop of their own, backwards have as many ticks, and as often the same groups at work.
        alike = [p for p in table.phases if (p.length, len(turn_order(table, p.ways))) == (trips, len(turns))]
        if not alike:
            return None
        phase = alike[0]
        working = turn_order(table, phase.ways)
        columns = {"forward": table.forward_stage, "backward": table.backward_stage}
        found: Counter[frozenset[frozenset[str]]] = Counter()
        for tick in range(phase.start, phase.stop):
            found[
                frozenset(
                    frozenset(
                        name
                        for name, (way, stage) in zip(turns, working, strict=True)
                        if columns[way][tick, group] == stage
                    )
                    for group in range(table.num_stages)
                )
            ] += 1
        return found


def turn_order(table: ScheduleTable, ways: Sequence[str] = WAYS) -> list[tuple[str, int]]:
    """The programs that a tick of a pipeline holds, in order: which way, and of which virtual stage.

    Where the schedule recomputes, the last stage's forward is part of its backward.
    """
    count = table.num_virtual_stages
    stages = {"forward": range(count - 1 if table.recomputes else count), "backward": range(count)}
    return [(way, stage) for way in ways for stage in stages[way]]


def _turns(computation: Computation) -> list[str]:
    """The loops that turn once or not at all, as the data says."""
    return [i.name for i in computation.instructions if i.opcode == "while" and i.trips is None]


def _shares(turns: Sequence[str], groups: int) -> Iterable[frozenset[str]]:
    """What each group of devices runs of programs that stand in order of the groups, perhaps several times over."""
    if len(turns) % groups:
        return [frozenset(turns)]
    return [frozenset(turns[group::groups]) for group in range(groups)]


def _longest(spans: Iterable[Span]) -> Span:
    return max(spans, key=lambda span: span.seconds, default=Span())


def _body(instruction: Instruction) -> str:
    text = instruction.attributes
    return text[text.index("body=") + 5 :].split(",")[0].strip().lstrip("%")


def _blocks(instruction: Instruction) -> bool:
    return not instruction.opcode.endswith("-start") or '"is_sync":true' in instruction.attributes
