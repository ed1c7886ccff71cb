"""How a layer's parameters are stored, accumulated, synchronised and published under one choice of logical axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from galvatron_jax.partition.counts import collectives
from galvatron_jax.partition.layer_plan import BoundarySpec, ParameterPlan
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
    order_at,
    summed_in,
)
from galvatron_jax.partition.lookups import Home
from galvatron_jax.partition.static import StaticKind
from galvatron_jax.partition.strategy_axes import (
    SMALL_PARAMETER_ELEMENTS,
    SMALL_TABLE_ELEMENTS,
    AxisPlan,
    parameter_layout,
)
from galvatron_jax.spec.program import FLOAT_BYTES


@dataclass(frozen=True)
class StoredParameter:
    """A parameter with the steps that its gradient and its update take."""

    plan: ParameterPlan
    sync: tuple[Step, ...]
    """From the accumulated gradient to the optimizer's layout."""
    publish: tuple[Step, ...]
    """From the optimizer's layout back to storage, after the update."""


class Storage:
    """A layer's parameters over some logical axes."""

    def __init__(
        self,
        static: StaticKind,
        axes: AxisPlan,
        sizes: tuple[int, ...],
        sum_dtypes: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """Nothing is laid out yet.

        Args:
            static: the layer kind.
            axes: logical axes.
            sizes: per factor.
            sum_dtypes: gradients whose sums over devices are taken in another type than their own, with that.
        """
        self.static, self.program, self.axes, self.sizes = static, static.program, axes, sizes
        self.sum_dtypes = sum_dtypes
        self._layouts: dict[tuple[int, bool], Layout] = {}
        self._parameters: dict[tuple[int, int, Layout | None], StoredParameter] = {}

    def layout(self, value: int, *, sharded: bool) -> Layout:
        """A parameter as it is stored: tensor axes on its hidden factor, and ZeRO's on the largest one with room.

        Where tensor axes lie within ZeRO's, a gather over these would need one over those: rather another factor then.
        Which one it is does not hang on how many devices the tensor axes have.
        """
        key = value, sharded
        if key not in self._layouts:
            whole = parameter_layout(self.static, value, self.axes)
            self._layouts[key] = self._sharded(value, whole) if sharded else whole
        return self._layouts[key]

    def _sharded(self, value: int, whole: Layout) -> Layout:
        positions, layout = self.program.positions[value], list(whole)
        least = SMALL_TABLE_ELEMENTS if value in self.static.bias_tables else SMALL_PARAMETER_ELEMENTS
        if math.prod(self.sizes[f] for f in positions) < least:
            return whole
        for index in self.axes.of(Role.STORAGE):
            room = [self._room(value, layout, index, position) for position in range(len(positions))]
            best = max([each for each in room if each is not None], default=None)
            if best is not None:
                layout[index] = -best[-1]
        return tuple(layout)

    def _room(self, value: int, layout: Sequence[int], index: int, position: int) -> tuple | None:
        """How good a place a position is for a storage axis, and the place negated; None where it does not fit."""
        axes, frame, factor = self.axes.axes, self._frame(value), self.program.positions[value][position]
        here = [axis for axis, at in enumerate(layout) if at == position]
        if self.sizes[factor] // math.prod([axes[axis].size for axis in here]) % axes[index].size:
            return None
        stored = any(axes[axis].role is Role.STORAGE for axis in here)
        own = order_at(axes, frame, position, index)
        within = all(order_at(axes, frame, position, axis) <= own for axis in here)
        return stored, within, self.sizes[factor], -position

    def _frame(self, value: int) -> Frame:
        return Frame(tuple([self.sizes[f] for f in self.program.positions[value]]), self.program.ascending[value])

    @cached_property
    def homes(self) -> dict[int, Home]:
        """For operations that make the gradients of tables of rows, where these are to end up under ZeRO 2 and 3."""
        found = {}
        for op, port in self.static.table_gradients.items():
            value, gradient = self.static.kind.inputs[port].value, self.static.kind.inputs[port].gradient
            layout = self.layout(value, sharded=True)
            if gradient is not None and layout != self.layout(value, sharded=False):
                dtype = self.sum_dtypes.get(gradient)
                found[op] = Home(layout, self.program.itemsize[gradient] if dtype is None else FLOAT_BYTES[dtype])
        return found

    def scattered(self, value: int, layout: Layout) -> Layout:
        """A gradient's layout once its data-parallel sums are spread over ZeRO's axes."""
        optimizer = self.layout(value, sharded=True)
        result = list(self.mirrored(layout))
        for index in self.axes.of(Role.STORAGE):
            result[index] = optimizer[index]
        for index in self.axes.of(Role.TENSOR):
            result[index] = layout[index]
        return tuple(result)

    def mirrored(self, layout: Layout) -> Layout:
        """Pending sums over data axes as pending sums over the storage axes that mirror them."""
        result = list(layout)
        for index in self.axes.of(Role.STORAGE):
            mirror = self.axes.axes[index].mirror
            if mirror is not None and layout[mirror] == PENDING:
                result[index], result[mirror] = PENDING, NOWHERE
        return tuple(result)

    def parameter(self, port: int, *, zero: int, accumulated: Layout | None) -> StoredParameter:
        """A parameter's way through a step.

        Args:
            port: its input port.
            zero: ZeRO stage.
            accumulated: its gradient's layout; None where it has no gradient.
        """
        key = port, zero, accumulated
        if key not in self._parameters:
            self._parameters[key] = self._parameter(port, zero, accumulated)
        return self._parameters[key]

    def _parameter(self, index: int, zero: int, accumulated: Layout | None) -> StoredParameter:
        port, axes = self.static.kind.inputs[index], self.axes.axes
        value = port.value
        stored, optimizer = self.layout(value, sharded=zero == 3), self.layout(value, sharded=zero >= 1)
        frame = self._frame(value)
        held = accumulated if accumulated is not None else self.layout(value, sharded=False)
        # ZeRO's axes take over the data axes' sums.
        sync = tuple(convert(axes, frame, self.mirrored(held) if zero == 1 else held, optimizer))
        if port.gradient in self.sum_dtypes:
            sync = summed_in(sync, self.sum_dtypes[port.gradient])
        publish = tuple(convert(axes, frame, optimizer, stored))
        size, dtype = self.program.itemsize[value], self.program.program.values[value].dtype
        plan = ParameterPlan(
            port=index,
            name=port.name,
            storage=self._factor_spec(value, frame, stored),
            optimizer=self._factor_spec(value, frame, optimizer),
            storage_bytes=self._bytes(frame, stored, size),
            optimizer_bytes=self._bytes(frame, optimizer, size),
            accumulator_bytes=self._bytes(frame, held, size),
            sync=collectives(sync, size, dtype),
            publish=collectives(publish, size, dtype),
            turned=self._turned(value, frame, stored),
        )
        return StoredParameter(plan, sync, publish)

    def _turned(self, value: int, frame: Frame, stored: Layout) -> bool:
        """Whether some axis gathers a stored parameter along another dim than the first of more than one element."""
        first = next((position for position, size in enumerate(frame.sizes) if size > 1), 0)
        whole = self.layout(value, sharded=False)
        return any(now != then and now > first for now, then in zip(stored, whole, strict=True))

    def _bytes(self, frame: Frame, layout: Layout, size: int) -> int:
        total = math.prod(frame.sizes) * size
        for axis, place in zip(self.axes.axes, layout, strict=True):
            if place >= 0:
                total //= axis.size
        return total

    def _factor_spec(self, value: int, frame: Frame, layout: Layout) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Per dim and factor, the mesh axes on it."""
        dims: list[list[tuple[str, ...]]] = [[] for _ in range(self.program.rank[value])]
        for position, dim in enumerate(self.program.dim_of[value]):
            dims[dim].append(_axes_at(self.axes.axes, frame, layout, position))
        return tuple(tuple(d) for d in dims)

    def boundary_spec(self, value: int, layout: Layout) -> BoundarySpec:
        """Mesh axes per dim of a value that crosses layers."""
        program = self.program
        frame = self._frame(value)
        dims: list[tuple[str, ...]] = [()] * program.rank[value]
        for position, dim in enumerate(program.dim_of[value]):
            dims[dim] += _axes_at(self.axes.axes, frame, layout, position)
        return tuple(dims)


def _axes_at(axes: tuple[Axis, ...], frame: Frame, layout: Layout, position: int) -> tuple[str, ...]:
    """Mesh axes at a position, major to minor."""
    found = [i for i, at in enumerate(layout) if at == position]
    found.sort(key=lambda i: order_at(axes, frame, position, i))
    return tuple(n for i in found for n in names_at(axes, frame, position, i))
