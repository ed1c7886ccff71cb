"""What an optax optimizer keeps per parameter, as the cost model needs it."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from galvatron_jax.cost import OptimizerMemory
from galvatron_jax.runtime.optimizer_state import nested, state_tree
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
    state = state_tree(jax.eval_shape(optimizer.init, nested(parameters)), parameters)
    whole = [slot for slot in state.slots if len(slot.leaves) == len(parameters)]
    counted = {position for slot in whole for position in slot.leaves.values()}
    slots = [_slot_dtype({path: state.shapes[i] for path, i in slot.leaves.items()}, parameters) for slot in whole]
    other = [leaf for position, leaf in enumerate(state.shapes) if position not in counted]
    return OptimizerMemory(tuple(slots), sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in other))


def _slot_dtype(leaves: dict[str, Any], parameters: dict[str, Any]) -> str:
    if all(leaf.dtype == parameters[name].dtype for name, leaf in leaves.items()):
        return "same"
    # Of mixed dtypes the widest counts, on the safe side.
    return str(max((leaf.dtype for leaf in leaves.values()), key=lambda dtype: dtype.itemsize))
