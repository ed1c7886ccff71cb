"""Roles of factors: which are the batch, the sequence, the embedding, and which are hidden in a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from galvatron_jax.spec.model import PortRole
from galvatron_jax.spec.program import Factor, FactorRole, Program, Value


@dataclass(frozen=True)
class DimLabels:
    """What is known of a value that crosses layers."""

    batch: int | None = None
    """The dim that begins with the batch."""
    sequence: frozenset[int] = frozenset()
    """Dims known to be sequences, from a layer that says so."""


@dataclass(frozen=True)
class Port:
    """A port of a kind, for giving roles."""

    role: PortRole
    value: int
    labels: DimLabels
    carries_gradient: bool
    annotation: tuple[Any, ...] = ()
    """For a parameter, the user's name or None per dim; empty without an annotation."""


def assign_roles(
    program: Program, inputs: Sequence[Port], outputs: Sequence[Port], microbatch: int
) -> tuple[Program, int | None]:
    """Gives every factor its role. Returns the program and the factor that grows with the micro-batch.

    What is on the layer's boundary activations is batch, sequence (on no parameter) or embedding (on parameters);
    what is on parameters alone is hidden, and sharding it is tensor parallelism.
    """
    batch = _batch_factors(program, inputs, microbatch)
    boundary_ports = [p for p in outputs if p.carries_gradient and _has(program, p.value, batch)]
    boundary_ports += [
        p
        for p in inputs
        if p.role in (PortRole.ACTIVATION, PortRole.BATCH)
        and _has(program, p.value, batch)
        and len(program.values[p.value].dims) <= 3 + (not boundary_ports)
    ]
    boundary = {f for p in boundary_ports for f in _factors(program.values[p.value])} - batch
    parameters = {f for p in inputs if p.role is PortRole.PARAMETER for f in _factors(program.values[p.value])}
    labelled = {
        f for p in (*inputs, *outputs) for dim in p.labels.sequence for f in program.values[p.value].dims[dim]
    } - batch
    roles: dict[int, FactorRole] = dict.fromkeys(parameters, FactorRole.HIDDEN)
    roles.update(dict.fromkeys(_kept_whole(program, inputs), FactorRole.INNER))
    roles.update(dict.fromkeys(boundary & parameters, FactorRole.EMBEDDING))
    roles.update(dict.fromkeys(boundary - parameters, FactorRole.SEQUENCE))
    roles.update(dict.fromkeys(labelled, FactorRole.SEQUENCE))
    roles.update(dict.fromkeys(batch, FactorRole.BATCH))
    factors = tuple(Factor(size=f.size, role=roles.get(i, FactorRole.INNER)) for i, f in enumerate(program.factors))
    growing = max(batch, default=None)
    return with_factors(program, factors), growing


def with_factors(program: Program, factors: tuple[Factor, ...]) -> Program:
    """The program, and the bodies of its loops, over other factors."""
    operations = tuple(
        op.model_copy(update={"bodies": tuple(with_factors(body, factors) for body in op.bodies)}) if op.bodies else op
        for op in program.operations
    )
    return program.model_copy(update={"factors": factors, "operations": operations})


def labels_of(program: Program, value: int) -> DimLabels:
    """Labels of a value that leaves or enters a layer, for the layers it meets next."""
    dims = program.values[value].dims
    roles = [[program.factors[f].role for f in dim] for dim in dims]
    batch = next((i for i, dim in enumerate(roles) if dim and dim[0] is FactorRole.BATCH), None)
    sequence = {i for i, dim in enumerate(roles) if dim and all(r is FactorRole.SEQUENCE for r in dim)}
    return DimLabels(batch, frozenset(sequence))


def unsharded_notes(program: Program) -> tuple[str, ...]:
    """One line for each primitive without a rule."""
    counts: Counter[str] = Counter()
    _count_unknown(program, counts)
    return tuple(
        f"{name} ({count}×) has no sharding rule: its operands are gathered and every device repeats the work; "
        "register_rule() teaches it."
        for name, count in sorted(counts.items())
    )


def _count_unknown(program: Program, counts: Counter[str]) -> None:
    for op in program.operations:
        if not op.known:
            counts[op.primitive] += 1
        for body in op.bodies:
            _count_unknown(body, counts)


def _batch_factors(program: Program, inputs: Iterable[Port], microbatch: int) -> set[int]:
    found: set[int] = set()
    for port in inputs:
        if port.labels.batch is None or port.role is PortRole.PARAMETER:
            continue
        product = 1
        for factor in program.values[port.value].dims[port.labels.batch]:
            if product == microbatch:
                break
            found.add(factor)
            product *= program.factors[factor].size
    return found


def _kept_whole(program: Program, inputs: Iterable[Port]) -> set[int]:
    """Factors that the user's annotations leave without a name on every annotated parameter."""
    named: set[int] = set()
    unnamed: set[int] = set()
    for port in inputs:
        dims = program.values[port.value].dims
        # A stacked parameter's annotation may name its leading dim too.
        for dim, name in zip(reversed(dims), reversed(port.annotation), strict=False):
            (unnamed if name is None else named).update(dim)
    return unnamed - named


def _factors(value: Value) -> set[int]:
    return {f for dim in value.dims for f in dim}


def _has(program: Program, value: int, factors: set[int]) -> bool:
    return bool(_factors(program.values[value]) & factors)
