"""Finds the repeated blocks of a model: the classes whose calls become layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from galvatron_jax.trace.marks import linen_class_name

Path = tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A submodule that might be a layer."""

    path: Path
    cls: type | str
    """The class, or for Linen its name, since lifted transforms make new classes."""
    parameter_bytes: int
    signature: tuple
    """Paths, shapes and dtypes of its parameters."""


def repeated_classes(candidates: Iterable[Candidate], total_bytes: int) -> frozenset[type | str]:
    """Classes of the repeated blocks that hold most of the parameters.

    Submodules are grouped by container (their path without numbers) and class. The groups with most parameter bytes
    win, none inside another. A group whose members are unlike each other (the stages of a Swin) gives way to a larger
    group inside it (their blocks).
    """
    groups: dict[tuple, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        container = tuple(re.sub(r"_?\d+$", "", part) for part in candidate.path)
        groups[container, candidate.cls].append(candidate)
    repeated = [members for members in groups.values() if len(members) >= 2]
    repeated.sort(key=lambda members: (-_bytes(members), len(members[0].path)))
    chosen: list[list[Candidate]] = []
    for members in repeated:
        if _bytes(members) < 0.05 * total_bytes or _unlike_stages(members, repeated):
            continue
        if not any(_nested(members, other) or _nested(other, members) for other in chosen):
            chosen.append(members)
    return frozenset(member.cls for members in chosen for member in members)


def _bytes(members: list[Candidate]) -> int:
    return sum(m.parameter_bytes for m in members)


def _nested(inner: list[Candidate], outer: list[Candidate]) -> bool:
    return any(i.path[: len(o.path)] == o.path for i in inner for o in outer)


def _unlike_stages(members: list[Candidate], groups: list[list[Candidate]]) -> bool:
    """Whether the members differ and a larger group inside them holds most of their parameters."""
    if len({m.signature for m in members}) == 1:
        return False
    return any(
        other is not members
        and len(other) > len(members)
        and all(len(o.path) > len(members[0].path) for o in other)
        and _nested(other, members)
        and _bytes(other) > 0.5 * _bytes(members)
        for other in groups
    )


def nnx_candidates(model: nnx.Module) -> list[Candidate]:
    """Submodules of an NNX model that hold parameters and are of the user's own classes."""
    found = []
    for path, module in nnx.iter_modules(model):
        cls = type(module)
        if module is model or not _users(cls) or "__call__" not in dir(cls):
            continue
        leaves = jax.tree_util.tree_flatten_with_path(nnx.state(module, nnx.Param))[0]
        if leaves:
            found.append(Candidate(tuple(map(str, path)), cls, *_measure(leaves)))
    return found


def linen_candidates(module: nn.Module, variables: Any, call: Callable[[], Any]) -> list[Candidate]:
    """Submodules that `call` (a trace of the loss) reaches, as `nn.intercept_methods` sees them."""
    seen: dict[Path, type] = {}

    def intercept(next_fun: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and context.module.path:
            seen.setdefault(tuple(context.module.path), type(context.module))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
        call()
    found = []
    for path, cls in seen.items():
        tree = variables.get("params", {})
        for part in path:
            tree = tree.get(part, {}) if isinstance(tree, dict) else {}
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        if leaves and _users(cls):
            found.append(Candidate(path, linen_class_name(cls), *_measure(leaves)))
    return found


def _measure(leaves: list) -> tuple[int, tuple]:
    size = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    return size, tuple((str(path), tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves)


def _users(cls: type) -> bool:
    return not cls.__module__.startswith("flax.")
