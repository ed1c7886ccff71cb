"""Expressions of an update with shapes left out, and their evaluation on stored arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from galvatron_jax._compat import bind_equation
from galvatron_jax.runtime.optimizer_state import StoredState

IDENTITY = {"add": 0, "max": -np.inf, "min": np.inf, "and": True, "or": False}
"""What combines scalars, with the scalar that changes nothing."""

REDUCE = {"add": jnp.sum, "max": jnp.max, "min": jnp.min, "and": jnp.all, "or": jnp.any}
COMBINE = {"add": lax.add, "max": lax.max, "min": lax.min, "and": jnp.logical_and, "or": jnp.logical_or}


@dataclass(frozen=True)
class Node:
    """One operation of an expression."""

    kind: str
    """`input`, `constant`, `apply`, `result`, `own` (all of one array reduced) or `total` (over parameters)."""
    operands: tuple[int, ...] = ()
    owned: bool = False
    """Whether it reads "self": its value then differs between parameters."""
    payload: Any = None


@dataclass(frozen=True)
class Expressions:
    """A table of expressions in which equal ones have equal numbers."""

    nodes: list[Node] = field(default_factory=list)
    _numbers: dict[Any, int] = field(default_factory=dict)

    def _number(self, key: Any, node: Node) -> int:
        key = (node.kind, node.operands, key)
        if key not in self._numbers:
            self._numbers[key] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[key]

    def input(self, role: str, index: int | None) -> int:
        """`gradient`, `parameter` and `slot` (of a number) of self; or `other`, a leaf of the state by position."""
        return self._number((role, index), Node("input", (), role != "other", (role, index)))

    def constant(self, value: Any) -> int:
        """An array that does not change."""
        plain = np.ndim(value) == 0 and not jax.dtypes.issubdtype(jnp.result_type(value), jax.dtypes.extended)
        key = (str(jnp.result_type(value)), np.asarray(value).tobytes()) if plain else id(value)
        return self._number(key, Node("constant", payload=value))

    def is_identity(self, node: int, combine: str) -> bool:
        """Whether an expression is the constant that changes nothing in a sum, maximum and so on."""
        found = self.nodes[node]
        return found.kind == "constant" and np.ndim(found.payload) == 0 and found.payload == IDENTITY[combine]

    def results(self, equation: jex.JaxprEqn, operands: Sequence[int]) -> list[int]:
        """What an equation gives for other operands than its own."""
        owned = any(self.nodes[i].owned for i in operands)
        key = (equation.primitive.name, tuple((k, _key(v)) for k, v in sorted(equation.params.items())))
        node = self._number(key, Node("apply", tuple(operands), owned, (equation.primitive, equation.params)))
        if not equation.primitive.multiple_results:
            return [node]
        return [self._number(i, Node("result", (node,), owned, i)) for i in range(len(equation.outvars))]

    def own(self, combine: str, operand: int) -> int:
        """All of one parameter's array reduced to a scalar."""
        return self._number(combine, Node("own", (operand,), True, combine))

    def total(self, combine: str, terms: Mapping[str, int]) -> int:
        """The combination over all parameters of some groups of one scalar each."""
        key = (combine, tuple(sorted(terms.items())))
        return self._number(key, Node("total", (), False, (combine, dict(terms))))


def _key(value: Any) -> Any:
    """What tells a primitive's parameters apart."""
    if isinstance(value, jex.ClosedJaxpr):
        return str(value) if not value.consts else id(value)
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


@dataclass(frozen=True)
class StoredUpdate:
    """An update of stored arrays: one expression per group, and per slot and group."""

    expressions: Expressions
    layout: StoredState
    sliced: Mapping[str, bool]
    """Per group, whether its layers are slices of one parameter."""
    parameters: Mapping[str, int]
    slots: tuple[Mapping[str, int], ...]
    others: Mapping[int, int]
    """Per leaf of the state that mirrors no parameter, by position."""

    def __call__(
        self, gradients: Mapping[str, Any], state: Any, parameters: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Any]:
        """New stored parameters and state."""
        for group in self.layout.storage.groups:
            assert gradients[group.key].dtype == group.dtype, (group.key, gradients[group.key].dtype, group.dtype)
        slots, others = self.layout.split(state)
        run = Evaluation(self, {"gradient": gradients, "parameter": parameters}, slots, others)
        new = {key: run.whole(node, key) for key, node in self.parameters.items()}
        new_slots = [{key: run.whole(node, key) for key, node in nodes.items()} for nodes in self.slots]
        return new, self.layout.join(new_slots, {i: run.value(node) for i, node in self.others.items()})


class Evaluation:
    """One evaluation; what several expressions share is computed once."""

    def __init__(
        self,
        update: StoredUpdate,
        arrays: Mapping[str, Mapping[str, Any]],
        slots: Sequence[Mapping[str, Any]],
        others: Mapping[int, Any],
    ) -> None:
        self.nodes, self.layout, self.sliced = update.expressions.nodes, update.layout, update.sliced
        self.shapes = {group.key: group.stored_shape for group in self.layout.storage.groups}
        self.stacked = {group.key: group.stacked for group in self.layout.storage.groups}
        self.arrays, self.slots, self.others = arrays, slots, others
        self.known: dict[tuple[int, str], Any] = {}

    def whole(self, node: int, key: str) -> Any:
        """A group's array."""
        return jnp.broadcast_to(self.value(node, key), self.shapes[key])

    def value(self, node: int, key: str = "") -> Any:
        """The value of an expression; of one that reads "self" for a group, up to dims of size 1.

        Operands come first, one by one: expressions can be deeper than Python's stack.
        """
        stack = [(node, key)]
        while stack:
            at = self._place(*stack[-1])
            missing = [p for p in self._needs(*at) if p not in self.known] if at not in self.known else []
            if missing:
                stack += missing
                continue
            if at not in self.known:
                self.known[at] = self._compute(*at)
            stack.pop()
        return self.known[self._place(node, key)]

    def _place(self, node: int, key: str) -> tuple[int, str]:
        return node, key if self.nodes[node].owned else ""

    def _needs(self, node: int, key: str) -> list[tuple[int, str]]:
        found = self.nodes[node]
        if found.kind == "total":
            return [self._place(term, group) for group, term in self.terms(node).items()]
        keys = self.sharing(key) if found.kind == "own" else [key]
        return [self._place(operand, k) for k in keys for operand in found.operands]

    def sharing(self, key: str) -> list[str]:
        """The groups that hold the slices of the parameter that one group has slices of."""
        if not self.sliced[key]:
            return [key]
        return [k for k, owners in self.layout.owners.items() if owners == self.layout.owners[key]]

    def _compute(self, node: int, key: str) -> Any:
        found = self.nodes[node]
        match found.kind:
            case "constant":
                return jnp.asarray(found.payload)
            case "input":
                role, index = found.payload
                if role == "other":
                    return self.others[index]
                return (self.slots[index] if role == "slot" else self.arrays[role])[key]
            case "total":
                return self.total(node)
            case "own":
                return self._own(found.payload, found.operands[0], key)
            case "result":
                return self.known[self._place(found.operands[0], key)][found.payload]
        primitive, params = found.payload
        operands = [self.known[self._place(operand, key)] for operand in found.operands]
        if found.owned:
            shape = np.broadcast_shapes(*map(jnp.shape, operands))
            operands = [jnp.broadcast_to(x, shape) for x in operands]
        results = bind_equation(primitive, params, operands)
        return results if primitive.multiple_results else results[0]

    def _own(self, combine: str, operand: int, key: str) -> Any:
        """Per parameter of a stack; for slices of one parameter over all of them."""
        parts = []
        for k in self.sharing(key):
            x = jnp.broadcast_to(self.known[self._place(operand, k)], self.shapes[k])
            dims = tuple(range(1 if self.stacked[k] and not self.sliced[k] else 0, x.ndim))
            parts.append(REDUCE[combine](x, axis=dims, keepdims=True))
        if len(parts) == 1:
            return parts[0]
        return reduce(COMBINE[combine], [jnp.reshape(x, (1,) * len(self.shapes[key])) for x in parts])

    def terms(self, node: int) -> Mapping[str, int]:
        """Per group, the scalar that a total combines."""
        return self.nodes[node].payload[1]

    def total(self, node: int) -> Any:
        """The combination over all parameters of one scalar each, whose values are known."""
        parts = [
            REDUCE[self.nodes[node].payload[0]](self._per_parameter(term, key))
            for key, term in self.terms(node).items()
            if self.sharing(key)[0] == key
        ]
        return reduce(COMBINE[self.nodes[node].payload[0]], parts)

    def _per_parameter(self, term: int, key: str) -> Any:
        """One scalar per parameter of a group: the same for all where the expression does not tell them apart."""
        x = self.known[self._place(term, key)]
        rows = self.shapes[key][0] if self.stacked[key] and not self.sliced[key] else 1
        return jnp.broadcast_to(x, (rows, *(1,) * (len(self.shapes[key]) - 1))) if self.shapes[key] else x
