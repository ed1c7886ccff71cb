"""Layouts at a layer's ports: what crosses layers, and parameters as they are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

from galvatron_jax.partition.layer_plan import BoundarySpec
from galvatron_jax.partition.layout import NOWHERE, PENDING, Layout, Role
from galvatron_jax.partition.parameters import Storage
from galvatron_jax.partition.static import StaticKind
from galvatron_jax.partition.strategy_axes import AxisPlan
from galvatron_jax.spec.model import InputPort, PortRole
from galvatron_jax.spec.program import FactorRole
from galvatron_jax.spec.strategy import SequenceParallel


class Ports:
    """A layer's ports over some logical axes."""

    def __init__(
        self, static: StaticKind, axes: AxisPlan, sizes: tuple[int, ...], sp_kind: SequenceParallel, storage: Storage
    ) -> None:
        self.kind, self.program, self.axes, self.sizes = static.kind, static.program, axes, sizes
        self.sp_kind, self.storage = sp_kind, storage
        self.nowhere: Layout = (NOWHERE,) * len(axes.axes)
        self.outputs = tuple(self._crossing(port.value) for port in self.kind.outputs)
        summands = tuple([NOWHERE if axis.role is Role.STORAGE else PENDING for axis in axes.axes])
        self.cotangents = tuple(
            summands if port.summands else layout for port, layout in zip(self.kind.outputs, self.outputs, strict=True)
        )
        self._inputs: dict[bool, tuple[Layout, ...]] = {}
        self._input_specs: dict[bool, tuple[BoundarySpec | None, ...]] = {}

    def inputs(self, *, sharded: bool) -> tuple[Layout, ...]:
        """Layout per input port, parameters as stored: sharded over ZeRO's axes or not."""
        if sharded not in self._inputs:
            self._inputs[sharded] = tuple(self._input(port, sharded) for port in self.kind.inputs)
        return self._inputs[sharded]

    def input_specs(self, *, sharded: bool) -> tuple[BoundarySpec | None, ...]:
        """Mesh axes per dim of each input; None for parameters."""
        if sharded not in self._input_specs:
            self._input_specs[sharded] = tuple(
                None if port.role is PortRole.PARAMETER else self.storage.boundary_spec(port.value, layout)
                for port, layout in zip(self.kind.inputs, self.inputs(sharded=sharded), strict=True)
            )
        return self._input_specs[sharded]

    def output_specs(self) -> tuple[BoundarySpec, ...]:
        """Mesh axes per dim of each output."""
        pairs = zip(self.kind.outputs, self.outputs, strict=True)
        return tuple(self.storage.boundary_spec(port.value, layout) for port, layout in pairs)

    def _input(self, port: InputPort, sharded: bool) -> Layout:
        if port.role is PortRole.PARAMETER:
            return self.storage.layout(port.value, sharded=sharded)
        if port.role in (PortRole.STATE, PortRole.CONSTANT):
            return self.nowhere
        return self._crossing(port.value)

    def _crossing(self, value: int) -> Layout:
        """Batch over the data axes; the sequence of large floating activations over the sequence axes."""
        program, layout = self.program, list(self.nowhere)
        positions = program.positions[value]
        for index in self.axes.of(Role.DATA):
            self._place(layout, index, value, [p for p, f in enumerate(positions) if f in self.axes.allowed[index]])
        if self._is_large_activation(value):
            sequence = [p for p, f in enumerate(positions) if program.roles[f] is FactorRole.SEQUENCE]
            megatron = self.sp_kind is SequenceParallel.MEGATRON
            # Minor mesh axes first: sequence dims are split in reverse mesh order.
            for index in reversed(self.axes.of(Role.TENSOR if megatron else Role.SEQUENCE)):
                if megatron or self.sp_kind is SequenceParallel.ULYSSES:
                    self._place(layout, index, value, sequence)
        return tuple(layout)

    def _is_large_activation(self, value: int) -> bool:
        roles = {self.program.roles[f] for f in self.program.positions[value]}
        dtype = self.program.program.values[value].dtype
        return {FactorRole.BATCH, FactorRole.SEQUENCE, FactorRole.EMBEDDING} <= roles and "float" in dtype

    def _place(self, layout: list[int], index: int, value: int, candidates: Sequence[int]) -> None:
        """Puts an axis on the first position that leaves the dim a plain PartitionSpec: major factors whole first."""
        positions, dims = self.program.positions[value], self.program.dim_of[value]
        for position in candidates:
            taken = self._shards_at(layout, position)
            if self.sizes[positions[position]] % (taken * self.axes.axes[index].size):
                continue
            majors = [p for p in range(position) if dims[p] == dims[position]]
            if all(self._shards_at(layout, p) == self.sizes[positions[p]] for p in majors):
                layout[index] = position
                return

    def _shards_at(self, layout: Sequence[int], position: int) -> int:
        """Into how many shards a layout cuts a position."""
        return math.prod(a.size for a, at in zip(self.axes.axes, layout, strict=True) if at == position)
