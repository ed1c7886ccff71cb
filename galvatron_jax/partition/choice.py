"""Which factor of an operation's sharding rule a logical axis shards: the cheapest admissible one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from galvatron_jax.partition.layout import NOWHERE, PENDING, Role
from galvatron_jax.partition.setting import Held, Setting
from galvatron_jax.partition.static import StaticFactor, StaticOp
from galvatron_jax.spec.program import FactorKind, Linearity

FORBIDDEN = 1e15
"""Cost in bytes of what a rule rules out."""
KEEP_TENSOR_SHARDS = 1000.0
"""Factor on the cost of gathering a weight-like value over a tensor axis: owners compute, weights stay."""

_NO_SUMMANDS = (FactorKind.PARALLEL, FactorKind.SCATTER_INDEX)
_INDEXED = (FactorKind.INDEX, FactorKind.SCATTER_INDEX)


def makes_summands(factor: StaticFactor) -> bool:
    """Whether each shard of the factor yields a summand of the result."""
    return factor.kind not in _NO_SUMMANDS


def is_indexed(factor: StaticFactor) -> bool:
    """Whether the factor is a dim that indices point into."""
    return factor.kind in _INDEXED


@dataclass(frozen=True, slots=True)
class Choice:
    """One operation, its operands in some states."""

    setting: Setting
    op: StaticOp
    states: tuple[Held, ...]

    def cheapest(self, axis: int, chosen: Mapping[int, StaticFactor]) -> tuple[StaticFactor | None, float]:
        """The cheapest factor for one axis, or None to repeat the work over it, and its cost in bytes.

        Args:
            axis: the logical axis.
            chosen: factors of the axes before it.
        """
        moving = [
            (n, value, state, state.layouts[0][axis])
            for n, (value, state) in enumerate(zip(self.op.operands, self.states, strict=True))
            if state.layouts[0][axis] != NOWHERE and not state.zero
        ]
        if self._narrows() and moving and not self.setting.program.has_batch[self.op.operands[0]]:
            # Parts of a parameter are gathered in the narrower type.
            return next(factor for factor in self.op.factors if factor.operands[0] == moving[0][3]), 0.0
        allowed = self.setting.allowed[axis]
        found: list[tuple[StaticFactor, float]] = []
        for factor in self.op.factors:
            if factor.factor not in allowed or not self._admissible(factor, axis, chosen):
                continue
            cost, operands = 0.0, factor.operands
            for n, value, state, now in moving:
                if operands[n] != now:
                    cost += self._move_cost(value, state, axis, operands[n])
            cost += self._result_cost(factor, axis)
            if not cost:
                return factor, 0.0
            found.append((factor, cost))
        best, best_cost = None, 0.0
        for _, value, state, _ in moving:
            best_cost += self._move_cost(value, state, axis, NOWHERE)
        for factor, cost in found:
            if cost < best_cost - 1e-9 or (best is None and cost <= best_cost):
                best, best_cost = factor, cost
        return best, best_cost

    def _move_cost(self, value: int, state: Held, axis: int, target: int) -> float:
        """Bytes a device sends to bring one axis of a value, which is somewhere, to a position (or nowhere)."""
        setting = self.setting
        now = state.layouts[0][axis]
        if target >= 0 and state.lazy and setting.program.dim_of[value][target] in state.lazy:
            target = NOWHERE
        if now == target:
            return 0.0
        if len(state.layouts) > 1 and any(layout[axis] == target for layout in state.layouts):
            return 0.0
        n = setting.axis_sizes[axis]
        size = setting.local_bytes(value, state)
        if now == PENDING:
            return size * (n - 1) / n * (1.0 if target >= 0 else 2.0)
        weight = 1.0
        if setting.axes[axis].role is Role.TENSOR and not setting.program.has_batch[value]:
            weight = KEEP_TENSOR_SHARDS
        return weight * (size * (n - 1) / n if target >= 0 else size * (n - 1))

    def _admissible(self, factor: StaticFactor, axis: int, chosen: Mapping[int, StaticFactor]) -> bool:
        if factor.kind is FactorKind.ZERO_REDUCE and not self.states[0].zero:
            return False
        if not self.fits(factor, axis, chosen):
            return False
        dim_of = self.setting.program.dim_of
        for value, state, place in zip(self.op.operands, self.states, factor.operands, strict=True):
            if place >= 0 and (not state.lazy or dim_of[value][place] not in state.lazy):
                return True
        return False

    def fits(self, factor: StaticFactor, axis: int, chosen: Mapping[int, StaticFactor]) -> bool:
        """Whether a factor can take one more axis beside those that already shard it."""
        setting = self.setting
        shards = setting.axis_sizes[axis]
        for other, taken in chosen.items():
            if taken is factor:
                shards *= setting.axis_sizes[other]
            elif taken.factor == factor.factor and is_indexed(factor):
                return False
        size = setting.sizes[factor.factor]
        return size >= shards and size % shards == 0

    def _result_cost(self, factor: StaticFactor, axis: int) -> float:
        """What a pending sum will cost later; and owners compute: weight gradients stay where the weights are."""
        setting, op = self.setting, self.op
        program, role = setting.program, setting.axes[axis].role
        result = op.results[0]
        weight_like = not program.has_batch[result]
        if makes_summands(factor):
            if not weight_like:
                n = setting.axis_sizes[axis]
                return 2.0 * self._result_bytes(result, axis) * (n - 1) / n
            if role is Role.TENSOR and any(f in setting.allowed[axis] for f in program.positions[result]):
                return FORBIDDEN
            return 0.0
        if (
            weight_like
            and role in (Role.DATA, Role.SEQUENCE)
            and op.primitive == "dot_general"
            and any(f.kind is FactorKind.REDUCE and f.factor in setting.allowed[axis] for f in op.factors)
        ):
            return FORBIDDEN
        return 0.0

    def _result_bytes(self, result: int, axis: int) -> float:
        """Bytes of the result where every other axis that shards an operand shards it too."""
        setting = self.setting
        size = setting.whole_bytes(result)
        for other, n in enumerate(setting.axis_sizes):
            if other != axis and any(state.layouts[0][other] >= 0 for state in self.states):
                size /= n
        return size

    # ------------------------------------------------------------------------------------------ pending sums

    def keeps_pending(self, axis: int) -> bool:
        """Whether the pending sum over an axis may pass this operation unresolved."""
        pending = [state.layouts[0][axis] == PENDING for state in self.states]
        if True not in pending:
            return False
        op, program, states = self.op, self.setting.program, self.states
        if op.linearity is Linearity.UNARY:
            activation = program.has_batch[op.operands[0]]
            tensor_activation = self.setting.axes[axis].role is Role.TENSOR and activation
            summed = op.primitive == "reduce_sum" and tensor_activation
            return pending[0] and not summed and not (activation and self._widens())
        if op.linearity is Linearity.ADDITIVE:
            return all(p or state.zero for p, state in zip(pending, states, strict=True))
        if op.linearity is Linearity.LAST:
            summand = not program.has_batch[op.operands[-1]] and (pending[0] or states[0].zero)
            return pending[-1] and summand and not any(pending[1:-1])
        if op.linearity is Linearity.SCALE:
            weight_like = not program.has_batch[op.results[0]]
            scales = [not p and (weight_like or self._is_scalar(n)) for n, p in enumerate(pending)]
            if op.primitive == "div":
                return pending[0] and scales[1]
            return sum(pending) == 1 and all(p or s for p, s in zip(pending, scales, strict=True))
        return False

    def _widens(self) -> bool:
        """Whether the operation converts to a wider type: half the bytes would have moved before it.

        Gradients of weights pass on pending even so: they are summed over micro-batches in the wider type first.
        """
        size = self.setting.program.itemsize
        return self.op.primitive == "convert_element_type" and size[self.op.results[0]] > size[self.op.operands[0]]

    def _narrows(self) -> bool:
        """Whether the operation converts to a narrower type."""
        size = self.setting.program.itemsize
        return self.op.primitive == "convert_element_type" and size[self.op.results[0]] < size[self.op.operands[0]]

    def _is_scalar(self, operand: int) -> bool:
        state, dims = self.states[operand], self.setting.program.dim_of[self.op.operands[operand]]
        return PENDING not in state.layouts[0] and all(dim in state.lazy for dim in dims)
