"""Where parameters lie for the moment between being made and being stored.

Initialisers make arrays in the model's shapes; a fused `qkv` kernel `(width, 3 · heads · head_dim)` is stored sharded
by heads, inside its last dim. Left to itself, XLA makes such an array whole on every device, for no layout of it says
so. Told to split it at any dim, it makes a part on each device, and the way to storage is an exchange of parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from galvatron_jax.runtime.optimizer_state import is_slice, parameter_of
from galvatron_jax.runtime.storage import Group, Storage


def birth_specs(
    storage: Storage, parameters: Mapping[str, Any], *, mesh: Mapping[str, int]
) -> dict[str, PartitionSpec]:
    """How to split parameters that are stored sharded inside a dim, in the model's own shapes.

    All others XLA lays out as they are stored. Of a parameter that is stacked over layers the leading dim stays whole,
    so that every device can cut it into layers.

    Args:
        storage: how parameters are stored.
        parameters: their shapes by path.
        mesh: sizes of the mesh axes.
    """
    specs: dict[str, PartitionSpec] = {}
    for group in storage.groups:
        inside = tuple(name for dim in group.dims for piece in dim[1:] for name in piece.storage)
        if inside:
            for reference in group.references:
                lead = (None,) if is_slice(reference, parameters) else ()
                specs[parameter_of(reference, parameters)] = PartitionSpec(*lead, *_spread(group, inside, mesh))
    return specs


def _spread(group: Group, inside: tuple[str, ...], mesh: Mapping[str, int]) -> list[tuple[str, ...] | None]:
    """Axes per dim: those inside a dim move to the dim with the largest parts that they divide."""
    axes = [dim[0].storage for dim in group.dims]
    for name in inside:
        parts = [n // math.prod(mesh[a] for a in split) for n, split in zip(group.shape, axes, strict=True)]
        fitting = [i for i, part in enumerate(parts) if part % mesh[name] == 0]
        if fitting:
            place = max(fitting, key=lambda i: parts[i])
            axes[place] = (*axes[place], name)
    return [split or None for split in axes]
