"""The partitioner's planning half: one pass over a program that lays out every value and places every collective.

A strategy is nothing but which factors each logical axis may shard. Per operation and axis the cheapest admissible
factor of its sharding rule is taken: bytes moved to bring the operands there, and bytes a pending sum will cost.
Megatron's tensor and sequence parallelism, Ulysses, vocabulary-, context- and expert-parallel layers fall out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from galvatron_jax.partition.instructions import Apply, Convert, Decision, IndexShift, Instruction, Loop, Version
from galvatron_jax.partition.layout import (
    NOWHERE,
    PENDING,
    Axis,
    Frame,
    Layout,
    Role,
    Step,
    convert,
    names_at,
)
from galvatron_jax.partition.static import StaticFactor, StaticOp, StaticProgram
from galvatron_jax.spec.program import FactorKind, Linearity

FORBIDDEN = 1e15
"""Cost in bytes of what a rule rules out."""
KEEP_TENSOR_SHARDS = 1000.0
"""Factor on the cost of gathering a weight-like value over a tensor axis: owners compute, weights stay."""


@dataclass
class Held:
    """A value during planning: its layouts so far, and which dims are still of size 1 (lazily broadcast)."""

    layouts: list[Layout]
    lazy: frozenset[int] = frozenset()
    zero: bool = False


@dataclass
class Pass:
    """One pass of the planner over some operations of a program."""

    program: StaticProgram
    sizes: Sequence[int]
    axes: tuple[Axis, ...]
    allowed: tuple[frozenset[int], ...]
    """Per axis, the factors it may shard."""
    held: dict[int, Held] = field(default_factory=dict)
    pricing: bool = False
    """Only layouts, conversions and FLOPs are wanted: applications are not recorded."""
    instructions: list[Instruction] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    flops: float = 0.0
    loops: dict[int, Pass] = field(default_factory=dict)
    """Per loop, the pass that planned its body."""

    def __post_init__(self) -> None:
        self.nowhere: Layout = (NOWHERE,) * len(self.axes)
        self.axis_range = range(len(self.axes))
        self._bytes: dict[Version, float] = {}
        for value in self.program.program.constants:
            zero = self.program.program.values[value].zero
            self.held[value] = Held([self.nowhere], zero=zero)

    # ------------------------------------------------------------------------------------------ values

    def hold(self, value: int, layout: Layout, *, lazy: frozenset[int] = frozenset(), zero: bool = False) -> Version:
        """Takes a value in a layout as given (an input) or just made (a result)."""
        self.held[value] = Held([layout], lazy, zero)
        return value, 0

    def frame(self, value: int) -> Frame:
        """Sizes and order at the value's positions."""
        lazy = self.held[value].lazy
        dims = self.program.dim_of[value]
        sizes = tuple(1 if dims[p] in lazy else self.sizes[f] for p, f in enumerate(self.program.positions[value]))
        return Frame(sizes, self.program.ascending[value])

    def local_bytes(self, value: int, version: int = 0) -> float:
        """Local bytes of a version."""
        key = (value, version)
        if key not in self._bytes:
            held = self.held[value]
            total = float(self.program.itemsize[value])
            dims = self.program.dim_of[value]
            for position, factor in enumerate(self.program.positions[value]):
                if dims[position] not in held.lazy:
                    total *= self.sizes[factor]
            for axis, place in enumerate(held.layouts[version]):
                if place >= 0:
                    total /= self.axes[axis].size
            self._bytes[key] = total
        return self._bytes[key]

    def local_shape(self, value: int, layout: Layout, lazy: frozenset[int]) -> tuple[int, ...]:
        """Local shape, dim by dim; lazily broadcast dims are 1."""
        shape = [1] * self.program.rank[value]
        dims = self.program.dim_of[value]
        for position, factor in enumerate(self.program.positions[value]):
            if dims[position] not in lazy:
                shape[dims[position]] *= self.sizes[factor]
        for axis, place in enumerate(layout):
            if place >= 0:
                shape[dims[place]] //= self.axes[axis].size
        return tuple(shape)

    def convert(self, value: int, target: Layout) -> Version:
        """A version of the value in the target layout, made from the nearest one if there is none yet."""
        held = self.held[value]
        if held.lazy:
            dims = self.program.dim_of[value]
            target = tuple(NOWHERE if t >= 0 and dims[t] in held.lazy else t for t in target)
        if target in held.layouts:
            return value, held.layouts.index(target)
        source = min(range(len(held.layouts)), key=lambda i: (self._distance(held.layouts[i], target), i))
        steps = convert(self.axes, self.frame(value), held.layouts[source], target)
        held.layouts.append(target)
        version = len(held.layouts) - 1
        shape = self.local_shape(value, target, held.lazy)
        self.instructions.append(Convert(value, source, version, tuple(steps), shape))
        return value, version

    def relabel(self, value: int, layout: Layout) -> Version:
        """Sees a value's first version as another layout of the same local array."""
        held = self.held[value]
        if layout not in held.layouts:
            held.layouts.append(layout)
            shape = self.local_shape(value, layout, held.lazy)
            self.instructions.append(Convert(value, 0, len(held.layouts) - 1, (), shape))
        return value, held.layouts.index(layout)

    @staticmethod
    def _reachable(source: Layout, target: Layout) -> bool:
        return all(s == PENDING or t != PENDING for s, t in zip(source, target, strict=True))

    @classmethod
    def _distance(cls, source: Layout, target: Layout) -> int:
        if not cls._reachable(source, target):
            return 1 << 30
        return sum((0 if s == t else 1 if s == NOWHERE else 4) for s, t in zip(source, target, strict=True))

    # ------------------------------------------------------------------------------------------ costs

    def move_cost(self, value: int, axis: int, target: int) -> float:
        """Bytes a device sends to bring one axis of a value to a position (or nowhere)."""
        held = self.held[value]
        now = held.layouts[0][axis]
        if target >= 0 and self.program.dim_of[value][target] in held.lazy:
            target = NOWHERE
        if now in (target, NOWHERE) or held.zero:
            return 0.0
        if len(held.layouts) > 1 and any(layout[axis] == target for layout in held.layouts):
            return 0.0
        n = self.axes[axis].size
        size = self.local_bytes(value)
        if now == PENDING:
            return size * (n - 1) / n * (1.0 if target >= 0 else 2.0)
        weight = 1.0
        if self.axes[axis].role is Role.TENSOR and not self.program.has_batch[value]:
            weight = KEEP_TENSOR_SHARDS
        return weight * (size * (n - 1) / n if target >= 0 else size * (n - 1))

    def choose(self, op: StaticOp, axis: int, chosen: Mapping[int, StaticFactor]) -> tuple[StaticFactor | None, float]:
        """The cheapest factor for one axis, or None to repeat the work over it."""
        best: StaticFactor | None = None
        best_cost = sum(self.move_cost(v, axis, NOWHERE) for v in op.operands)
        allowed = self.allowed[axis]
        for factor in op.factors:
            if factor.factor not in allowed or not self._admissible(op, factor, axis, chosen):
                continue
            cost = sum(
                self.move_cost(v, axis, p) for v, p in zip(op.operands, factor.operands, strict=True)
            ) + self._result_cost(op, factor, axis)
            if cost < best_cost - 1e-9 or (best is None and cost <= best_cost):
                best, best_cost = factor, cost
        return best, best_cost

    def _admissible(self, op: StaticOp, factor: StaticFactor, axis: int, chosen: Mapping[int, StaticFactor]) -> bool:
        if factor.kind is FactorKind.ZERO_REDUCE and not self.held[op.operands[0]].zero:
            return False
        return self._fits(factor, axis, chosen) and any(
            p >= 0 and self.program.dim_of[v][p] not in self.held[v].lazy
            for v, p in zip(op.operands, factor.operands, strict=True)
        )

    def _fits(self, factor: StaticFactor, axis: int, chosen: Mapping[int, StaticFactor]) -> bool:
        """Whether a factor can take one more axis beside those that already shard it."""
        if factor.kind in (FactorKind.INDEX, FactorKind.SCATTER_INDEX) and any(
            f is not factor and f.factor == factor.factor for f in chosen.values()
        ):
            return False
        shards = self.axes[axis].size
        for other, taken in chosen.items():
            if taken is factor:
                shards *= self.axes[other].size
        size = self.sizes[factor.factor]
        return size >= shards and size % shards == 0

    def _result_cost(self, op: StaticOp, factor: StaticFactor, axis: int) -> float:
        """What a pending sum will cost later; and owners compute: weight gradients stay where the weights are."""
        program, role = self.program, self.axes[axis].role
        result = op.results[0]
        weight_like = not program.has_batch[result]
        if factor.kind is not FactorKind.PARALLEL and factor.kind is not FactorKind.SCATTER_INDEX:
            if not weight_like:
                size = float(program.itemsize[result])
                for f in program.positions[result]:
                    size *= self.sizes[f]
                for other, a in enumerate(self.axes):
                    if other != axis and any(self.held[v].layouts[0][other] >= 0 for v in op.operands):
                        size /= a.size
                n = self.axes[axis].size
                return 2.0 * size * (n - 1) / n
            if role is Role.TENSOR and any(f in self.allowed[axis] for f in program.positions[result]):
                return FORBIDDEN
            return 0.0
        if (
            weight_like
            and role in (Role.DATA, Role.SEQUENCE)
            and op.primitive == "dot_general"
            and any(f.kind is FactorKind.REDUCE and f.factor in self.allowed[axis] for f in op.factors)
        ):
            return FORBIDDEN
        return 0.0

    def keeps_pending(self, op: StaticOp, axis: int) -> bool:
        """Whether the pending sum over an axis may pass this operation unresolved."""
        pending = [self.held[v].layouts[0][axis] == PENDING for v in op.operands]
        if not any(pending):
            return False
        if op.linearity is Linearity.UNARY:
            tensor_activation = self.axes[axis].role is Role.TENSOR and self.program.has_batch[op.operands[0]]
            return pending[0] and not (op.primitive == "reduce_sum" and tensor_activation)
        if op.linearity is Linearity.ADDITIVE:
            return all(p or self.held[v].zero for p, v in zip(pending, op.operands, strict=True))
        if op.linearity is Linearity.LAST:
            summand = not self.program.has_batch[op.operands[-1]] and (pending[0] or self.held[op.operands[0]].zero)
            return pending[-1] and summand and not any(pending[1:-1])
        if op.linearity is Linearity.SCALE:
            weight_like = not self.program.has_batch[op.results[0]]
            scales = [not p and (weight_like or self._is_scalar(v)) for p, v in zip(pending, op.operands, strict=True)]
            if op.primitive == "div":
                return pending[0] and scales[1]
            return sum(pending) == 1 and all(p or s for p, s in zip(pending, scales, strict=True))
        return False

    def _is_scalar(self, value: int) -> bool:
        held = self.held[value]
        dims = self.program.dim_of[value]
        return all(dims[p] in held.lazy for p in range(len(dims))) and PENDING not in held.layouts[0]

    # ------------------------------------------------------------------------------------------ operations

    def run(self, operations: Iterable[StaticOp]) -> None:
        """Plans operations in order."""
        for op in operations:
            if op.loop is not None and op.body is not None and self._loop(op, op.loop, op.body):
                continue
            if op.primitive == "broadcast_in_dim" and self._broadcast(op):
                continue
            if op.primitive in ("reshape", "squeeze", "expand_dims", "transpose") and self._lazy_reshape(op):
                continue
            self.apply(op)

    def apply(self, op: StaticOp) -> None:
        """Chooses a factor per axis, converts the operands and records the results."""
        held = [self.held[v] for v in op.operands]
        rows = self._scatter_rows(op)
        if not rows and all(h.layouts[0] == self.nowhere for h in held):
            self._repeat(op)
            return
        chosen: dict[int, StaticFactor] = {}
        kept: set[int] = set()
        for axis in self.axis_range:
            if all(h.layouts[0][axis] == NOWHERE for h in held):
                for factor in rows:
                    if self._fits(factor, axis, chosen) and self._shards(axis, factor.factor):
                        chosen[axis] = factor
                continue
            if self.keeps_pending(op, axis):
                kept.add(axis)
                continue
            factor, cost = self.choose(op, axis, chosen)
            if factor is not None:
                chosen[axis] = factor
            if cost > 0:
                number = None if factor is None else factor.factor
                self.decisions.append(Decision(op.index, op.primitive, axis, number, cost))
        wanted = [self._operand_layout(position, chosen, kept, v) for position, v in enumerate(op.operands)]
        operands = tuple(self.convert(v, layout) for v, layout in zip(op.operands, wanted, strict=True))
        self._emit(op, operands, wanted, chosen, kept)

    def _scatter_rows(self, op: StaticOp) -> list[StaticFactor]:
        """Factors of the rows that a scatter into zeros makes (an embedding's gradient, the logits').

        Where an axis shards them elsewhere, each device makes its own.
        """
        if op.primitive not in ("scatter-add", "scatter_add") or not self.held[op.operands[0]].zero:
            return []
        return [f for f in op.factors if f.kind is FactorKind.SCATTER_INDEX]

    def _shards(self, axis: int, factor: int) -> bool:
        """Whether the axis may shard a factor, and does in some value."""
        return factor in self.allowed[axis] and any(
            place >= 0 and self.program.positions[value][place] == factor
            for value, held in self.held.items()
            for place in (layout[axis] for layout in held.layouts)
        )

    def _operand_layout(self, position: int, chosen: Mapping[int, StaticFactor], kept: set[int], value: int) -> Layout:
        layout = list(self.nowhere)
        for axis, factor in chosen.items():
            layout[axis] = factor.operands[position]
        for axis in kept:
            if self.held[value].layouts[0][axis] == PENDING:
                layout[axis] = PENDING
        return tuple(layout)

    def _emit(
        self,
        op: StaticOp,
        operands: tuple[Version, ...],
        wanted: Sequence[Layout],
        chosen: Mapping[int, StaticFactor],
        kept: set[int],
    ) -> None:
        reduced = [a for a, f in chosen.items() if f.kind not in (FactorKind.PARALLEL, FactorKind.SCATTER_INDEX)]
        at_once = op.combine != "sum" and bool(reduced)
        pending = kept if at_once else (*kept, *reduced)
        layouts = [self._result_layout(position, chosen, pending) for position in range(len(op.results))]
        combined = tuple(n for a in sorted(reduced) for n in self.axes[a].names) if at_once else ()
        self._hold_results(op, operands, wanted, layouts, chosen, combined)

    def _repeat(self, op: StaticOp) -> None:
        """An operation on whole operands, done by every device."""
        operands = tuple((v, 0) for v in op.operands)
        self._hold_results(op, operands, (self.nowhere,) * len(operands), (self.nowhere,) * len(op.results), {}, ())

    def _hold_results(
        self,
        op: StaticOp,
        operands: tuple[Version, ...],
        wanted: Sequence[Layout],
        layouts: Sequence[Layout],
        chosen: Mapping[int, StaticFactor],
        combined: tuple[str, ...],
    ) -> None:
        lazy = self._lazy_result(op) if op.elementwise else frozenset()
        results = tuple(self.hold(value, layout, lazy=lazy) for value, layout in zip(op.results, layouts, strict=True))
        if not self.pricing:
            spread = (self._materialise(op, v, layout) for v, layout in zip(operands, wanted, strict=True))
            shapes = (self.local_shape(value, layout, lazy) for value, layout in zip(op.results, layouts, strict=True))
            self.instructions.append(
                Apply(
                    op.index, operands, results, tuple(spread), tuple(shapes),
                    shifts=self._shifts(op, chosen),
                    combine=(combined, op.combine) if combined else None,
                )
            )  # fmt: skip
        points = op.flops
        if points:
            for factor in op.factors:
                points *= self.sizes[factor.factor]
            for axis in chosen:
                points /= self.axes[axis].size
            self.flops += points

    def _result_layout(self, position: int, chosen: Mapping[int, StaticFactor], pending: Iterable[int]) -> Layout:
        layout = list(self.nowhere)
        for axis, factor in chosen.items():
            layout[axis] = factor.results[position]
        for axis in pending:
            layout[axis] = PENDING
        return tuple(layout)

    def _lazy_result(self, op: StaticOp) -> frozenset[int]:
        """Dims along which every operand is of size 1 still."""
        rank = self.program.rank[op.results[0]]
        dims = set(range(rank))
        for value in op.operands:
            if self.program.rank[value] != rank:
                continue
            whole = set(self.program.dim_of[value])
            dims -= whole - self.held[value].lazy
        real = set(self.program.dim_of[op.results[0]])
        return frozenset(dims & real)

    def _materialise(self, op: StaticOp, version: Version, wanted: Layout) -> tuple[int, ...] | None:
        """Local shape to which a lazily broadcast operand is spread: every shard of a repeated dim is the same."""
        value, _ = version
        if not self.held[value].lazy or op.elementwise:
            return None
        return self.local_shape(value, wanted, frozenset())

    def _shifts(self, op: StaticOp, chosen: Mapping[int, StaticFactor]) -> tuple[IndexShift, ...]:
        """Per indexed dim that is sharded, how its indices become local."""
        by_dim: dict[int, list[int]] = {}
        value = op.operands[0] if op.operands else -1
        for axis, factor in chosen.items():
            if factor.kind in (FactorKind.INDEX, FactorKind.SCATTER_INDEX):
                by_dim.setdefault(self.program.dim_of[value][factor.operands[0]], []).append(axis)
        shifts = []
        for dim, group in by_dim.items():
            position = chosen[group[0]].operands[0]
            frame = self.frame(value)
            group.sort(key=lambda a: self.axes[a].rank if frame.ascending[position] else -self.axes[a].rank)
            names = tuple(n for a in group for n in names_at(self.axes, frame, position, a))
            size = 1
            for p, factor in enumerate(self.program.positions[value]):
                if self.program.dim_of[value][p] == dim:
                    size *= self.sizes[factor]
            shifts.append(IndexShift(names, dim, size))
        return tuple(shifts)

    # ------------------------------------------------------------------------------------------ loops

    def _loop(self, op: StaticOp, loop: tuple[int, int, int], program: StaticProgram) -> bool:
        """Plans a scan: its body like any program, once carried values go round in the layout they came in.

        Sums into a carry that starts at zero (weight gradients over time) stay pending until after the loop.
        """
        consts, carried, _ = loop
        inputs, outputs = program.program.inputs, program.program.outputs
        entries = [self._loop_entry(v, n >= consts + carried) for n, v in enumerate(op.operands)]
        if any(
            len(program.positions[inner]) != len(self.program.positions[v]) - skipped
            for inner, v, (_, skipped) in zip(inputs, op.operands, entries, strict=True)
        ):
            return False
        layouts = [layout for layout, _ in entries]
        zero = [self.held[v].zero for v in op.operands]
        for attempt in range(6):
            body = Pass(program, self.sizes, self.axes, self.allowed)
            for n, (value, layout) in enumerate(zip(inputs, layouts, strict=True)):
                # At first a carry that starts at zero counts as zero, to see whether sums into it stay pending.
                body.hold(value, layout, zero=zero[n] and attempt == 0)
            body.run(program.operations)
            found = [body.held[v].layouts[0] for v in outputs[:carried]]
            joined = [_join(layouts[consts + n], found[n], zero[consts + n]) for n in range(carried)]
            if attempt and joined == layouts[consts : consts + carried]:
                break
            layouts[consts : consts + carried] = joined
        else:
            return False
        self._emit_loop(op, loop, body, layouts, [skipped for _, skipped in entries])
        return True

    def _loop_entry(self, value: int, scanned: bool) -> tuple[Layout, int]:
        """A loop operand's layout as the body sees it, and how many positions the leading dim takes."""
        held = self.held[value]
        dims = self.program.dim_of[value]
        skipped = sum(d == 0 for d in dims) if scanned else 0
        layout = [p - skipped if p >= skipped else NOWHERE for p in held.layouts[0]]
        for axis, known in enumerate(self.axes):
            if known.role is Role.STORAGE:
                layout[axis] = NOWHERE
        return tuple(layout), skipped

    def _emit_loop(
        self, op: StaticOp, loop: tuple[int, int, int], body: Pass, layouts: Sequence[Layout], skipped: Sequence[int]
    ) -> None:
        carried, trips = loop[1], loop[2]
        inner = body.program.program
        wanted = [tuple(p + s if p >= 0 else p for p in layout) for layout, s in zip(layouts, skipped, strict=True)]
        # A pending carry starts from zeros, which are their own summands: no conversion.
        asked = [tuple(NOWHERE if p == PENDING else p for p in layout) for layout in wanted]
        operands = tuple(self.convert(v, layout) for v, layout in zip(op.operands, asked, strict=True))
        handed = []
        for n, value in enumerate(inner.outputs):
            target = layouts[loop[0] + n] if n < carried else body.held[value].layouts[0]
            handed.append(body.convert(value, target))
        results, shapes, inner_shapes = [], [], []
        for n, (value, version) in enumerate(zip(op.results, handed, strict=True)):
            layout = body.held[version[0]].layouts[version[1]]
            inner_shapes.append(body.local_shape(version[0], layout, frozenset()))
            lead = sum(d == 0 for d in self.program.dim_of[value]) if n >= carried else 0
            outer = tuple(p + lead if p >= 0 else p for p in layout)
            results.append(self.hold(value, outer))
            shapes.append(self.local_shape(value, outer, frozenset()))
        materialise = tuple(
            None if not self.held[v].lazy else self.local_shape(v, layout, frozenset())
            for (v, _), layout in zip(operands, asked, strict=True)
        )
        self.instructions.append(
            Loop(
                op.index, operands, tuple(results), materialise, tuple(shapes), tuple(body.instructions),
                tuple(handed), tuple(inner_shapes), trips,
            )
        )  # fmt: skip
        self.loops[op.index] = body
        self.flops += body.flops * trips

    # ------------------------------------------------------------------------------------------ lazy broadcasts

    def _broadcast(self, op: StaticOp) -> bool:
        """A broadcast only notes which dims are still of size 1."""
        source, result = op.operands[0], op.results[0]
        held = self.held[source]
        place = self._map_positions(op)
        if place is None:
            return False
        # New dims of size 1 do not make a summand larger: it stays one.
        adds_nothing = len(place) == len(self.program.positions[result]) and not self.program.has_batch[result]
        layout, version = (held.layouts[0], 0) if adds_nothing else self._settled(source)
        target = tuple(place[p] if p >= 0 else p for p in layout)
        kept_dims = {self.program.dim_of[result][q] for q in place.values()}
        lazy_kept = {self.program.dim_of[result][q] for p, q in place.items() if self._lazy_at(source, p)}
        lazy = frozenset((set(self.program.dim_of[result]) - kept_dims) | lazy_kept)
        self._relabel(op, (source, version), target, lazy, held.zero)
        return True

    def _settled(self, value: int) -> tuple[Layout, int]:
        """The value's first layout with pending sums resolved."""
        layout = self.held[value].layouts[0]
        if PENDING not in layout:
            return layout, 0
        target = tuple(NOWHERE if p == PENDING else p for p in layout)
        return target, self.convert(value, target)[1]

    def _lazy_at(self, value: int, position: int) -> bool:
        return self.program.dim_of[value][position] in self.held[value].lazy

    def _map_positions(self, op: StaticOp) -> dict[int, int] | None:
        """From every position of the operand to its position in the result; None where some have none."""
        place = {f.operands[0]: f.results[0] for f in op.factors}
        if set(place) != set(range(len(self.program.positions[op.operands[0]]))):
            return None
        return place

    def _lazy_reshape(self, op: StaticOp) -> bool:
        """Lazily broadcast dims pass a reshape or transpose that keeps them whole."""
        source, result = op.operands[0], op.results[0]
        held = self.held[source]
        if not held.lazy:
            return False
        place = self._map_positions(op)
        if place is None:
            return False
        dims_in, dims_out = self.program.dim_of[source], self.program.dim_of[result]
        lazy_out = {dims_out[place[p]] for p in place if dims_in[p] in held.lazy}
        if any(dims_out[place[p]] in lazy_out and dims_in[p] not in held.lazy for p in place):
            return False
        target = tuple(place[p] if p >= 0 else p for p in held.layouts[0])
        self._relabel(op, (source, 0), target, frozenset(lazy_out), held.zero)
        return True

    def _relabel(self, op: StaticOp, operand: Version, layout: Layout, lazy: frozenset[int], zero: bool) -> None:
        result = self.hold(op.results[0], layout, lazy=lazy, zero=zero)
        shape = self.local_shape(op.results[0], layout, lazy)
        self.instructions.append(Apply(op.index, (operand,), (result,), (None,), (shape,)))


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
