"""The *annotate* executor: a plan of one stage as sharding constraints, partitioned by XLA itself.

Storage, state and optimizer are the local executor's, so one's state is the other's. Only gradients are computed
another way: on whole arrays outside any `shard_map`, with `NamedSharding` constraints where the plan lays values out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax.partition.layer_plan import BoundarySpec
from galvatron_jax.runtime.annotate_layer import AnnotatedLayer
from galvatron_jax.runtime.execution import Executor
from galvatron_jax.runtime.runs import Run
from galvatron_jax.spec.strategy import Remat


@dataclass(frozen=True)
class AnnotateExecutor(Executor):
    """Runs micro-batches on whole arrays: all shapes are global, a change of layout is a constraint.

    Never `ordered`: XLA's partitioner would gather what has an order of dims prescribed.
    """

    mesh: Mesh = field(kw_only=True)
    remats: Sequence[Remat] = field(kw_only=True)
    """Per layer of the model."""

    def program(self, run: Run) -> AnnotatedLayer:  # pyrefly: ignore[bad-override]
        """The run's layer program."""
        flat = self.traced.programs[run.kind].flat
        return AnnotatedLayer(run.local, flat, self.remats[run.start], self.mesh)

    def local_shape(self, shape: Sequence[int], spec: BoundarySpec) -> tuple[int, ...]:
        """The whole shape, whatever the layout."""
        return tuple(shape)

    def move(self, x: Any, shape: Sequence[int], source: BoundarySpec, target: BoundarySpec, *, lead: int = 0) -> Any:
        """Constrains a whole array to the layout in which it is wanted."""
        if not target:
            return x
        spec = PartitionSpec(*(None,) * lead, *(axes or None for axes in target))
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def _needed(self, run: Run, port: int, x: Any) -> Any:
        return x if self.program(run).reads_input(port) else None

    def stored_gradients(self, gradients: Mapping[tuple[int, int], Any], scale: Any) -> dict[str, Any]:
        """Gradients in the optimizer's layout, by key of the stored arrays.

        Args:
            gradients: whole, by (run, port), summed over micro-batches.
            scale: what they are multiplied by.
        """
        storage, found = self.storage, {}
        for at, x in gradients.items():
            owned = at in storage.owned
            group = storage.group(storage.owned[at] if owned else storage.tied[at])
            if group.stacked and not owned:
                used = self.runs[at[0]].inputs[at[1]].references[0]
                x = jnp.stack([x if r == used else jnp.zeros_like(x) for r in group.references])
            x = jnp.reshape(x * scale.astype(x.dtype), group.stored_shape)
            found[group.key] = found[group.key] + x if group.key in found else x
        return {
            g.key: lax.with_sharding_constraint(
                found[g.key] if g.key in found else jnp.zeros(g.stored_shape, g.dtype),
                NamedSharding(self.mesh, g.spec(optimizer=True)),
            )
            for g in storage.groups
        }

    def constrained(self, gradients: Mapping[tuple[int, int], Any]) -> dict[tuple[int, int], Any]:
        """Gradients while they accumulate over micro-batches: as the optimizer wants them."""
        found = {}
        for at, x in gradients.items():
            key = self.storage.owned.get(at)
            if key is not None:
                group = self.storage.group(key)
                stored = jnp.reshape(x, group.stored_shape)
                spec = NamedSharding(self.mesh, group.spec(optimizer=True))
                x = jnp.reshape(lax.with_sharding_constraint(stored, spec), x.shape)
            found[at] = x
        return found


def accumulate(one: Any, params: dict, model_state: dict, batch: dict) -> tuple:
    """Sums what micro-batches yield, one after another; the model state passes through them.

    Args:
        one: from (parameters, state, leaves) to the new state and what is summed.
        params: stored arrays.
        model_state: before the first micro-batch.
        batch: per leaf `(microbatches, examples, ...)`.
    """
    first = {name: x[0] for name, x in batch.items()}
    shapes = jax.eval_shape(one, params, model_state, first)[1:]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(carry: tuple, leaves: dict) -> tuple[tuple, None]:
        state, totals = carry
        held, leaves = lax.optimization_barrier((params, leaves))
        state, *found = one(held, state, leaves)
        return (state, jax.tree.map(jnp.add, totals, tuple(found))), None

    (state, totals), _ = lax.scan(body, (model_state, zeros), batch)
    return state, *totals
