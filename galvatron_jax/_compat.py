"""JAX that is private, or that changes between versions: here and nowhere else."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jax._src.interpreters import partial_eval
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


@contextmanager
def brief_tracer_errors() -> Iterator[None]:
    """While it lasts, errors do not say which arguments of the traced function a value came from.

    JAX searches all operations traced so far for that, even for an error that nobody reads: Flax asks each random
    counter for its `sharding` as often as it counts, so that building a model under a trace took the square of its
    layers' number.
    """
    tracer = partial_eval.DynamicJaxprTracer
    origin = tracer._origin_msg
    tracer._origin_msg = lambda self: ""
    try:
        yield
    finally:
        tracer._origin_msg = origin


# ------------------------------------------------------------------------------------------------ printed groups

Groups = list[list[int]]
"""Groups of devices, numbered along the mesh."""

_LOWERED_LISTED = re.compile(r"replica_groups = dense<([^>]*)> : tensor<(\d+)x(\d+)xi64>")
_LOWERED_PAIRS = re.compile(r"source_target_pairs = dense<([^>]*)>")
_COMPILED_PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")
_LOWERED_MESH = re.compile(r"replica_groups = #stablehlo\.replica_group_mesh_axes<mesh = @\w+, axes = \[([^\]]*)\]>")
_LOWERED_AXIS = re.compile(r'#stablehlo\.axis_ref<name = "([^"]*)">')
_COMPILED_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_COMPILED_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_COMPILED_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_COMPILED_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
_IOTA = re.compile(r"^\[([\d,]+)\](?:T\(([\d,]+)\))?$")


def groups_along(axes: Sequence[str], *, mesh: Mapping[str, int]) -> Groups:
    """The groups that devices form along some axes of a mesh, its axes' sizes given in order."""
    names = list(mesh)
    among = [names.index(axis) for axis in axes]
    rest = [i for i in range(len(names)) if i not in among]
    numbers = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    return numbers.transpose(*rest, *among).reshape(-1, math.prod(mesh[axis] for axis in axes)).tolist()


def lowered_groups(operation: str, *, mesh: Mapping[str, int]) -> Groups | None:
    """The groups of a collective as the text of a lowered program has them; None where it cannot be read.

    They are listed (all of them up to JAX 0.10), or the mesh axes are that they lie along (most from 0.12 on).

    Args:
        operation: text of the one operation, or of its attributes.
        mesh: sizes of the axes of the mesh that the program runs on.
    """
    listed = _LOWERED_LISTED.search(operation)
    if listed:
        return np.array(_numbers(listed[1])).reshape(int(listed[2]), int(listed[3])).tolist()
    along = _LOWERED_MESH.search(operation)
    return _along(along[1], _LOWERED_AXIS, mesh) if along else None


def lowered_pairs(operation: str) -> Groups:
    """Source and target devices of a permute, as the text of a lowered program has them."""
    found = _LOWERED_PAIRS.search(operation)
    if found is None:
        raise ValueError(f"no source_target_pairs in {operation[:200]}")
    return np.array(_numbers(found[1])).reshape(-1, 2).tolist()


def compiled_pairs(instruction: str) -> Groups:
    """Source and target devices of a permute, as a line of a compiled program has them."""
    found = _COMPILED_PAIRS.search(instruction)
    if found is None:
        raise ValueError(f"no source_target_pairs in {instruction[:200]}")
    return np.array(_numbers(found[1])).reshape(-1, 2).tolist()


def compiled_groups(instruction: str) -> Groups | None:
    """The groups of a collective as a line of a compiled program has them; None where it cannot be read.

    They are listed, or cut out of a range of numbers, or (most from JAX 0.12 on) given by mesh axes.
    """
    listed = _COMPILED_LISTED.search(instruction)
    if listed:
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    iota = _COMPILED_IOTA.search(instruction)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    along = _COMPILED_MESH.search(instruction)
    return _mesh_groups(*along.groups()) if along else None


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Numbers from 0 on in an array of a shape, its dims in another order."""
    source = _numbers(shape)
    return np.arange(math.prod(source)).reshape(source).transpose(*_numbers(order) if order else range(len(source)))


def _mesh_groups(axes: str, devices: str | None, along: str) -> Groups:
    """The groups along axes of a mesh of the compiler's own, or along parts of axes.

    Args:
        axes: such as `'a'=2,'b'=4`.
        devices: its devices, listed or as a range; None for all in order.
        along: such as `'a','b':(2)2`, which is the part of two behind a part of two.
    """
    sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", axes)}
    cuts: dict[str, set[int]] = {name: {1, size} for name, size in sizes.items()}
    wanted = [(m[1], int(m[2] or 1), int(m[2] or 1) * int(m[3] or sizes[m[1]])) for m in _COMPILED_AXIS.finditer(along)]
    for name, *ends in wanted:
        cuts[name] |= set(ends)
    parts = [(name, a, b) for name in sizes for a, b in itertools.pairwise(sorted(cuts[name]))]
    among = [at for name, a, b in wanted for at, part in enumerate(parts) if part[0] == name and a <= part[1] < b]
    rest = [at for at in range(len(parts)) if at not in among]
    iota = _IOTA.match(devices) if devices else None
    listed = (
        _iota(*iota.groups()) if iota else np.array(_numbers(devices) if devices else range(math.prod(sizes.values())))
    )
    numbers = listed.reshape([b // a for _, a, b in parts]).transpose(*rest, *among)
    return numbers.reshape(-1, math.prod(parts[at][2] // parts[at][1] for at in among)).tolist()


def _along(text: str, axis: re.Pattern[str], mesh: Mapping[str, int]) -> Groups | None:
    """The groups along listed axes; None where there is more in the list (parts of axes), or axes of another mesh."""
    axes = axis.findall(text)
    if re.sub(r"[\s,]", "", axis.sub("", text)) or not set(axes) <= set(mesh):
        return None
    return groups_along(axes, mesh=mesh)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
