"""Which updates may run on stored arrays, by proof.

An update is traced on the model's own tree. Every result is followed back to an expression of its own parameter's
arrays ("self"), with shapes left out: elementwise operations, reductions over all of one array, and sums (or maxima)
of such reductions over sets of parameters. Parameters that are stored in one array and have one expression can be
updated together by evaluating it on that array. AdamW's update, for one, is the same expression for all kernels that
decay and another for those that do not, whether a mask tells them apart by path or by the number of dims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from galvatron_jax._compat import call_jaxpr
from galvatron_jax.runtime.optimizer_expression import IDENTITY, Expressions, StoredUpdate
from galvatron_jax.runtime.optimizer_state import StoredState, is_slice, nested

ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj convert_element_type copy "
    "copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma "
    "log log1p logistic lt max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor".split()
)
"""Primitives that act on every element alone, and whose parameters say nothing of shapes."""

REDUCTIONS = {"reduce_sum": "add", "reduce_max": "max", "reduce_min": "min", "reduce_and": "and", "reduce_or": "or"}
"""With what puts the results of several arrays together."""

_RESHAPES = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice"})
"""Primitives that leave an array uniform that was."""


class UnprovedError(Exception):
    """Why an update must see the model's own arrays."""


@dataclass(frozen=True)
class _Value:
    """An array whose expression is known."""

    node: int
    owner: str | None
    """The parameter whose arrays it is made of; None when it is the same for all."""
    shape: tuple[int, ...]
    uniform: int | None = None
    """Without an owner: the expression of the scalar that all elements are, if they are."""


@dataclass(frozen=True)
class _Partial:
    """A combination of one scalar per parameter."""

    combine: str
    terms: Mapping[str, int]
    """Per parameter, the expression of its scalar."""


@dataclass(frozen=True)
class _Unknown:
    """What no expression describes."""

    reason: str


def prove(closed: jex.ClosedJaxpr, layout: StoredState) -> StoredUpdate:
    """The update of stored arrays that does what the update of the model's own would.

    Args:
        closed: `(gradients, state, parameters) -> (new parameters, new state)` on the model's own tree.
        layout: which parameters are stored in which array, and what in the state mirrors them.

    Raises:
        UnprovedError: when there is none, or none is found.
    """
    return _Proof(layout).update(closed)


class _Proof:
    def __init__(self, layout: StoredState) -> None:
        self.layout = layout
        self.paths: list[str] = jax.tree.leaves(nested({path: path for path in layout.parameters}))
        self.expressions = Expressions()
        self.sliced = self._sliced()

    def _sliced(self) -> dict[str, bool]:
        """Per group, whether its layers are slices of one parameter."""
        sliced = {}
        for group in self.layout.storage.groups:
            kinds = {is_slice(r, self.layout.parameters) for r in group.references}
            if len(kinds) > 1 or (kinds == {True} and len(self.layout.owners[group.key]) > 1):
                raise UnprovedError(f"{group.key} is stored from slices of several parameters")
            sliced[group.key] = kinds.pop()
        return sliced

    def update(self, closed: jex.ClosedJaxpr) -> StoredUpdate:
        if closed.jaxpr.effects:
            raise UnprovedError("it has side effects")
        results = self._run(closed.jaxpr, list(closed.consts), self._inputs())
        parameters = dict(zip(self.paths, results, strict=False))
        state = results[len(self.paths) :]
        tree = self.layout.tree
        for number, (old, new) in enumerate(zip(tree.shapes, closed.out_avals[len(self.paths) :], strict=True)):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise UnprovedError(f"leaf {number} of its state changes from {old} to {new}")
        slots = []
        for slot in tree.slots:
            values = {path: state[position] for path, position in slot.leaves.items()}
            keys = [key for key, owners in self.layout.owners.items() if any(path in values for path in owners)]
            slots.append({key: self._common(key, values) for key in keys})
        others = {i: self._plain(x) for i, x in enumerate(state) if i not in tree.mirrored}
        stored = {group.key: self._common(group.key, parameters) for group in self.layout.storage.groups}
        return StoredUpdate(self.expressions, self.layout, self.sliced, stored, tuple(slots), others)

    def _inputs(self) -> list[_Value]:
        own, tree = self.layout.parameters, self.layout.tree
        values = [self._input("gradient", path, own[path].shape) for path in self.paths]
        for position, leaf in enumerate(tree.shapes):
            if position in tree.mirrored:
                slot, path = tree.mirrored[position]
                values.append(self._input("slot", path, leaf.shape, slot))
            else:
                node = self.expressions.input("other", position)
                values.append(_Value(node, None, leaf.shape, node if leaf.shape == () else None))
        return values + [self._input("parameter", path, own[path].shape) for path in self.paths]

    def _input(self, role: str, path: str, shape: tuple[int, ...], slot: int | None = None) -> _Value:
        return _Value(self.expressions.input(role, slot), path, shape)

    def _common(self, key: str, values: Mapping[str, Any]) -> int:
        """The one expression of all parameters of a group."""
        nodes = set()
        for path in self.layout.owners[key]:
            if path not in values:
                raise UnprovedError(f"its state mirrors only some layers of {key}")
            value = self._value(values[path])
            if value.owner not in (None, path):
                raise UnprovedError(f"the update of {path} depends on {value.owner}")
            node = value.node if value.owner else value.uniform
            if node is None:
                raise UnprovedError(f"the update of {path} has an array that is no parameter's")
            nodes.add(node)
        if len(nodes) > 1:
            raise UnprovedError(f"the layers of {key} are not updated alike")
        return nodes.pop()

    def _plain(self, value: Any) -> int:
        value = self._value(value)
        if value.owner:
            raise UnprovedError(f"its state has something of {value.owner} that is not of its shape")
        return value.node

    def _value(self, value: Any) -> _Value:
        """A value that stands for itself: what is combined over parameters must be complete."""
        if isinstance(value, _Unknown):
            raise UnprovedError(value.reason)
        return self._total(value) if isinstance(value, _Partial) else value

    def _total(self, partial: _Partial) -> _Value:
        terms = {}
        for key, owners in self.layout.owners.items():
            nodes = [partial.terms[path] for path in owners if path in partial.terms]
            if not nodes:
                continue
            if len(nodes) < len(owners) or len(set(nodes)) > 1:
                raise UnprovedError(f"it sums over some layers of {key} only, or not alike")
            terms[key] = nodes[0]
        node = self.expressions.total(partial.combine, terms)
        return _Value(node, None, (), node)

    # -------------------------------------------------------------------------------------------- equations

    def _run(self, jaxpr: jex.Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
        env |= {v: self._constant(x) for v, x in zip(jaxpr.constvars, constants, strict=True)}

        def read(atom: Any) -> Any:
            if isinstance(atom, jex.Literal):
                aval: Any = atom.aval
                return self._constant(np.asarray(atom.val, aval.dtype))
            return env[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            call = call_jaxpr(equation)
            results = self._run(*call, operands) if call else self._apply(equation, operands)
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, value: Any) -> _Value:
        node = self.expressions.constant(value)
        shape = np.shape(value)
        return _Value(node, None, shape, node if shape == () else None)

    def _apply(self, equation: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
        unknown = next((x for x in operands if isinstance(x, _Unknown)), None)
        if unknown:
            return [unknown] * len(equation.outvars)
        try:
            combined = self._combined(equation, operands)
            if combined is not None:
                return [combined]
            values = [self._value(x) for x in operands]
            if not any(value.owner for value in values):
                return self._shared(equation, values)
            return [self._owned(equation, values)]
        except UnprovedError as error:
            return [_Unknown(str(error))] * len(equation.outvars)

    def _combined(self, equation: jex.JaxprEqn, operands: list[Any]) -> Any:
        """A sum or the like over more parameters than either operand's; None when it is no such thing."""
        name = "add" if equation.primitive.name == "add_any" else equation.primitive.name
        out: Any = equation.outvars[0].aval
        if name not in IDENTITY or out.shape != () or (name in ("and", "or") and out.dtype != np.bool_):
            return None
        for one, other in (operands, operands[::-1]):
            neutral = isinstance(one, _Value) and self.expressions.is_identity(one.node, name)
            if neutral and (isinstance(other, _Partial) or other.owner):
                return other
        first, second = (self._terms(name, x) for x in operands)
        if first is None or second is None or set(first) & set(second):
            return None
        return _Partial(name, {**first, **second})

    @staticmethod
    def _terms(name: str, operand: Any) -> Mapping[str, int] | None:
        if isinstance(operand, _Partial):
            return operand.terms if operand.combine == name else None
        return {operand.owner: operand.node} if operand.owner else None

    def _shared(self, equation: jex.JaxprEqn, values: list[_Value]) -> list[_Value]:
        """What is computed from scalars and other arrays that are no parameter's, as it stands."""
        name = equation.primitive.name
        nodes = self.expressions.results(equation, [v.node for v in values])
        uniforms = [v.uniform for v in values if v.uniform is not None]
        avals: list[Any] = [v.aval for v in equation.outvars]
        results = []
        for node, aval in zip(nodes, avals, strict=True):
            uniform = node if aval.shape == () else None
            if uniform is None and uniforms and len(uniforms) == len(values):
                if name in _RESHAPES:
                    uniform = uniforms[0]
                elif name in ELEMENTWISE:
                    uniform = self.expressions.results(equation, uniforms)[0]
            results.append(_Value(node, None, aval.shape, uniform))
        return results

    def _owned(self, equation: jex.JaxprEqn, values: list[_Value]) -> _Value:
        owners = sorted({v.owner for v in values if v.owner})
        if len(owners) > 1:
            raise UnprovedError(f"{equation.primitive.name} mixes {' and '.join(owners[:2])}")
        owner, name = owners[0], equation.primitive.name
        aval: Any = equation.outvars[0].aval
        shape = aval.shape
        whole = self.layout.parameters[owner].shape
        one = math.prod(shape) == 1
        if name in ELEMENTWISE and (one or shape == whole):
            nodes = [node for v in values if (node := v.node if v.owner else v.uniform) is not None]
            if len(nodes) == len(values):
                return _Value(self.expressions.results(equation, nodes)[0], owner, shape)
        elif name in _RESHAPES and math.prod(values[0].shape) == 1 and (one or shape == whole):
            return _Value(values[0].node, owner, shape)
        elif name in ("broadcast_in_dim", "reshape") and values[0].shape == shape:
            return values[0]
        elif name in REDUCTIONS and math.prod(values[0].shape) == 1:
            return _Value(values[0].node, owner, shape)
        elif name in REDUCTIONS and one and self._reducible(equation):
            return _Value(self.expressions.own(REDUCTIONS[name], values[0].node), owner, shape)
        raise UnprovedError(f"{name} treats the elements of {owner} {whole} by their place")

    @staticmethod
    def _reducible(equation: jex.JaxprEqn) -> bool:
        aval: Any = equation.invars[0].aval
        return equation.primitive.name not in ("reduce_and", "reduce_or") or aval.dtype == np.bool_
