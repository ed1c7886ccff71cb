"""A traced model as a table of its layer kinds."""

from __future__ import annotations

import math
from collections import Counter

from rich.console import Group
from rich.table import Table

from galvatron_jax.report.text import titled
from galvatron_jax.spec.model import LayerKind, ModelSpec, PortRole
from galvatron_jax.spec.program import FactorRole


def model_table(model: ModelSpec) -> Group:
    """One row per layer kind: how often it occurs, its parameters, and the dims that can be split."""
    total = sum(math.prod(p.shape) for p in model.parameters)
    title = f"Model {model.name}: {len(model.layers)} layers, {format_count(total)} parameters ({model.fingerprint})"
    table = Table(caption="\n".join(model.notes) or None, caption_justify="left")
    table.add_column("layer kind")
    table.add_column("layers", justify="right")
    table.add_column("parameters of one", justify="right")
    table.add_column("operations", justify="right")
    table.add_column("tensor-parallel dims")
    counts = Counter(layer.kind for layer in model.layers)
    for index, kind in enumerate(model.kinds):
        operations = str(len(kind.program.operations))
        table.add_row(kind.name, str(counts[index]), format_count(_parameters(kind)), operations, _hidden(kind))
    return titled(title, table)


def format_count(count: float) -> str:
    """A number of things with a decimal prefix.

    Example:
        >>> format_count(124_439_808)
        '124.4 M'
    """
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {prefix}"
    return f"{count:.0f}"


def _parameters(kind: LayerKind) -> int:
    program = kind.program
    sizes = [
        math.prod(program.factors[factor].size for dim in program.values[port.value].dims for factor in dim)
        for port in kind.inputs
        if port.role is PortRole.PARAMETER
    ]
    return sum(sizes)


def _hidden(kind: LayerKind) -> str:
    sizes = [factor.size for factor in kind.program.factors if factor.role is FactorRole.HIDDEN]
    return ", ".join(map(str, sorted(set(sizes), reverse=True))) or "–"
