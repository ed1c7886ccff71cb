"""Cuts the marked forward program into segments: what precedes the layers, each layer, what lies between and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from galvatron_jax import _compat
from galvatron_jax.trace.flat import Aval, FlatOp, drop_dead
from galvatron_jax.trace.marks import layer_mark_p


@dataclass
class ForwardProgram:
    """The whole forward pass over globally numbered values, marks still in it.

    Calls with derivative rules of their own (`custom_vjp`, `jax.checkpoint`) are kept whole.
    """

    avals: list[Aval] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    operations: list[FlatOp] = field(default_factory=list)
    sources: dict[int, str] = field(default_factory=dict)
    """Inputs: value to `param:PATH`, `state:PATH` or `batch:PATH`; slices of stacked ones as `PATH[i]`."""

    def new(self, aval: Any) -> int:
        """A new value."""
        self.avals.append(Aval(tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", jnp.float32)))
        return len(self.avals) - 1


@dataclass(frozen=True)
class Segment:
    """One piece of the forward program."""

    name: str
    block: bool
    """Whether it is a marked block or the body of a scan over parameters."""
    operations: tuple[FlatOp, ...]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def has_marks(jaxpr: jex.Jaxpr) -> bool:
    """Whether a layer mark is in a jaxpr or a call in it."""
    for equation in jaxpr.eqns:
        if equation.primitive is layer_mark_p:
            return True
        call = _compat.call_jaxpr(equation)
        if call is not None and has_marks(call[0]):
            return True
    return False


_TRANSPARENT = frozenset({"jit", "pjit", "closed_call", "core_call"})


class _Reader:
    """Reads a jaxpr into a `ForwardProgram`, opening calls that hold marks and unrolling scans over parameters."""

    def __init__(self, program: ForwardProgram, *, unroll: bool) -> None:
        self.program = program
        self.unroll = unroll
        self.inside = 0

    def read(self, jaxpr: jex.Jaxpr, consts: Sequence[int], inputs: Sequence[int]) -> list[int]:
        env: dict[jex.Var, int] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def value(atom: Any) -> int:
            return self.constant(atom.val, atom.aval) if isinstance(atom, jex.Literal) else env[atom]

        for equation in jaxpr.eqns:
            results = self.equation(equation, [value(v) for v in equation.invars])
            env.update(zip(equation.outvars, results, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def constant(self, array: Any, aval: Any = None) -> int:
        number = self.program.new(aval if aval is not None else jax.typeof(array))
        self.program.constants[number] = array
        return number

    def equation(self, equation: jex.JaxprEqn, operands: list[int]) -> list[int]:
        name = equation.primitive.name
        call = _compat.call_jaxpr(equation)
        if call is not None and (name in _TRANSPARENT or has_marks(call[0])):
            return self.read(call[0], [self.constant(c) for c in call[1]], operands)
        if equation.primitive is layer_mark_p:
            self.inside += 1 if equation.params["entry"] else -1
        elif name == "scan" and self.unroll and not self.inside and self.scans_parameters(equation, operands):
            return self.unrolled(equation, operands)
        return self.apply(equation.primitive, equation.params, operands, equation.outvars)

    def apply(self, primitive: jex.Primitive, params: Mapping, operands: Sequence[int], outvars: Sequence) -> list[int]:
        results = [self.program.new(v.aval) for v in outvars]
        self.program.operations.append(FlatOp(primitive, params, tuple(operands), tuple(results)))
        return results

    def scans_parameters(self, equation: jex.JaxprEqn, operands: list[int]) -> bool:
        consts, carry = _compat.scan_counts(equation)
        scanned = operands[consts + carry :]
        return equation.params["length"] > 1 and any(
            self.program.sources.get(v, "").startswith("param:") for v in scanned
        )

    def unrolled(self, equation: jex.JaxprEqn, operands: list[int]) -> list[int]:
        """A scan over stacked layers, as one marked block per layer."""
        consts, carry = _compat.scan_counts(equation)
        length, body = equation.params["length"], equation.params["jaxpr"]
        fixed, carried, scanned = operands[:consts], operands[consts : consts + carry], operands[consts + carry :]
        stacks: list[list[int]] = [[0] * length for _ in equation.outvars[carry:]]
        order = range(length - 1, -1, -1) if equation.params["reverse"] else range(length)
        body_consts = [self.constant(c) for c in body.consts]
        for step in order:
            slices = [self.slice(v, step) for v in scanned]
            inputs = self.mark([*carried, *slices], entry=True)
            self.inside += 1
            results = self.read(body.jaxpr, body_consts, [*fixed, *inputs])
            self.inside -= 1
            results = self.mark(results, entry=False)
            carried = results[:carry]
            for stack, result in zip(stacks, results[carry:], strict=True):
                stack[step] = result
        return [*carried, *(self.stack(stack) for stack in stacks)]

    def mark(self, values: list[int], *, entry: bool) -> list[int]:
        results = [self.program.new(self.program.avals[v]) for v in values]
        params = {"entry": entry, "block": "Scan"}
        self.program.operations.append(FlatOp(layer_mark_p, params, tuple(values), tuple(results)))
        return results

    def slice(self, value: int, index: int) -> int:
        """Slice `index` of a stacked value: a source of its own for parameters and state."""
        aval = self.program.avals[value]
        source = self.program.sources.get(value, "")
        if source.startswith(("param:", "state:")):
            number = self.program.new(Aval(aval.shape[1:], aval.dtype))
            self.program.sources[number] = f"{source}[{index}]"
            return number
        shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return self.traced(lambda x: jax.lax.index_in_dim(x, index, keepdims=False), [shape], [value])

    def stack(self, values: list[int]) -> int:
        shapes = [jax.ShapeDtypeStruct(self.program.avals[v].shape, self.program.avals[v].dtype) for v in values]
        return self.traced(lambda *xs: jnp.stack(xs), shapes, values)

    def traced(self, function: Any, shapes: list, values: list[int]) -> int:
        closed = jax.make_jaxpr(function)(*shapes)
        return self.read(closed.jaxpr, [self.constant(c) for c in closed.consts], values)[0]


def read_forward(closed: jex.ClosedJaxpr, sources: Sequence[str], *, unroll: bool) -> tuple[ForwardProgram, list[int]]:
    """Reads a traced loss; `sources` names its inputs. Returns the program and its outputs.

    Args:
        closed: the traced function.
        sources: per input, `param:PATH`, `state:PATH` or `batch:PATH`.
        unroll: whether scans over parameters become layers.
    """
    program = ForwardProgram()
    inputs = [program.new(v.aval) for v in closed.jaxpr.invars]
    program.sources.update(zip(inputs, sources, strict=True))
    reader = _Reader(program, unroll=unroll)
    outputs = reader.read(closed.jaxpr, [reader.constant(c) for c in closed.consts], inputs)
    return program, outputs


def resolve_stacks(program: ForwardProgram, outputs: list[int]) -> list[tuple[int, ...]]:
    """Per output, the values it is stacked from when a stack of layers' outputs made it; else itself alone.

    Stacked state (the counters of a scanned stack) so is read from the layers directly, and no stack is built.
    """
    producers = {r: op for op in program.operations for r in op.results}
    found = []
    for output in outputs:
        op = producers.get(output)
        parts = [output]
        if op is not None and op.primitive.name == "stack":
            parts = list(op.operands)
        elif op is not None and op.primitive.name == "concatenate":
            makers = [m for m in map(producers.get, op.operands) if m is not None]
            grown = all(m.primitive.name in ("broadcast_in_dim", "reshape", "expand_dims") for m in makers)
            if grown and len(makers) == len(op.operands):
                inner = [m.operands[0] for m in makers]
                shapes = {program.avals[v].shape for v in inner}
                if shapes == {program.avals[output].shape[1:]}:
                    parts = inner
        found.append(tuple(parts))
    return found


def cut(program: ForwardProgram, outputs: Sequence[int]) -> tuple[list[Segment], list[int]]:
    """Splits the program at its marks.

    What lies between two layers is a segment of its own when it reads parameters, and else joins the next layer.
    Returns the segments and the outputs with marks seen through.
    """
    pieces: list[tuple[str, bool, list[FlatOp]]] = [("pre", False, [])]
    alias: dict[int, int] = {}

    def resolve(value: int) -> int:
        while value in alias:
            value = alias[value]
        return value

    for op in program.operations:
        if op.primitive is layer_mark_p:
            alias.update(zip(op.results, op.operands, strict=True))
            pieces.append((op.params["block"], True, []) if op.params["entry"] else ("glue", False, []))
            continue
        pieces[-1][2].append(replace(op, operands=tuple(map(resolve, op.operands))))
    final = [resolve(v) for v in outputs]
    live = {id(op) for op in drop_dead([op for _, _, ops in pieces for op in ops], final)}
    pieces = [(name, block, [op for op in ops if id(op) in live]) for name, block, ops in pieces]
    pieces = _join_glue([p for p in pieces if p[2]], program)
    return _with_boundaries(pieces, program, final), final


def _join_glue(pieces: list, program: ForwardProgram) -> list:
    """Names the pieces; parameterless operations between two layers become the beginning of the second."""
    joined: list[tuple[str, bool, list[FlatOp]]] = []
    pending: list[FlatOp] = []
    for position, (name, block, ops) in enumerate(pieces):
        first, last = position == 0, position == len(pieces) - 1
        if not block and not first and not last and not _reads_parameters(ops, program):
            pending = ops
            continue
        if not block:
            name = "model" if first and last else "embedding" if first else "head" if last else "glue"
        joined.append((name, block, pending + ops))
        pending = []
    return joined


def _reads_parameters(operations: Sequence[FlatOp], program: ForwardProgram) -> bool:
    return any(program.sources.get(v, "").startswith("param:") for op in operations for v in op.operands)


def _with_boundaries(pieces: list, program: ForwardProgram, outputs: Sequence[int]) -> list[Segment]:
    """Live-ins in order of first use and live-outs in order of production, per segment."""
    live = set(outputs)
    segments: list[Segment] = []
    for name, block, ops in reversed(pieces):
        made = {r for op in ops for r in op.results}
        used = dict.fromkeys(v for op in ops for v in op.operands if v not in made and v not in program.constants)
        outs = tuple(r for op in ops for r in op.results if r in live)
        live = (live - made) | set(used)
        segments.append(Segment(name, block, tuple(ops), tuple(used), outs))
    return segments[::-1]
