"""What an optax optimizer keeps per parameter, as the cost model needs it."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import jax
import optax

from galvatron_jax.cost import OptimizerMemory
from galvatron_jax.spec.model import ModelSpec


def optimizer_memory(optimizer: optax.GradientTransformation, model: ModelSpec) -> OptimizerMemory:
    """Finds which arrays of an optimizer's state are shaped like the parameters, without creating any.

    Args:
        optimizer: any optax optimizer.
        model: its parameters.

    Returns:
        One slot per place in the state that holds an array of every parameter's shape; all else as bytes.
    """
    parameters = {p.path: jax.ShapeDtypeStruct(p.shape, jax.numpy.dtype(p.dtype)) for p in model.parameters}
    state = jax.eval_shape(optimizer.init, parameters)
    places: dict[tuple, dict[str, Any]] = defaultdict(dict)
    other = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = getattr(path[-1], "key", None) if path else None
        if name in parameters and leaf.shape == parameters[name].shape:
            places[path[:-1]][name] = leaf
        else:
            other.append(leaf)
    slots = []
    for leaves in places.values():
        if len(leaves) == len(parameters):
            slots.append(_slot_dtype(leaves, parameters))
        else:
            other.extend(leaves.values())
    return OptimizerMemory(tuple(slots), sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in other))


def _slot_dtype(leaves: dict[str, Any], parameters: dict[str, Any]) -> str:
    if all(leaf.dtype == parameters[name].dtype for name, leaf in leaves.items()):
        return "same"
    # Of mixed dtypes the widest counts, on the safe side.
    return str(max((leaf.dtype for leaf in leaves.values()), key=lambda dtype: dtype.itemsize))
