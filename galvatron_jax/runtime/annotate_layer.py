"""A planned layer on whole arrays, with the plan's layouts as constraints for XLA's own partitioner."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax import _compat
from galvatron_jax.partition.instructions import Version
from galvatron_jax.partition.layers import LocalPlan
from galvatron_jax.partition.layout import PENDING, Layout
from galvatron_jax.partition.remat import Split, split
from galvatron_jax.partition.static import StaticOp
from galvatron_jax.spec.strategy import Remat
from galvatron_jax.trace.flat import FlatProgram

_CONTRACTIONS = ("dot_general", "conv_general_dilated")


@dataclass(frozen=True)
class AnnotatedLayer:
    """The annotate executor's counterpart of `LayerProgram`: the same two functions, on global arrays.

    Contractions' results, and values that cross from forward to backward, are constrained to the layout in which the
    plan first holds them whole; where they wait for a sum there, XLA decides.
    """

    local: LocalPlan
    flat: FlatProgram
    remat: Remat
    mesh: Mesh

    @cached_property
    def split(self) -> Split:
        """What runs forward, what runs backward, and the values that cross."""
        return split(self.local.static, self.remat)

    @cached_property
    def backward_reads(self) -> frozenset[int]:
        """Values that the backward program reads and does not make."""
        made = {v for op in self.split.backward for v in op.results}
        gradients = {p.gradient for p in self.local.static.kind.inputs if p.gradient is not None}
        return frozenset({v for op in self.split.backward for v in op.operands} | gradients) - made

    def reads_input(self, port: int) -> bool:
        """Whether the backward program reads an input port."""
        return self.local.static.kind.inputs[port].value in self.backward_reads

    def shape(self, value: int, _: Layout) -> tuple[int, ...]:
        """Shape of a value, the same in every layout."""
        return self.flat.avals[value].shape

    def forward(
        self, inputs: Sequence[Any], ports: Container[int] | None = None, made: dict[Version, Any] | None = None
    ) -> tuple[list[Any | None], list[Any]]:
        """From the input ports' arrays to the output ports' and the residuals; ports not asked for are None.

        Nothing is put into `made`: what backward repeats at once is XLA's to merge here.
        """
        kind = self.local.static.kind
        env = {p.value: x for p, x in zip(kind.inputs, inputs, strict=True)}
        self._run(self.split.forward, env, "forward")
        outputs = [
            self._read(env, p.value) if ports is None or q in ports else None for q, p in enumerate(kind.outputs)
        ]
        return outputs, [self._constrain(v, self._read(env, v), "forward") for v in self.split.saved]

    def backward(
        self,
        inputs: Sequence[Any],
        residuals: Sequence[Any],
        cotangents: Mapping[int, Any],
        made: Mapping[Version, Any] | None = None,
    ) -> list[Any]:
        """From inputs, residuals and the output ports' cotangents to gradients, in order of the input ports.

        `made` is empty; see `forward`.
        """
        kind = self.local.static.kind
        env = {p.value: x for p, x in zip(kind.inputs, inputs, strict=True) if x is not None}
        env |= dict(zip(self.split.saved, residuals, strict=True))
        for q, x in cotangents.items():
            seed = kind.outputs[q].cotangent
            assert seed is not None, f"output {q} has no cotangent"
            env[seed] = x
        self._run(self.split.backward, env, "backward")
        return [self._read(env, p.gradient) for p in kind.inputs if p.gradient is not None]

    def summand(self, port: int, x: Any) -> Any:
        """An input port's gradient as it is handed back: whole arrays need no summing."""
        return x

    def _run(self, operations: Iterable[StaticOp], env: dict[int, Any], phase: str) -> None:
        for static in operations:
            op = self.flat.operations[static.index]
            results = _compat.bind_equation(op.primitive, op.params, [self._read(env, v) for v in op.operands])
            if static.primitive in _CONTRACTIONS:
                results = [self._constrain(v, x, phase) for v, x in zip(op.results, results, strict=True)]
            env.update(zip(op.results, results, strict=True))

    def _read(self, env: dict[int, Any], value: int) -> Any:
        if value in env:
            return env[value]
        constant, dtype = self.flat.constants[value], self.flat.avals[value].dtype
        return constant if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(constant, dtype)

    def _constrain(self, value: int, x: Any, phase: str) -> Any:
        """The value laid out as the plan says, where it says so."""
        held = self.local.held[phase].get(value)
        layouts = () if held is None else held.layouts
        whole = next((layout for layout in layouts if PENDING not in layout), None)
        return x if whole is None else self.lay_out(value, x, whole)

    def lay_out(self, value: int, x: Any, layout: Layout) -> Any:
        """Constrains a value factor by factor: where one inside a dim is sharded, the dim is taken apart for it."""
        program = self.local.static.program
        factors = program.positions[value]
        if not factors:
            return x
        spec = PartitionSpec(*(self._names(value, position, layout) for position in range(len(factors))))
        split_ = jnp.reshape(x, tuple(self.local.sizes[f] for f in factors))
        return jnp.reshape(lax.with_sharding_constraint(split_, NamedSharding(self.mesh, spec)), x.shape)

    def _names(self, value: int, position: int, layout: Layout) -> tuple[str, ...] | None:
        """Mesh axes at a position, major to minor."""
        ascending = self.local.static.program.ascending[value][position]
        here = [axis for axis, place in zip(self.local.axes.axes, layout, strict=True) if place == position]
        here.sort(key=lambda axis: axis.rank, reverse=not ascending)
        return tuple(n for axis in here for n in (axis.names if ascending else axis.names[::-1])) or None
