"""What every train step does around its own program: placing batches, compiling, making and converting state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax.errors import InputError
from galvatron_jax.runtime.runs import Layouts
from galvatron_jax.spec.plan import Plan
from galvatron_jax.trace.functional import named_leaves
from galvatron_jax.trace.model import Traced

State = dict[str, Any]
"""`params` (stored arrays by key), `opt_state` (optax's), `model_state` (by path), `step` (int32)."""


@dataclass(frozen=True)
class StepProgram(ABC):
    """A train step: `state, metrics = step(state, batch)`."""

    traced: Traced
    plan: Plan
    optimizer: optax.GradientTransformation
    mesh: Mesh
    layouts: Layouts
    """Of values that cross layers."""

    # ------------------------------------------------------------------------------------------ state

    @abstractmethod
    def _init(self, seed: Any) -> State:
        """The state before the first step; traced."""

    @abstractmethod
    def _state_shardings(self, shapes: State) -> State:
        """How the state is sharded."""

    @abstractmethod
    def _to_tree(self, state: State) -> State:
        """The state with the model's own leaves by path; traced."""

    @abstractmethod
    def _from_tree(self, tree: State) -> State:
        """The inverse of `_to_tree`; traced."""

    @abstractmethod
    def _parameters(self, params: dict[str, Any]) -> dict[str, Any]:
        """The model's parameters by path; traced."""

    @abstractmethod
    def _step(self, state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        """One step on a placed batch; traced."""

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """A sharding over the plan's mesh."""
        return NamedSharding(self.mesh, spec)

    @cached_property
    def state_shapes(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(self._init, 0)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self._state_shardings(shapes)
        )

    @property
    def state_shardings(self) -> State:
        """Shardings of the state."""
        return jax.tree.map(lambda s: s.sharding, self.state_shapes)

    def init(self, seed: int | None = None) -> State:
        """The state before the first step, every array born sharded."""
        return jax.jit(partial(self._init, seed), out_shardings=self.state_shardings)()

    def to_tree(self, state: State) -> State:
        """The state with the model's own leaves by path, whatever the plan."""
        return self._conversions[0](self._settled(state))

    def from_tree(self, tree: State) -> State:
        """A state of this plan from what `to_tree` gave under any plan."""
        return jax.jit(self._from_tree, out_shardings=self.state_shardings)(self._settled(tree))

    def parameters(self, state: State) -> dict[str, Any]:
        """The model's parameters by path."""
        return self._conversions[1](self._settled(state["params"]))

    @cached_property
    def _conversions(self) -> tuple[Any, Any]:
        return jax.jit(self._to_tree), jax.jit(self._parameters)

    def _settled(self, tree: Any) -> Any:
        """Arrays that nothing is still computing, where two programs in flight could block each other.

        Virtual CPU devices share one pool of threads, and collectives wait in it for all their members.
        """
        return jax.block_until_ready(tree) if self.mesh.devices.flat[0].platform == "cpu" else tree

    # ------------------------------------------------------------------------------------------ the step

    def __call__(self, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        """Runs one optimizer step. The state given is donated.

        Args:
            state: as the last call gave it.
            batch: pytree of arrays with the global batch as dim 0.
        """
        return self._executable(self._settled(state), self.place(batch))

    @property
    def _executable(self) -> Any:
        """What a call runs."""
        return self.jitted

    def place(self, batch: Any) -> dict[str, Any]:
        """A global batch as micro-batches on the devices: per leaf `(microbatches, examples, ...)`, sharded."""
        leaves = named_leaves(batch)
        if set(leaves) != set(self.traced.batch_names):
            raise InputError(
                f"the batch has leaves {sorted(leaves)}, the step was built for {self.traced.batch_names}."
            )
        placed = {}
        for name in self.traced.batch_names:
            shape = self.batch_shapes[name]
            leaf = leaves[name]
            if math.prod(np.shape(leaf)) != math.prod(shape.shape):
                raise InputError(
                    f"batch leaf {name!r} has shape {np.shape(leaf)}; the plan wants {self.plan.global_batch} examples "
                    f"of {shape.shape[2:]}."
                )
            placed[name] = self._put(leaf, shape)
        return placed

    def _put(self, leaf: Any, shape: jax.ShapeDtypeStruct) -> Any:
        if isinstance(leaf, jax.Array):
            if leaf.shape == shape.shape and leaf.sharding == shape.sharding:
                return leaf
            return jax.device_put(jnp.reshape(leaf, shape.shape).astype(shape.dtype), shape.sharding)
        array = np.asarray(leaf, dtype=shape.dtype).reshape(shape.shape)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: array[index])

    @cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a placed batch."""
        shapes = {}
        for name in self.traced.batch_names:
            reference = f"batch:{name}"
            aval = self.traced.avals[reference]
            spec = PartitionSpec(None, *self.layouts.specs[reference])
            shapes[name] = jax.ShapeDtypeStruct(
                (self.plan.num_microbatches, *aval.shape), aval.dtype, sharding=self.sharding(spec)
            )
        return shapes

    @cached_property
    def jitted(self) -> Any:
        """The jitted step on a placed batch."""
        return jax.jit(self._step, donate_argnums=0, out_shardings=(self.state_shardings, None))

    @cached_property
    def lowered(self) -> Any:
        """The lowered step: collectives as planned, before any combiner."""
        return self.jitted.lower(self.state_shapes, self.batch_shapes)

    @cached_property
    def compiled(self) -> Any:
        """The compiled step."""
        return self.lowered.compile()

    @property
    def metric_names(self) -> list[str]:
        """Keys of the metrics."""
        names = [sink for sink, _ in self.traced.spec.results if sink.split(":")[0] in ("loss", "aux")]
        return [name.removeprefix("aux:") for name in names]
