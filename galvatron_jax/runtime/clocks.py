"""State that evolves by itself: random counters that many layers read and none computes from data.

Stages work on different micro-batches at once. What one variable is for each micro-batch they can all know beforehand
where its next value depends on nothing but state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from galvatron_jax._compat import bind_equation
from galvatron_jax.trace.model import Traced


@dataclass(frozen=True)
class Clock:
    """State variables and how they go on from one micro-batch to the next."""

    paths: tuple[str, ...]
    closed: jex.ClosedJaxpr
    """Of the loss: its first inputs are the state, its outputs the state after."""
    names: tuple[str, ...]
    """Paths of all state, in the order of inputs and outputs."""

    def before_each(self, state: Mapping[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The variables before each of some micro-batches, stacked, and after the last.

        Args:
            state: model state by path.
            count: micro-batches.
        """

        def step(now: dict[str, Any], _: None) -> tuple[dict[str, Any], dict[str, Any]]:
            return self._next({**state, **now}), now

        after, before = lax.scan(step, {path: state[path] for path in self.paths}, None, length=count)
        return before, after

    def _next(self, state: Mapping[str, Any]) -> dict[str, Any]:
        jaxpr = self.closed.jaxpr
        known = dict(zip(jaxpr.invars, [state[name] for name in self.names], strict=False))
        known |= dict(zip(jaxpr.constvars, self.closed.consts, strict=True))
        wanted = [jaxpr.outvars[self.names.index(path)] for path in self.paths]
        for equation in _needed(jaxpr, wanted):
            operands = [v.val if isinstance(v, jex.Literal) else known[v] for v in equation.invars]
            known.update(
                zip(equation.outvars, bind_equation(equation.primitive, equation.params, operands), strict=True)
            )
        return {
            path: jnp.asarray(v.val) if isinstance(v, jex.Literal) else known[v]
            for path, v in zip(self.paths, wanted, strict=True)
        }


def clock_of(traced: Traced, paths: Sequence[str]) -> tuple[Clock, list[str]]:
    """The clock of those of some state variables that go on by themselves.

    Returns:
        The clock; and the paths of the others.
    """
    functional = traced.functional
    names = tuple(functional.state)

    def after(state: list[Any], parameters: dict[str, Any], batch: Any) -> list[Any]:
        output = functional.apply(parameters, dict(zip(names, state, strict=True)), batch)
        return [output.state[name] for name in names]

    leaves = [traced.avals[f"batch:{name}"] for name in traced.batch_names]
    batch = jax.tree.unflatten(traced.batch_tree, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
    closed = jax.make_jaxpr(after)(list(functional.state.values()), dict(functional.parameters), batch)
    free = set(closed.jaxpr.invars[: len(names)]) | set(closed.jaxpr.constvars)
    own, others = [], []
    for path in paths:
        wanted = closed.jaxpr.outvars[names.index(path)]
        read = {
            v
            for equation in _needed(closed.jaxpr, [wanted])
            for v in equation.invars
            if not isinstance(v, jex.Literal) and v in closed.jaxpr.invars
        }
        (own if read <= free else others).append(path)
    return Clock(tuple(own), closed, names), others


def _needed(jaxpr: jex.Jaxpr, wanted: Sequence[Any]) -> list[jex.JaxprEqn]:
    """The equations that some variables rest on, in order."""
    needed = {v for v in wanted if not isinstance(v, jex.Literal)}
    found = []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            found.append(equation)
            needed.update(v for v in equation.invars if not isinstance(v, jex.Literal))
    return found[::-1]
