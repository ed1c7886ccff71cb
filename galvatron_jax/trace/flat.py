"""Flat programs: a jaxpr with every call inlined, values numbered, dead code dropped. What the runtime evaluates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex

from galvatron_jax import _compat


@dataclass(frozen=True)
class Aval:
    """Shape and dtype of a value. Random keys are scalars of their key dtype."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def is_float(self) -> bool:
        """Whether gradients can flow through it."""
        return jax.dtypes.issubdtype(self.dtype, np.inexact)


@dataclass(frozen=True)
class FlatOp:
    """One primitive application of a flat program."""

    primitive: jex.Primitive
    params: Mapping[str, Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    bodies: tuple[FlatProgram, ...] = ()
    loop: tuple[int, int, int] | None = None
    """For a scan: constants, carried values, trip count."""
    recomputed: bool = False
    """Whether the user's own `jax.checkpoint` asked for this to be computed again in the backward pass."""


@dataclass(frozen=True)
class FlatProgram:
    """A flat list of operations over numbered values."""

    avals: tuple[Aval, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: Mapping[int, Any] = field(repr=False)
    """Arrays and scalars known when tracing."""
    operations: tuple[FlatOp, ...]


def flatten(closed: jex.ClosedJaxpr) -> FlatProgram:
    """Inlines every call of a closed jaxpr and drops what no output needs."""
    return _Flattener().run(closed.jaxpr, list(closed.consts))


class _Flattener:
    """Numbers values and collects operations; one instance a program."""

    def __init__(self) -> None:
        self.avals: list[Aval] = []
        self.constants: dict[int, Any] = {}
        self.operations: list[FlatOp] = []

    def run(self, jaxpr: jex.Jaxpr, consts: Sequence[Any]) -> FlatProgram:
        inputs = [self.new(v.aval) for v in jaxpr.invars]
        outputs = self.inline(jaxpr, [self.constant(c) for c in consts], inputs, recomputed=False)
        operations = fold_transposes(drop_dead(self.operations, outputs), outputs, self.avals)
        used = {v for op in operations for v in op.operands} | set(outputs)
        constants = {v: c for v, c in self.constants.items() if v in used}
        return FlatProgram(tuple(self.avals), tuple(inputs), tuple(outputs), constants, tuple(operations))

    def new(self, aval: Any) -> int:
        self.avals.append(Aval(tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", np.dtype("float32"))))
        return len(self.avals) - 1

    def constant(self, array: Any, aval: Any = None) -> int:
        value = self.new(aval if aval is not None else jax.typeof(array))
        self.constants[value] = array
        return value

    def inline(self, jaxpr: jex.Jaxpr, consts: list[int], inputs: list[int], *, recomputed: bool) -> list[int]:
        env: dict[jex.Var, int] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            if isinstance(atom, jex.Literal):
                return self.constant(atom.val, atom.aval)
            return env[atom]

        for equation in jaxpr.eqns:
            operands = [read(v) for v in equation.invars]
            call = _compat.call_jaxpr(equation)
            if call is not None and len(call[0].invars) == len(operands):
                again = recomputed or (
                    equation.primitive.name in _compat.REMAT_CALLS and bool(equation.params.get("differentiated"))
                )
                inner = [self.constant(c) for c in call[1]]
                results = self.inline(call[0], inner, operands, recomputed=again)
            else:
                results = self.apply(equation, operands, recomputed)
            env.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def apply(self, equation: jex.JaxprEqn, operands: list[int], recomputed: bool) -> list[int]:
        name = equation.primitive.name
        if name == "layer_mark":
            return operands
        if name == "iota" and _compat.rank(equation.outvars[0].aval) > 1:
            return [self.iota(equation, recomputed)]
        bodies: tuple[FlatProgram, ...] = ()
        loop = None
        if name == "scan":
            body = equation.params["jaxpr"]
            bodies = (flatten(body),)
            loop = (*_compat.scan_counts(equation), equation.params["length"])
        results = [self.new(v.aval) for v in equation.outvars]
        self.operations.append(
            FlatOp(equation.primitive, equation.params, tuple(operands), tuple(results), bodies, loop, recomputed)
        )
        return results

    def iota(self, equation: jex.JaxprEqn, recomputed: bool) -> int:
        """An iota of several dims is one of a single dim, broadcast: so its other dims cost nothing."""
        aval: Any = equation.outvars[0].aval
        dimension = equation.params["dimension"]
        closed = jax.make_jaxpr(
            lambda: jax.lax.broadcast_in_dim(jax.lax.iota(aval.dtype, aval.shape[dimension]), aval.shape, (dimension,))
        )()
        return self.inline(closed.jaxpr, [self.constant(c) for c in closed.consts], [], recomputed=recomputed)[0]


def drop_dead(operations: Sequence[FlatOp], outputs: Sequence[int]) -> list[FlatOp]:
    """Operations that an output depends on, in order. Pure: effects are not kept."""
    live = set(outputs)
    kept = []
    for op in reversed(operations):
        if any(r in live for r in op.results):
            kept.append(op)
            live.update(op.operands)
    return kept[::-1]


def fold_transposes(operations: Sequence[FlatOp], outputs: Sequence[int], avals: Sequence[Aval]) -> list[FlatOp]:
    """Matrix products whose only reader transposes them, as products of their operands the other way round.

    Weight gradients come as a product and its transpose. XLA on CPU runs the folded form faster, and there is one
    value less to lay out.
    """
    readers = Counter(v for op in operations for v in op.operands)
    readers.update(outputs)
    made = {op.results[0]: op for op in operations if op.primitive is lax.dot_general_p}
    folded: dict[int, FlatOp] = {}
    for op in operations:
        product = made.get(op.operands[0]) if op.primitive is lax.transpose_p else None
        if product is not None and readers[product.results[0]] == 1:
            params = _swapped(product, op.params["permutation"], len(avals[product.operands[0]].shape))
            if params is not None:
                folded[product.results[0]] = replace(
                    product, params=params, operands=product.operands[::-1], results=op.results
                )
    done = {op.results for op in folded.values()}
    return [folded.get(op.results[0], op) for op in operations if op.results not in done]


def _swapped(product: FlatOp, permutation: Sequence[int], left_rank: int) -> dict[str, Any] | None:
    """Parameters of a matrix product with its operands swapped; None where that does not permute its result so."""
    (left, right), (left_batch, right_batch) = product.params["dimension_numbers"]
    precision = product.params["precision"]
    if product.params["out_sharding"] is not None or not isinstance(precision, lax.Precision | tuple | None):
        return None
    batch, first_right = len(left_batch), left_rank - len(left)
    if tuple(permutation) != (*range(batch), *range(first_right, len(permutation)), *range(batch, first_right)):
        return None
    return {
        **product.params,
        "dimension_numbers": ((right, left), (right_batch, left_batch)),
        "precision": precision[::-1] if isinstance(precision, tuple) else precision,
    }


def evaluate(program: FlatProgram, inputs: Sequence[Any]) -> list[Any]:
    """Runs a flat program on whole arrays: the unsharded reference."""
    env: dict[int, Any] = dict(program.constants)
    env.update(zip(program.inputs, inputs, strict=True))
    for op in program.operations:
        results = _compat.bind_equation(op.primitive, op.params, [env[v] for v in op.operands])
        env.update(zip(op.results, results, strict=True))
    return [env[v] for v in program.outputs]


def without_constants(program: FlatProgram) -> FlatProgram:
    """The program with its constants' arrays dropped: structure alone."""
    return replace(program, constants=dict.fromkeys(program.constants))
