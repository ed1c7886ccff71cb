"""JAX that is private, or that changes between versions: here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.extend import core as jex

INLINED_CALLS = frozenset(
    {
        "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
        "remat", "remat2", "checkpoint", "custom_lin",
    }
)  # fmt: skip
"""Primitives that only wrap another jaxpr with the same operands and results."""

REMAT_CALLS = frozenset({"remat", "remat2", "checkpoint"})


def call_jaxpr(equation: jex.JaxprEqn) -> tuple[jex.Jaxpr, list] | None:
    """The jaxpr that a call-like equation wraps, with its constants; None when it is no plain call."""
    if equation.primitive.name not in INLINED_CALLS:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        if isinstance(inner, jex.ClosedJaxpr):
            return inner.jaxpr, list(inner.consts)
        if isinstance(inner, jex.Jaxpr):
            return inner, []
    return None


def scan_counts(equation: jex.JaxprEqn) -> tuple[int, int]:
    """Numbers of constants and of carried values among a scan's operands.

    Read from ranks, since the parameters that state them differ between versions: what is scanned over has one
    dim more outside the body than inside.
    """
    body = equation.params["jaxpr"].jaxpr
    scanned = sum(rank(o.aval) != rank(i.aval) for o, i in zip(equation.invars, body.invars, strict=True))
    stacked = sum(rank(o.aval) != rank(i.aval) for o, i in zip(equation.outvars, body.outvars, strict=True))
    carried = len(equation.outvars) - stacked
    return len(equation.invars) - scanned - carried, carried


def rank(aval: Any) -> int:
    """Number of dims of an abstract value."""
    return len(aval.shape)


def bind_equation(primitive: jex.Primitive, params: Mapping[str, Any], operands: list) -> list:
    """Applies a primitive with the parameters that a jaxpr shows."""
    bound = primitive.get_bind_params(dict(params))
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
    results = primitive.bind(*subfuns, *operands, **params)
    return list(results) if primitive.multiple_results else [results]
