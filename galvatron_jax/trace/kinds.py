"""Layer kinds: segments that one program serves, and that program, forward and backward traced together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from galvatron_jax import _compat
from galvatron_jax.trace.flat import Aval, FlatProgram, flatten
from galvatron_jax.trace.slicing import ForwardProgram, Segment


@dataclass(frozen=True)
class Flow:
    """Where gradients flow in the whole forward program."""

    depends: frozenset[int]
    """Values that depend on a parameter through floating values."""
    reaches: frozenset[int]
    """Values that the loss depends on through floating values."""

    def carries_gradient(self, value: int) -> bool:
        """Whether the loss has a gradient with respect to this value that training needs."""
        return value in self.depends and value in self.reaches


def gradient_flow(program: ForwardProgram, segments: Sequence[Segment], loss: int) -> Flow:
    """Forward reachability from the parameters and backward reachability from the loss, over floats."""
    operations = [op for segment in segments for op in segment.operations]
    floats = [aval.is_float for aval in program.avals]
    depends = {v for v, source in program.sources.items() if source.startswith("param:") and floats[v]}
    for op in operations:
        if any(v in depends for v in op.operands):
            depends.update(r for r in op.results if floats[r])
    reaches = {loss}
    for op in reversed(operations):
        if any(r in reaches for r in op.results):
            reaches.update(v for v in op.operands if floats[v])
    return Flow(frozenset(depends), frozenset(reaches))


@dataclass(frozen=True)
class Shape:
    """A segment with its values numbered by itself: what two layers of one kind share."""

    text: str
    """Structure in full, constants' values left out."""
    constants: tuple[int, ...]
    """Constants of the forward program in order of first use."""
    number: Mapping[int, int]
    """From values of the forward program to numbers within the segment."""


def shape_of(segment: Segment, program: ForwardProgram, flow: Flow) -> Shape:
    """Numbers the segment's values in order of use and writes its structure down."""
    number: dict[int, int] = {}
    constants: list[int] = []
    lines = []

    def name(value: int) -> str:
        if value not in number:
            number[value] = len(number)
            if value in program.constants:
                constants.append(value)
        return str(number[value])

    for value in segment.inputs:
        role = program.sources.get(value, "value:").split(":")[0]
        lines.append(f"in {name(value)} {_aval(program.avals[value])} {role} {flow.carries_gradient(value)}")
    for op in segment.operations:
        operands = ",".join(
            f"{name(v)}:{_aval(program.avals[v])}" if v in program.constants else name(v) for v in op.operands
        )
        results = ",".join(f"{name(r)}:{_aval(program.avals[r])}" for r in op.results)
        lines.append(f"{op.primitive.name} {_params(op.params)} {operands} -> {results}")
    lines += [f"out {name(v)} {flow.carries_gradient(v)}" for v in segment.outputs]
    return Shape("\n".join(lines), tuple(constants), number)


def _aval(aval: Aval) -> str:
    return f"{aval.dtype}{list(aval.shape)}"


def _params(params: Mapping[str, Any]) -> str:
    text = ", ".join(f"{k}={v}" for k, v in sorted(params.items()) if k not in ("name", "debug_info"))
    return re.sub(r"0x[0-9a-f]+", "", text)


def digest(*parts: str) -> str:
    """A short stable hash of texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def same_constant(a: Any, b: Any) -> bool:
    """Whether two traced constants hold the same value."""
    if a is b:
        return True
    if jax.dtypes.issubdtype(getattr(a, "dtype", np.float32), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=_is_float(a))


def _is_float(a: Any) -> bool:
    return jax.dtypes.issubdtype(np.asarray(a).dtype, np.floating)


@dataclass(frozen=True)
class JointProgram:
    """A kind's forward and backward as one flat program.

    Inputs: the ports' values, then the cotangents. Outputs: the ports' values, then the gradients.
    """

    flat: FlatProgram
    num_inputs: int
    num_outputs: int
    differentiated: tuple[int, ...]
    """Input ports with a gradient, in the order of the gradients."""
    cotangents: tuple[int, ...]
    """Output ports with a cotangent, in the order of the cotangents."""


def joint_program(
    segment: Segment,
    program: ForwardProgram,
    flow: Flow,
    hoisted: Sequence[int],
) -> JointProgram:
    """Traces a segment and its vector-Jacobian product together.

    Args:
        segment: one layer of the kind.
        program: the forward program it was cut from.
        flow: where gradients flow.
        hoisted: constants of the segment that differ between layers of the kind: extra inputs, after the live-ins.
    """
    inputs = [*segment.inputs, *hoisted]
    differentiated = tuple(i for i, v in enumerate(inputs) if flow.carries_gradient(v))
    cotangents = tuple(i for i, v in enumerate(segment.outputs) if flow.carries_gradient(v))

    def forward(values: Sequence[Any]) -> list[Any]:
        env: dict[int, Any] = {v: program.constants[v] for v in _constants_of(segment, program)}
        env.update(zip(inputs, values, strict=True))
        for op in segment.operations:
            results = _compat.bind_equation(op.primitive, op.params, [env[v] for v in op.operands])
            env.update(zip(op.results, results, strict=True))
        return [env[v] for v in segment.outputs]

    def joint(values: Sequence[Any], gradients_in: Sequence[Any]) -> tuple[list, tuple]:
        def active(*floats: Any) -> tuple[tuple, list]:
            whole = list(values)
            for port, value in zip(differentiated, floats, strict=True):
                whole[port] = value
            outputs = forward(whole)
            return tuple(outputs[port] for port in cotangents), outputs

        _, pullback, outputs = jax.vjp(active, *(values[p] for p in differentiated), has_aux=True)
        return outputs, pullback(tuple(gradients_in))

    shapes = [_struct(program.avals[v]) for v in inputs]
    seeds = [_struct(program.avals[segment.outputs[port]]) for port in cotangents]
    if not cotangents:
        closed = jax.make_jaxpr(lambda values: forward(values))(shapes)
        differentiated = ()
    else:
        closed = jax.make_jaxpr(joint)(shapes, seeds)
    return JointProgram(flatten(closed), len(inputs), len(segment.outputs), differentiated, cotangents)


def _constants_of(segment: Segment, program: ForwardProgram) -> set[int]:
    used = {v for op in segment.operations for v in op.operands} | set(segment.outputs)
    return {v for v in used if v in program.constants}


def _struct(aval: Aval) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
