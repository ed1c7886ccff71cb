"""The partitioner's emitting half: a planned program run on local arrays inside a fully manual `shard_map`.

Nothing is decided here: conversions and applications come from the plan, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galvatron_jax.partition.instructions import Apply, Convert, Instruction, Loop, Version, results_of
from galvatron_jax.partition.layers import LocalPlan
from galvatron_jax.partition.layout import NOWHERE, Step, StepKind
from galvatron_jax.partition.liveness import needed
from galvatron_jax.runtime.binders import LocalBind, bind_local
from galvatron_jax.trace.flat import FlatProgram


@dataclass(frozen=True)
class Collectives:
    """How steps are run: for real, or by stand-ins of the same shapes where there is no mesh."""

    all_reduce: Callable[[Any, tuple[str, ...]], Any]
    all_gather: Callable[[Any, tuple[str, ...], int, int], Any]
    reduce_scatter: Callable[[Any, tuple[str, ...], int, int], Any]
    all_to_all: Callable[[Any, tuple[str, ...], int, int, int], Any]
    index: Callable[[tuple[str, ...]], Any]
    combine: Callable[[Any, tuple[str, ...], str], Any]


def _combine(x: Any, names: tuple[str, ...], how: str) -> Any:
    whole = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
    return (lax.pmax if how == "max" else lax.pmin)(whole, names).astype(x.dtype)


REAL = Collectives(
    all_reduce=lax.psum,
    all_gather=lambda x, names, size, dim: lax.all_gather(x, names, axis=dim, tiled=True),
    reduce_scatter=lambda x, names, size, dim: lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True),
    all_to_all=lambda x, names, size, split, join: lax.all_to_all(x, names, split, join, tiled=True),
    index=lax.axis_index,
    combine=_combine,
)


def _part(x: Any, size: int, dim: int) -> Any:
    return lax.slice_in_dim(x, 0, x.shape[dim] // size, axis=dim)


STAND_INS = Collectives(
    all_reduce=lambda x, names: x,
    all_gather=lambda x, names, size, dim: jnp.concatenate([x] * size, dim),
    reduce_scatter=lambda x, names, size, dim: _part(x, size, dim),
    all_to_all=lambda x, names, size, split, join: jnp.concatenate([_part(x, size, split)] * size, join),
    index=lambda names: jnp.int32(0),
    combine=lambda x, names, how: x,
)
"""The local work of a program without its communication: what the profiler times."""


def _summands(via: Collectives) -> Collectives:
    """The same with gathers that leave zeros for what other devices have: the whole array is the sum over all."""

    def amid_zeros(x: Any, names: tuple[str, ...], size: int, dim: int) -> Any:
        whole = jnp.zeros((*x.shape[:dim], x.shape[dim] * size, *x.shape[dim + 1 :]), x.dtype)
        return lax.dynamic_update_slice_in_dim(whole, x, via.index(names) * x.shape[dim], axis=dim)

    return replace(via, all_gather=amid_zeros)


def run_steps(x: Any, steps: Sequence[Step], shape: tuple[int, ...], *, via: Collectives = REAL, lead: int = 0) -> Any:
    """Brings a local array into another layout.

    Args:
        x: local array, collapsed dim by dim, with `lead` extra leading dims that the layout does not know.
        steps: as planned.
        shape: local shape of the result, without the leading dims.
        via: how collectives are run.
        lead: number of extra leading dims (layers of a stack).
    """
    head, dtype = x.shape[:lead], x.dtype
    for step in steps:
        x = jnp.reshape(x, head + step.shape)
        if step.dtype is not None:
            x = x.astype(step.dtype)
        split, join = step.split + lead, step.join + lead
        if step.kind is StepKind.SLICE:
            size = x.shape[split] // step.size
            x = lax.dynamic_slice_in_dim(x, via.index(step.names) * size, size, axis=split)
        elif step.kind is StepKind.ALL_REDUCE:
            x = via.all_reduce(x, step.names)
        elif step.kind is StepKind.ALL_GATHER:
            x = via.all_gather(x, step.names, step.size, join)
        elif step.kind is StepKind.REDUCE_SCATTER:
            x = via.reduce_scatter(x, step.names, step.size, split)
        else:
            x = via.all_to_all(x, step.names, step.size, split, join)
    x = jnp.reshape(x, head + shape)
    return x if x.dtype == dtype else x.astype(dtype)


@dataclass
class Evaluator:
    """Runs one planned program on local arrays."""

    local: LocalPlan
    flat: FlatProgram
    via: Collectives = REAL
    env: dict[Version, Any] = field(default_factory=dict)
    watch: Callable[[int, Version, Any], None] | None = None
    """Called with each operation's results (the self-check's hook)."""

    def run(self, instructions: Sequence[Instruction]) -> None:
        """Executes instructions in order."""
        for instruction in instructions:
            if isinstance(instruction, Convert):
                x = self.read((instruction.value, instruction.source))
                self.env[instruction.value, instruction.target] = run_steps(
                    x, instruction.steps, instruction.shape, via=self.via
                )
            elif isinstance(instruction, Loop):
                self.loop(instruction)
            else:
                self.apply(instruction)

    def read(self, version: Version) -> Any:
        """An array by value and version; constants are at hand."""
        if version not in self.env:
            self.env[version] = self._constant(version[0])
        return self.env[version]

    def _constant(self, value: int) -> Any:
        aval = self.flat.avals[value]
        constant = self.flat.constants[value]
        if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
            return constant
        return jnp.asarray(constant, aval.dtype)

    def _operands(self, instruction: Apply | Loop) -> list[Any]:
        return [
            self.read(v) if shape is None else jnp.broadcast_to(self.read(v), shape)
            for v, shape in zip(instruction.operands, instruction.materialise, strict=True)
        ]

    def loop(self, instruction: Loop) -> None:
        """Runs a scan on local arrays."""
        op = self.flat.operations[instruction.operation]
        assert op.loop is not None
        consts, carried, trips = op.loop
        body = op.bodies[0]
        operands = self._operands(instruction)

        def trip(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            inner = Evaluator(self.local, body, self.via)
            arrays = [*operands[:consts], *carry, *slices]
            inner.env.update({(v, 0): x for v, x in zip(body.inputs, arrays, strict=True)})
            inner.run(instruction.body)
            handed = [
                jnp.broadcast_to(inner.read(v), shape)
                for v, shape in zip(instruction.outputs, instruction.output_shapes, strict=True)
            ]
            return handed[:carried], handed[carried:]

        final, stacked = lax.scan(
            trip,
            operands[consts : consts + carried],
            operands[consts + carried :],
            length=trips,
            reverse=op.params["reverse"],
            unroll=op.params["unroll"],
        )
        self.env.update(zip(instruction.results, [*final, *stacked], strict=True))

    def apply(self, instruction: Apply) -> None:
        """Applies one operation."""
        op = self.flat.operations[instruction.operation]
        operands = self._operands(instruction)
        bind = LocalBind(
            op,
            tuple(self.flat.avals[v].shape for v in op.operands),
            tuple(self.flat.avals[v].shape for v in op.results),
            instruction.shapes,
            instruction.shifts,
            self.via.index,
        )
        results = bind_local(bind, operands)
        for version, result, shape in zip(instruction.results, results, instruction.shapes, strict=True):
            if instruction.combine is not None:
                result = self.via.combine(result, *instruction.combine)
            assert jnp.shape(result) == shape, f"{op.primitive}: {jnp.shape(result)} where {shape} was planned"
            self.env[version] = result
            if self.watch is not None:
                self.watch(instruction.operation, version, result)


def needed_forward(local: LocalPlan, ports: Container[int]) -> tuple[Instruction, ...]:
    """The forward instructions that some output ports and the residuals rest on."""
    versions = [(r.value, r.version) for r in local.residuals]
    versions += [v for q, v in enumerate(local.output_versions) if q in ports]
    return needed(local.forward, versions)


def still_to_do(instructions: Sequence[Instruction], made: Container[Version]) -> list[Instruction]:
    """The instructions of which something is not made yet."""
    return [each for each in instructions if any(version not in made for version in results_of(each))]


@dataclass(frozen=True)
class LayerProgram:
    """A planned layer as two functions on local arrays."""

    local: LocalPlan
    flat: FlatProgram
    via: Collectives = REAL

    def forward(
        self, inputs: Sequence[Any], ports: Container[int] | None = None, made: dict[Version, Any] | None = None
    ) -> tuple[list[Any | None], list[Any]]:
        """From the input ports' arrays to the output ports' and the residuals.

        Args:
            inputs: local arrays.
            ports: which outputs are wanted; None for all. The others are None.
            made: takes all that is made on the way, for a backward that follows at once.
        """
        kind = self.local.static.kind
        evaluator = Evaluator(self.local, self.flat, self.via)
        evaluator.env.update({(p.value, 0): x for p, x in zip(kind.inputs, inputs, strict=True)})
        evaluator.run(self.local.forward if ports is None else needed_forward(self.local, ports))
        outputs = [
            self._whole(evaluator.read(v), p.value, layout) if ports is None or q in ports else None
            for q, (v, p, layout) in enumerate(
                zip(self.local.output_versions, kind.outputs, self.local.outputs, strict=True)
            )
        ]
        if made is not None:
            made.update(evaluator.env)
        return outputs, [evaluator.read((r.value, r.version)) for r in self.local.residuals]

    def _whole(self, x: Any, value: int, layout: tuple[int, ...]) -> Any:
        """An output with lazily broadcast dims made whole."""
        return jnp.broadcast_to(x, self.shape(value, layout))

    def shape(self, value: int, layout: Sequence[int]) -> tuple[int, ...]:
        """Local shape of a value under a layout, dim by dim."""
        program, local = self.local.static.program, [1] * self.local.static.program.rank[value]
        for position, factor in enumerate(program.positions[value]):
            local[program.dim_of[value][position]] *= self.local.sizes[factor]
        for axis, place in enumerate(layout):
            if place >= 0:
                local[program.dim_of[value][place]] //= self.local.axes.axes[axis].size
        return tuple(local)

    def summand(self, port: int, x: Any) -> Any:
        """An input port's gradient, as backward makes it, as this device's summand of the whole."""
        how, value = self.local.summands[port], self.local.static.kind.inputs[port].value
        shape = self.shape(value, (NOWHERE,) * len(self.local.axes.axes))
        whole = run_steps(x, how.steps, shape, via=_summands(self.via))
        return jnp.where(self.via.index(how.repeated) == 0, whole, jnp.zeros_like(whole)) if how.repeated else whole

    def backward(
        self,
        inputs: Sequence[Any],
        residuals: Sequence[Any],
        cotangents: Mapping[int, Any],
        made: Mapping[Version, Any] | None = None,
    ) -> list[Any]:
        """From inputs, residuals and the output ports' cotangents to gradients, in order of the input ports.

        Args:
            inputs: as forward took them.
            residuals: as forward gave them.
            cotangents: by output port.
            made: what forward made, if this follows at once: none of it is done again.
        """
        kind = self.local.static.kind
        evaluator = Evaluator(self.local, self.flat, self.via)
        evaluator.env.update({(p.value, 0): x for p, x in zip(kind.inputs, inputs, strict=True) if x is not None})
        for residual, x in zip(self.local.residuals, residuals, strict=True):
            evaluator.env[residual.value, residual.backward_version] = x
        for q, x in cotangents.items():
            seed = kind.outputs[q].cotangent
            assert seed is not None, f"output {q} has no cotangent"
            evaluator.env[seed, 0] = x
        made = made or {}
        again = self.local.shared_versions
        evaluator.env.update({v: made[again[v]] for v in again if v not in evaluator.env and again[v] in made})
        evaluator.run(still_to_do(self.local.backward, evaluator.env) if made else self.local.backward)
        gradients = [p.gradient for p in kind.inputs if p.gradient is not None]
        return [
            jnp.broadcast_to(evaluator.read(v), self.shape(gradient, layout))
            for v, gradient, layout in zip(
                self.local.gradient_versions, gradients, self.local.gradient_layouts, strict=True
            )
        ]
