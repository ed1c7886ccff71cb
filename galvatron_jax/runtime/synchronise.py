"""Once a step, on local arrays: gradients to the optimizer's layout, updated parameters back to storage."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from galvatron_jax.partition.layout import Step as LayoutStep
from galvatron_jax.partition.layout import StepKind
from galvatron_jax.runtime.emit import run_steps
from galvatron_jax.runtime.execution import Executor, spec_of
from galvatron_jax.runtime.runs import Run, Way
from galvatron_jax.runtime.totals import Gradients


@dataclass(frozen=True)
class Synchroniser:
    """Moves gradients and parameters of the layers that an executor runs between their layouts."""

    executor: Executor

    def gradients(self, gradients: Gradients, scale: Any) -> dict[str, Any]:
        """Sums over data axes and micro-batches, in the layout of the optimizer, by key.

        Args:
            gradients: as accumulated, sums over data axes still pending.
            scale: what they are multiplied by.
        """
        storage, sizes = self.executor.storage, self.executor.layouts.mesh
        found = self.summed(gradients, scale)
        for group in storage.groups:
            if group.key not in found:
                found[group.key] = jnp.zeros(group.local_shape(sizes, optimizer=True), group.dtype)
        return {g.key: found[g.key] for g in storage.groups}

    def summed(self, gradients: Gradients, scale: Any) -> dict[str, Any]:
        """The same of some gradients alone, or of some rows of them; what belongs to one parameter is added up."""
        storage, sizes = self.executor.storage, self.executor.layouts.mesh
        found: dict[str, Any] = {}
        for (number, port), x in self._joined(gradients).items():
            run = self.executor.runs[number]
            key = storage.owned.get((number, port))
            x = self._reduced(run, port, x * scale.astype(x.dtype), stacked=run.inputs[port].way is Way.STACKED)
            if key is None:
                key, x = self._tied(number, run, port, x)
            group = storage.group(key)
            x = _like(x, group.local_shape(sizes, optimizer=True), stacked=group.stacked)
            found[key] = found[key] + x if key in found else x
        return found

    def _joined(self, gradients: Gradients) -> Gradients:
        """Gradients of tied parameters added to their owners' before they are summed, where these wait alike."""
        found = dict(gradients)
        for at, owner in joined_ties(self.executor, gradients).items():
            found[owner] = found[owner] + jnp.reshape(found.pop(at), found[owner].shape)
        return found

    def _reduced(self, run: Run, port: int, x: Any, *, stacked: bool) -> Any:
        """One gradient from its accumulated layout to the optimizer's."""
        lead = 1 if stacked and run.length > 1 else 0
        return run_steps(x, run.local.sync[port], self._optimizer_shape(run, port), lead=lead)

    def _tied(self, number: int, run: Run, port: int, x: Any) -> tuple[str, Any]:
        """The gradient of a parameter that an earlier layer owns, in that layer's layout."""
        storage = self.executor.storage
        group = storage.group(storage.tied[number, port])
        source = spec_of(run, port, optimizer=True)
        x = self.executor.move(x, group.shape, source, group.boundary(optimizer=True))
        if group.stacked:
            reference = run.inputs[port].references[0]
            x = jnp.stack([x if r == reference else jnp.zeros_like(x) for r in group.references])
        return group.key, x

    def publish(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Updated parameters from the optimizer's layout to storage, by key."""
        return self._between(params, narrow=False)

    def narrow(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Stored parameters in the optimizer's layout, by key: each device keeps its own part."""
        return self._between(params, narrow=True)

    def _between(self, params: Mapping[str, Any], *, narrow: bool) -> dict[str, Any]:
        storage, sizes, found = self.executor.storage, self.executor.layouts.mesh, dict(params)
        for (number, port), key in storage.owned.items():
            run, group = self.executor.runs[number], storage.group(key)
            steps = run.local.publish[port]
            if not steps or key not in params:
                continue
            lead = 1 if group.stacked else 0
            value = run.local.static.kind.inputs[port].value
            stored, own = (
                self.executor.program(run).shape(value, run.local.inputs[port]),
                self._optimizer_shape(run, port),
            )
            source, target = (stored, own) if narrow else (own, stored)
            x = jnp.reshape(params[key], params[key].shape[:lead] + tuple(source))
            x = _narrowed(x, steps, target, lead=lead) if narrow else run_steps(x, steps, target, lead=lead)
            found[key] = _like(x, group.local_shape(sizes, optimizer=narrow), stacked=group.stacked)
        return found

    def _optimizer_shape(self, run: Run, port: int) -> tuple[int, ...]:
        """Local shape of the optimizer's layout, dim by dim."""
        local, axes = run.local, self.executor.layouts.mesh
        entry = next(e for e in local.plan.parameters if e.port == port)
        value = local.static.kind.inputs[port].value
        whole = [math.prod(local.sizes[f] for f in dim) for dim in local.static.program.program.values[value].dims]
        return tuple(
            n // math.prod(axes[a] for factor in dim for a in factor)
            for n, dim in zip(whole, entry.optimizer, strict=True)
        )


def joined_ties(executor: Executor, ports: Collection[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """From (run, port) of tied parameters to those of their owners, where their gradients are summed in the same way.

    Args:
        executor: whose layers.
        ports: (run, port) of the gradients that are synchronised together.
    """
    storage, runs = executor.storage, executor.runs
    owners = {key: at for at, key in storage.owned.items()}
    found = {}
    for at, key in storage.tied.items():
        owner = owners[key]
        group = storage.group(key)
        if at not in ports or owner not in ports or group.stacked or any(len(dim) > 1 for dim in group.dims):
            continue
        (run, port), (other, place) = (runs[at[0]], at[1]), (runs[owner[0]], owner[1])
        if run.local.sync[port] == other.local.sync[place] and spec_of(run, port, optimizer=True) == spec_of(
            other, place, optimizer=True
        ):
            found[at] = owner
    return found


def _like(x: Any, shape: tuple[int, ...], *, stacked: bool) -> Any:
    """An array in the shape of a stored one, of which it may be some of the rows."""
    return jnp.reshape(x, x.shape[:1] + shape[1:] if stacked else shape)


def _narrowed(x: Any, gathers: Sequence[LayoutStep], shape: tuple[int, ...], *, lead: int) -> Any:
    """Undoes gathers: each device takes the part that it would give."""
    head = x.shape[:lead]
    for step in reversed(gathers):
        assert step.kind is StepKind.ALL_GATHER, step
        part = step.shape[step.join]
        whole = tuple(n * step.size if at == step.join else n for at, n in enumerate(step.shape))
        x = jnp.reshape(x, head + whole)
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(step.names) * part, part, axis=step.join + lead)
    return jnp.reshape(x, head + shape)
