"""The partitioner's planning half: one pass over a program that lays out every value and places every collective.

A strategy is nothing but which factors each logical axis may shard. Per operation and axis the cheapest admissible
factor of its sharding rule is taken: bytes moved to bring the operands there, and bytes a pending sum will cost.
Megatron's tensor and sequence parallelism, Ulysses, vocabulary-, context- and expert-parallel layers fall out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain

from galvatron_jax.partition.counts import NONE, Amount, Counts, Tally, all_sent
from galvatron_jax.partition.instructions import Convert, Decision, Instruction, Loop, Version
from galvatron_jax.partition.layout import NOWHERE, PENDING, Layout, Role, Step
from galvatron_jax.partition.lookups import Home
from galvatron_jax.partition.operations import Draft, plan_operation
from galvatron_jax.partition.outline import Forms
from galvatron_jax.partition.setting import DearChoice, DearRows, Held, Keep, Outcome, Setting, Work
from galvatron_jax.partition.static import StaticFactor, StaticOp, StaticProgram


class Pass:
    """One pass of the planner over some operations of a program."""

    def __init__(self, setting: Setting) -> None:
        """A pass that shares what is planned in a setting with others."""
        self.setting = setting
        self.held: dict[int, Held] = setting.initial()
        self.homes: Mapping[int, Home] = {}
        """By operation, where gradients are to end up that it may make there."""
        self.outcomes: list[Outcome] = []
        """What was planned so far."""

    def fork(self) -> Pass:
        """A pass that goes on from here by itself."""
        other = Pass(self.setting)
        other.held, other.homes, other.outcomes = dict(self.held), self.homes, list(self.outcomes)
        return other

    @property
    def length(self) -> int:
        """How much was planned so far."""
        return len(self.outcomes)

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """All so far."""
        return tuple(chain.from_iterable([outcome.instructions for outcome in self.outcomes]))

    @property
    def tallies(self) -> tuple[Tally, ...]:
        """Per instruction, what it counts for."""
        return tuple(chain.from_iterable([outcome.tallies for outcome in self.outcomes]))

    @property
    def forms(self) -> Forms:
        """The instructions without sizes."""
        return tuple([outcome.form for outcome in self.outcomes if outcome.form])

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Why operations are sharded as they are, where that costs something."""
        return tuple(chain.from_iterable([outcome.decisions for outcome in self.outcomes]))

    @property
    def dear(self) -> tuple[DearChoice | DearRows, ...]:
        """What was chosen at a cost, each once."""
        found = chain.from_iterable([outcome.dear for outcome in self.outcomes if outcome.dear])
        return tuple({id(choice): choice for choice in found}.values())

    @property
    def work(self) -> tuple[Work, ...]:
        """Operations with FLOPs, and the axes that share out those of each."""
        return tuple(chain.from_iterable([outcome.work for outcome in self.outcomes]))

    @property
    def flops(self) -> Amount:
        """Local FLOPs of one device."""
        stays = grows = 0.0
        for flops in [outcome.flops for outcome in self.outcomes if outcome.flops is not NONE]:
            stays += flops[0]
            grows += flops[1]
        return stays, grows

    def counts(
        self,
        operations: int,
        handed_on: AbstractSet[Version] = frozenset(),
        given: Sequence[Tally] = (),
        at_once: AbstractSet[Version] = frozenset(),
    ) -> Counts:
        """What the pass counts for so far.

        Args:
            operations: how many of the program's were applied.
            handed_on: versions that stay until its end.
            given: what is there before it and lives in memory beside what it makes.
            at_once: versions of fused work that is done with the product it reads.
        """
        tallies = self.tallies
        moved, peaks, read = self.setting.outlines.traffic(tallies, self.forms, handed_on, given, at_once)
        return Counts(all_sent(tallies), self.flops, moved, peaks, operations, read)

    def grows(self, value: int) -> bool:
        """Whether a value's size is proportional to the micro-batch."""
        return self.setting.grows(value, self.held[value].lazy)

    def hold(self, value: int, layout: Layout, *, zero: bool = False) -> Version:
        """Takes an input in the layout in which it is given."""
        self.held[value] = self.setting.state((layout,), zero=zero)
        return value, 0

    def convert(self, value: int, target: Layout) -> Version:
        """A version of the value in the target layout, made from the nearest one if there is none yet."""
        outcome, version = self.setting.convert(value, self.held[value], target)
        self._take(outcome)
        return value, version

    def relabel(self, value: int, layout: Layout) -> Version:
        """Sees a value's first version as another layout of the same local array."""
        outcome, version = self.setting.relabel(value, self.held[value], layout)
        self._take(outcome)
        return value, version

    def local_bytes(self, value: int, version: int = 0) -> float:
        """Local bytes of a version."""
        return self.setting.local_bytes(value, self.held[value], version)

    # ------------------------------------------------------------------------------------------ operations

    def run(self, operations: Iterable[StaticOp]) -> None:
        """Plans operations in order; what the setting knows is not planned again."""
        held, outcomes, done, homes = self.held, self.setting.outcomes, self.outcomes, self.homes
        for op in operations:
            states: tuple = tuple([held[value] for value in op.operands])
            rows = self._scatter_rows(op, states) if op.scatter_rows or op.scatter_alike else {}
            home = homes.get(op.index) if homes else None
            key = (*states, *rows.items(), home) if rows or home is not None else states
            outcome = outcomes[op.index].get(key)
            if outcome is None:
                outcome = outcomes[op.index][key] = self._plan(op, states, rows, home)
            held.update(outcome.held)
            done.append(outcome)

    def _take(self, outcome: Outcome) -> None:
        self.held.update(outcome.held)
        self.outcomes.append(outcome)

    def _plan(
        self,
        op: StaticOp,
        states: tuple[Held, ...],
        rows: dict[int, tuple[StaticFactor, ...]],
        home: Home | None,
    ) -> Outcome:
        if op.loop is not None and op.body is not None:
            planned = _LoopPlan(self.setting, op, op.loop, op.body, states).plan()
            if planned is not None:
                return planned
        return plan_operation(self.setting, op, states, rows, home)

    def _scatter_rows(self, op: StaticOp, states: Sequence[Held]) -> dict[int, tuple[StaticFactor, ...]]:
        """Factors of what a scatter into zeros makes (an embedding's gradient, the logits').

        Where an axis shards them elsewhere, each device makes its own, of indices and summands that it has whole: its
        rows, or its part of dims that the scatter treats alike if the axis shards no rows at all.
        """
        if not states[0].zero:
            return {}
        found = {}
        for axis in range(len(self.setting.axes)):
            if all(state.layouts[0][axis] == NOWHERE for state in states):
                rows = tuple(f for f in op.scatter_rows if self._shards(axis, f.factor))
                if not rows and not any(self._shards(axis, factor) for factor in self.setting.program.row_factors):
                    rows = tuple(f for f in op.scatter_alike if self._shards(axis, f.factor))
                if rows:
                    found[axis] = rows
        return found

    def _shards(self, axis: int, factor: int) -> bool:
        """Whether the axis may shard a factor, and does in some value."""
        positions = self.setting.program.positions
        return factor in self.setting.allowed[axis] and any(
            layout[axis] >= 0 and positions[value][layout[axis]] == factor
            for value, state in self.held.items()
            for layout in state.layouts
        )


class _LoopPlan:
    """A scan: its body is planned like any program, once carried values go round in the layout they came in.

    Sums into a carry that starts at zero (weight gradients over time) stay pending until after the loop.
    """

    def __init__(
        self, setting: Setting, op: StaticOp, loop: tuple[int, int, int], program: StaticProgram, states: tuple
    ) -> None:
        self.setting, self.op, self.program = setting, op, program
        self.consts, self.carried, self.trips = loop
        self.draft = Draft(setting, op, states)
        entries = [self._entry(n) for n in range(len(states))]
        self.layouts = [layout for layout, _ in entries]
        self.skipped = [skipped for _, skipped in entries]

    def plan(self) -> Outcome | None:
        """None where the body cannot be planned on its own: then the loop is one unknown operation."""
        inner, outer = self.program.positions, self.setting.program.positions
        if any(
            len(inner[i]) != len(outer[v]) - skipped
            for i, v, skipped in zip(self.program.program.inputs, self.op.operands, self.skipped, strict=True)
        ):
            return None
        body = self._body()
        if body is not None:
            self._emit(body)
            return self.draft.outcome()
        return None

    def _entry(self, operand: int) -> tuple[Layout, int]:
        """An operand's layout as the body sees it, and how many positions the leading dim takes."""
        dims = self.setting.program.dim_of[self.op.operands[operand]]
        skipped = sum(d == 0 for d in dims) if operand >= self.consts + self.carried else 0
        layout = [p - skipped if p >= skipped else NOWHERE for p in self.draft.states[operand].layouts[0]]
        for axis, known in enumerate(self.setting.axes):
            if known.role is Role.STORAGE:
                layout[axis] = NOWHERE
        return tuple(layout), skipped

    def _body(self) -> Pass | None:
        """The body planned in layouts that go round; these replace `layouts`."""
        stop = self.consts + self.carried
        zero = [state.zero for state in self.draft.states]
        for attempt in range(6):
            body = Pass(self.setting.body(self.op))
            for n, (value, layout) in enumerate(zip(self.program.program.inputs, self.layouts, strict=True)):
                # At first a carry that starts at zero counts as zero, to see whether sums into it stay pending.
                body.hold(value, layout, zero=zero[n] and attempt == 0)
            body.run(self.program.operations)
            self.draft.dear += body.dear
            found = [body.held[v].layouts[0] for v in self.program.program.outputs[: self.carried]]
            entered = self.layouts[self.consts : stop]
            joined = [_join(*each) for each in zip(entered, found, zero[self.consts : stop], strict=True)]
            if attempt and joined == entered:
                return body
            self.layouts[self.consts : stop] = joined
        return None

    def _emit(self, body: Pass) -> None:
        setting, draft, op = self.setting, self.draft, self.op
        wanted = [
            tuple(p + s if p >= 0 else p for p in layout) for layout, s in zip(self.layouts, self.skipped, strict=True)
        ]
        # A pending carry starts from zeros, which are their own summands: no conversion.
        asked = [tuple(NOWHERE if p == PENDING else p for p in layout) for layout in wanted]
        operands = tuple(draft.convert(v, layout) for v, layout in zip(op.operands, asked, strict=True))
        handed = []
        for n, value in enumerate(self.program.program.outputs):
            target = self.layouts[self.consts + n] if n < self.carried else body.held[value].layouts[0]
            handed.append(body.convert(value, target))
        results = tuple(self._result(n, *inner, body) for n, inner in enumerate(handed))
        if setting.keep is Keep.INSTRUCTIONS:
            draft.instructions.append(self._loop(operands, asked, results, handed, body))
        stays, grows = body.flops
        draft.flops = stays * self.trips, grows * self.trips
        if setting.keep is not Keep.STEPS:
            draft.tallies.append(self._tally(operands, results, body))

    def _result(self, number: int, inner: int, version: int, body: Pass) -> Version:
        """A result as the body hands it out, behind the leading dim if it is stacked."""
        value, layout = self.op.results[number], body.held[inner].layouts[version]
        lead = sum(d == 0 for d in self.setting.program.dim_of[value]) if number >= self.carried else 0
        return self.draft.hold(value, tuple(p + lead if p >= 0 else p for p in layout))

    def _loop(
        self,
        operands: tuple[Version, ...],
        asked: Sequence[Layout],
        results: tuple[Version, ...],
        handed: Sequence[Version],
        body: Pass,
    ) -> Loop:
        held, shape = self.draft.held, self.setting.local_shape
        return Loop(
            operation=self.op.index,
            operands=operands,
            results=results,
            materialise=tuple(
                shape(v, layout, frozenset()) if held[v].lazy else None
                for (v, _), layout in zip(operands, asked, strict=True)
            ),
            shapes=tuple(shape(v, held[v].layouts[0], frozenset()) for v, _ in results),
            body=body.instructions,
            outputs=tuple(handed),
            output_shapes=tuple(body.setting.local_shape(v, body.held[v].layouts[n], frozenset()) for v, n in handed),
            trips=self.trips,
        )

    def _tally(self, operands: tuple[Version, ...], results: tuple[Version, ...], body: Pass) -> Tally:
        tallies = body.tallies
        (stays, grows), peaks, _ = self.setting.outlines.traffic(tallies, body.forms)
        fused = self.op.elementwise or self.op.free
        moved = [stays * self.trips, grows * self.trips]
        if not fused:
            for version in operands:
                moved[self.draft.grows(version)] += self.draft.bytes_of(version)
        return Tally(
            read=operands,
            made=self.draft.made(results),
            fused=fused,
            moved=(moved[0], moved[1]),
            inner_peaks=peaks,
            sent=all_sent(tallies) * self.trips,
        )


def _join(entry: Layout, found: Layout, zero: bool) -> Layout:
    """A carried value's layout for the next try: as it came in, or, where that was whole, as the body left it."""
    joined = []
    for now, then in zip(entry, found, strict=True):
        if then == PENDING:
            joined.append(PENDING if zero else NOWHERE if now == PENDING else now)
        else:
            joined.append(then if now == NOWHERE and then >= 0 else NOWHERE if now == PENDING else now)
    return tuple(joined)


def steps_of(instructions: Iterable[Instruction]) -> Iterable[tuple[int, Step]]:
    """All steps of a program's own conversions with the value they move; loops' bodies are left out."""
    for instruction in instructions:
        if isinstance(instruction, Convert):
            for step in instruction.steps:
                yield instruction.value, step
