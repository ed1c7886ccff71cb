"""What a micro-batch yields besides gradients: metrics, their weight, and new model state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galvatron_jax.runtime.execution import Executor


def measures(executor: Executor, values: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Metrics times the micro-batch's weight, and the weight.

    Args:
        executor: what made the values.
        values: local results by sink, as `ModelSpec.results` names them.
    """
    weight = jnp.asarray(values.get("weight", 1.0), jnp.float32)
    references = dict(executor.traced.spec.results)
    sums = {}
    for sink, x in values.items():
        if sink.split(":")[0] not in ("loss", "aux"):
            continue
        whole = ((),) * jnp.ndim(x)
        spec = executor.layouts.specs.get(references[sink], whole)
        x = executor.move(x, executor.layouts.shapes.get(references[sink], jnp.shape(x)), spec, whole)
        x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
        sums[sink.removeprefix("aux:")] = x * weight.astype(x.dtype)
    return sums, weight


def new_state(state: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Model state by path after a micro-batch.

    Args:
        state: before it. What the micro-batch makes no new value of stays.
        values: results by sink.
    """
    new = dict(state)
    slices: dict[str, dict[int, Any]] = {}
    for sink, x in values.items():
        if not sink.startswith("state:"):
            continue
        path = sink.removeprefix("state:")
        if path in new:
            new[path] = x
        else:
            name, _, index = path.rpartition("[")
            slices.setdefault(name, {})[int(index[:-1])] = x
    for name, parts in slices.items():
        new[name] = jnp.stack([parts.get(i, state[name][i]) for i in range(len(state[name]))])
    return {path: new[path].astype(state[path].dtype) if _plain(new[path]) else new[path] for path in state}


def _plain(x: Any) -> bool:
    return not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
