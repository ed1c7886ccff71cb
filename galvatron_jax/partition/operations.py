"""Planning one operation: a factor per axis, conversions of its operands, layouts of its results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from galvatron_jax.partition.choice import Choice, is_indexed, makes_summands
from galvatron_jax.partition.counts import NONE, Amount, Tally, combined, sent_bytes
from galvatron_jax.partition.instructions import Apply, Decision, IndexShift, Instruction, Version
from galvatron_jax.partition.layout import NOWHERE, PENDING, Layout, names_at
from galvatron_jax.partition.lookups import WHOLE, Home, ShardedRows, sharded_rows
from galvatron_jax.partition.setting import DearChoice, DearRows, Held, Keep, Outcome, Setting, Work
from galvatron_jax.partition.static import StaticFactor, StaticOp

_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims", "transpose"})


Rows = Mapping[int, Sequence[StaticFactor]]


def plan_operation(
    setting: Setting, op: StaticOp, states: tuple[Held, ...], rows: Rows, home: Home | None = None
) -> Outcome:
    """Plans an operation that is no loop.

    Args:
        setting: the program and its axes.
        op: the operation.
        states: of its operands.
        rows: per axis, the factors of what a scatter into zeros makes, where it shards them elsewhere.
        home: for what makes a parameter's gradient, where that is to end up; None where it may stay as it is made.
    """
    draft = Draft(setting, op, states)
    parts = sharded_rows(setting, op, states, home) if op.looks_up or home is not None else None
    if parts is not None:
        return _cheaper(draft, rows, parts, home)
    if op.primitive == "broadcast_in_dim" and draft.broadcast():
        return draft.outcome()
    if op.primitive in _RESHAPES and draft.lazy_reshape():
        return draft.outcome()
    if not rows and all(state.layouts[0] == setting.nowhere for state in states):
        draft.repeat()
    else:
        draft.apply(rows)
    return draft.outcome()


def _cheaper(whole: Draft, rows: Rows, parts: ShardedRows, home: Home | None) -> Outcome:
    """The operation on stored rows where that moves fewer bytes, else on what it needs whole."""
    setting, op, states = whole.setting, whole.op, whole.states
    sharded = Draft(setting, op, states)
    sharded.apply(rows, parts)
    if not parts.settled:
        return sharded.outcome()
    whole.apply(rows)
    choice = DearRows(op, states, (rows, home), _more_bytes(sharded, whole, parts))
    taken = sharded if choice.pays() else whole
    # What is chosen on the way that is not taken decides what that would move.
    taken.dear = [choice, *sharded.dear, *whole.dear]
    return taken.outcome()


def _more_bytes(sharded: Draft, whole: Draft, parts: ShardedRows) -> Amount:
    (stays, grows), (whole_stays, whole_grows) = sent_bytes(sharded.tallies), sent_bytes(whole.tallies)
    return stays - whole_stays - parts.spared_bytes, grows - whole_grows


def asked_again(choice: DearRows, setting: Setting) -> DearRows | None:
    """The same choice in another setting; None where there is none."""
    rows, home = choice.about
    parts = sharded_rows(setting, choice.op, choice.states, home)
    if parts is None or not parts.settled:
        return None
    sharded, whole = (Draft(setting, choice.op, choice.states) for _ in range(2))
    sharded.apply(rows, parts)
    whole.apply(rows)
    return choice._replace(more=_more_bytes(sharded, whole, parts))


class Draft:
    """An operation's outcome in the making."""

    def __init__(self, setting: Setting, op: StaticOp, states: tuple[Held, ...]) -> None:
        self.setting, self.program, self.op, self.states = setting, setting.program, op, states
        self.held: dict[int, Held] = dict(zip(op.operands, states, strict=True))
        self.changed: dict[int, Held] = {}
        self.instructions: list[Instruction] = []
        self.tallies: list[Tally] = []
        self.decisions: list[Decision] = []
        self.dear: list[DearChoice | DearRows] = []
        self.flops: Amount = NONE
        self.work: tuple[Work, ...] = ()
        self.parts = WHOLE

    def outcome(self) -> Outcome:
        """What has changed, and what was recorded."""
        return Outcome(
            self.changed,
            tuple(self.instructions),
            tuple(self.tallies),
            tuple(self.decisions),
            self.flops,
            self.setting.outlines.number(self.tallies),
            self.work,
            tuple(self.dear),
        )

    def convert(self, value: int, target: Layout) -> Version:
        """A version of an operand in a layout."""
        outcome, version = self.setting.convert(value, self.held[value], target)
        self._take(outcome)
        return value, version

    def _take(self, outcome: Outcome) -> None:
        self.held.update(outcome.held)
        self.changed.update(outcome.held)
        self.instructions += outcome.instructions
        self.tallies += outcome.tallies

    def hold(
        self, value: int, layout: Layout, *, lazy: frozenset[int] = frozenset(), zero: bool = False
    ) -> tuple[int, int]:
        """A result in the layout in which it is made."""
        self.held[value] = self.changed[value] = self.setting.state((layout,), lazy=lazy, zero=zero)
        return value, 0

    def bytes_of(self, version: Version) -> float:
        """Local bytes of a version."""
        return self.setting.local_bytes(version[0], self.held[version[0]], version[1])

    def grows(self, version: Version) -> bool:
        """Whether a value's size is proportional to the micro-batch."""
        return self.setting.grows(version[0], self.held[version[0]].lazy)

    # ------------------------------------------------------------------------------------------ factors

    def apply(self, rows: Rows, parts: ShardedRows = WHOLE) -> None:
        """Chooses a factor per axis, converts the operands and records the results.

        Args:
            rows: as for `plan_operation`.
            parts: what is chosen already, where the operation works on stored rows.
        """
        op, states, self.parts = self.op, self.states, parts
        choice = Choice(self.setting, op, states)
        chosen: dict[int, StaticFactor] = dict(parts.rows)
        kept: set[int] = set()
        for axis, places in enumerate(zip(*(state.layouts[0] for state in states), strict=True)):
            if axis in parts.rows or axis in parts.settled:
                continue
            if places.count(NOWHERE) == len(places):
                for factor in rows.get(axis, ()):
                    if choice.fits(factor, axis, chosen):
                        chosen[axis] = factor
                continue
            if PENDING in places and choice.keeps_pending(axis):
                kept.add(axis)
                continue
            factor, cost = choice.cheapest(axis, chosen)
            if cost > 0:
                number = None if factor is None else factor.factor
                self.decisions.append(Decision(op.index, op.primitive, axis, number, cost))
                if self.setting.keep is not Keep.STEPS:
                    self.dear.append(DearChoice(self.setting, op, states, axis, dict(chosen), factor))
            if factor is not None:
                chosen[axis] = factor
        wanted = [self._operand_layout(n, chosen, kept) for n in range(len(states))]
        operands = tuple(self.convert(v, layout) for v, layout in zip(op.operands, wanted, strict=True))
        self._emit(operands, wanted, chosen, kept)

    def _operand_layout(self, operand: int, chosen: Mapping[int, StaticFactor], kept: set[int]) -> Layout:
        layout = list(self.setting.nowhere)
        for axis, factor in chosen.items():
            layout[axis] = factor.operands[operand]
        for axis in kept:
            if self.states[operand].layouts[0][axis] == PENDING:
                layout[axis] = PENDING
        return tuple(layout)

    def _emit(
        self,
        operands: tuple[Version, ...],
        wanted: Sequence[Layout],
        chosen: Mapping[int, StaticFactor],
        kept: set[int],
    ) -> None:
        reduced = [a for a, f in chosen.items() if makes_summands(f)]
        at_once = self.op.combine != "sum" and bool(reduced)
        pending = kept if at_once else (*kept, *reduced)
        layouts = [self._result_layout(n, chosen, pending) for n in range(len(self.op.results))]
        names = tuple(n for a in sorted(reduced) for n in self.setting.axes[a].names) if at_once else ()
        self._record(operands, wanted, layouts, chosen, names)

    def repeat(self) -> None:
        """An operation on whole operands, done by every device."""
        nowhere, op = self.setting.nowhere, self.op
        operands = tuple((v, 0) for v in op.operands)
        self._record(operands, (nowhere,) * len(operands), (nowhere,) * len(op.results), {}, ())

    def _result_layout(self, result: int, chosen: Mapping[int, StaticFactor], pending: Iterable[int]) -> Layout:
        layout = list(self.setting.nowhere)
        for axis, factor in chosen.items():
            layout[axis] = factor.results[result]
        for axis in pending:
            # Rows looked up where they are stored are summands over the data axis that is the same devices.
            mirror = self.setting.axes[axis].mirror if axis in self.parts.rows else None
            layout[axis if mirror is None else mirror] = PENDING
        return tuple(layout)

    # ------------------------------------------------------------------------------------------ results

    def _record(
        self,
        operands: tuple[Version, ...],
        wanted: Sequence[Layout],
        layouts: Sequence[Layout],
        chosen: Mapping[int, StaticFactor],
        names: tuple[str, ...],
    ) -> None:
        setting, op = self.setting, self.op
        lazy = self._lazy_result() if op.elementwise else frozenset()
        made = list(zip(op.results, layouts, strict=True))
        results = tuple([self._hold_result(value, layout, lazy) for value, layout in made])
        if setting.keep is Keep.INSTRUCTIONS:
            self.instructions.append(
                Apply(
                    op.index, operands, results,
                    tuple([self._materialise(v, layout) for (v, _), layout in zip(operands, wanted, strict=True)]),
                    tuple([setting.local_shape(value, layout, lazy) for value, layout in made]),
                    shifts=self._shifts(chosen),
                    combine=(names, op.combine) if names else None,
                )
            )  # fmt: skip
        if setting.keep is not Keep.STEPS:
            self.count(operands, results, names)
        if self.parts.spreads:
            self._take(setting.settle(op.results[0], self.held[op.results[0]]))
        if op.flops:
            flops, grows = setting.points(op)
            for axis in chosen:
                flops /= setting.axis_sizes[axis]
            self.flops = (0.0, flops) if grows else (flops, 0.0)
            self.work = ((op.index, tuple(chosen)),)

    def _hold_result(self, value: int, layout: Layout, lazy: frozenset[int]) -> Version:
        """A result as it is made; summands of looked-up rows count as made where they are then spread."""
        if not self.parts.spreads:
            return self.hold(value, layout, lazy=lazy)
        spread = tuple(self.parts.settled.get(axis, place) for axis, place in enumerate(layout))
        self.held[value] = self.changed[value] = self.setting.state((spread, layout), lazy=lazy)
        return value, 1

    def count(self, operands: tuple[Version, ...], results: tuple[Version, ...], names: tuple[str, ...] = ()) -> None:
        """Notes what an application counts for.

        Args:
            operands: versions read.
            results: versions made.
            names: mesh axes over which the first result is combined at once.
        """
        op, sent = self.op, ()
        if names:
            value, dtype = op.results[0], self.program.program.values[op.results[0]].dtype
            held = self.held[value]
            shape = self.setting.local_shape(value, held.layouts[0], held.lazy)
            found = combined(self.setting.axes, names, op.combine, shape, self.program.itemsize[value], dtype)
            sent = ((found, self.grows(results[0])),)
        if op.elementwise or op.free:
            self.tallies.append(Tally(operands, self.made(results), fused=True, moved=NONE, sent=sent, place=op.place))
            return
        moved = [0.0, 0.0]
        for version in operands:
            moved[self.grows(version)] += self.bytes_of(version)
        self.tallies.append(
            Tally(operands, self.made(results), fused=False, moved=(moved[0], moved[1]), sent=sent, place=op.place)
        )

    def made(self, results: Iterable[Version]) -> tuple[tuple[Version, float, bool], ...]:
        """Versions with their local bytes, and whether these are proportional to the micro-batch."""
        return tuple([(version, self.bytes_of(version), self.grows(version)) for version in results])

    def _lazy_result(self) -> frozenset[int]:
        """Dims along which every operand is of size 1 still."""
        program, result = self.program, self.op.results[0]
        rank = program.rank[result]
        dims = frozenset(program.dim_of[result])
        for value, state in zip(self.op.operands, self.states, strict=True):
            if program.rank[value] == rank:
                dims -= frozenset(program.dim_of[value]) - state.lazy
        return dims

    def _materialise(self, value: int, wanted: Layout) -> tuple[int, ...] | None:
        """Local shape to which a lazily broadcast operand is spread: every shard of a repeated dim is the same."""
        if not self.held[value].lazy or self.op.elementwise:
            return None
        return self.setting.local_shape(value, wanted, frozenset())

    def _shifts(self, chosen: Mapping[int, StaticFactor]) -> tuple[IndexShift, ...]:
        """Per indexed dim that is sharded, how its indices become local."""
        by_dim: dict[int, list[int]] = {}
        for axis, factor in chosen.items():
            if is_indexed(factor):
                by_dim.setdefault(self.program.dim_of[self.op.operands[0]][factor.operands[0]], []).append(axis)
        return tuple(self._shift(dim, group, chosen[group[0]].operands[0]) for dim, group in by_dim.items())

    def _shift(self, dim: int, group: list[int], position: int) -> IndexShift:
        value, axes = self.op.operands[0], self.setting.axes
        frame = self.setting.frame(value, self.held[value].lazy)
        group.sort(key=lambda a: axes[a].rank if frame.ascending[position] else -axes[a].rank)
        names = tuple(n for a in group for n in names_at(axes, frame, position, a))
        size = 1
        for at, factor in zip(self.program.dim_of[value], self.program.positions[value], strict=True):
            if at == dim:
                size *= self.setting.sizes[factor]
        return IndexShift(names, dim, size)

    # ------------------------------------------------------------------------------------------ lazy broadcasts

    def broadcast(self) -> bool:
        """A broadcast only notes which dims are still of size 1."""
        program, source, result = self.program, self.op.operands[0], self.op.results[0]
        state = self.states[0]
        place = self._map_positions()
        if place is None:
            return False
        # New dims of size 1 do not make a summand larger: it stays one.
        adds_nothing = len(place) == len(program.positions[result]) and not program.has_batch[result]
        layout, version = (state.layouts[0], 0) if adds_nothing else self._settled(source)
        dims_in, dims_out = program.dim_of[source], program.dim_of[result]
        kept = {dims_out[q] for q in place.values()}
        lazy_kept = {dims_out[q] for p, q in place.items() if dims_in[p] in state.lazy}
        lazy = frozenset((set(dims_out) - kept) | lazy_kept)
        self._relabel((source, version), tuple(place[p] if p >= 0 else p for p in layout), lazy)
        return True

    def _settled(self, value: int) -> tuple[Layout, int]:
        """The value's first layout with pending sums resolved."""
        layout = self.held[value].layouts[0]
        if PENDING not in layout:
            return layout, 0
        target = tuple(NOWHERE if p == PENDING else p for p in layout)
        return target, self.convert(value, target)[1]

    def _map_positions(self) -> dict[int, int] | None:
        """From every position of the operand to its position in the result; None where some have none."""
        place = {f.operands[0]: f.results[0] for f in self.op.factors}
        if set(place) != set(range(len(self.program.positions[self.op.operands[0]]))):
            return None
        return place

    def lazy_reshape(self) -> bool:
        """Lazily broadcast dims pass a reshape or transpose that keeps them whole."""
        source, result, state = self.op.operands[0], self.op.results[0], self.states[0]
        if not state.lazy:
            return False
        place = self._map_positions()
        if place is None:
            return False
        dims_in, dims_out = self.program.dim_of[source], self.program.dim_of[result]
        lazy_out = {dims_out[place[p]] for p in place if dims_in[p] in state.lazy}
        if any(dims_out[place[p]] in lazy_out and dims_in[p] not in state.lazy for p in place):
            return False
        target = tuple(place[p] if p >= 0 else p for p in state.layouts[0])
        self._relabel((source, 0), target, frozenset(lazy_out))
        return True

    def _relabel(self, operand: Version, layout: Layout, lazy: frozenset[int]) -> None:
        """The result is the operand seen in another layout; zeros stay zeros."""
        result = self.op.results[0]
        version = self.hold(result, layout, lazy=lazy, zero=self.states[0].zero)
        if self.setting.keep is Keep.INSTRUCTIONS:
            shape = self.setting.local_shape(result, layout, lazy)
            self.instructions.append(Apply(self.op.index, (operand,), (version,), (None,), (shape,)))
        if self.setting.keep is not Keep.STEPS:
            self.count((operand,), (version,))
