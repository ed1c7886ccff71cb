"""Any optax optimizer, on stored arrays where that is proved to mean the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from galvatron_jax.errors import InputError
from galvatron_jax.runtime.optimizer_expression import StoredUpdate
from galvatron_jax.runtime.optimizer_proof import UnprovedError, prove
from galvatron_jax.runtime.optimizer_state import StateTree, StoredState, flat, model_specs, nested, state_tree
from galvatron_jax.runtime.storage import Storage

if TYPE_CHECKING:
    from galvatron_jax.runtime.program import State
    from galvatron_jax.runtime.step import Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerProgram:
    """The optimizer's state and update, on stored arrays or on the model's own.

    The optimizer is always given the model's own parameters, as nested dicts: masks and labels mean what they say.
    Where its update is proved to treat all parameters of a stored array alike (SGD, AdamW, Lion, LAMB, with clipping,
    schedules and masks), that update runs on the stored arrays. Otherwise (Adafactor) they are taken apart for it.
    """

    optimizer: optax.GradientTransformation
    parameters: Mapping[str, Any]
    """Shapes by path."""
    layout: StoredState
    stored_update: StoredUpdate | None
    """The update of stored arrays, where there is one."""

    @property
    def storage(self) -> Storage:
        """How parameters are stored."""
        return self.layout.storage

    @property
    def stored(self) -> bool:
        """Whether state and update are on stored arrays."""
        return self.stored_update is not None

    def init(self, params: Mapping[str, Any]) -> Any:
        """The optimizer's state for stored parameters."""
        state = self.optimizer.init(self._view(params))
        return self.layout.pack(state) if self.stored else state

    def _view(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        return nested(self.storage.unpack(stored, list(self.parameters)))

    def update(self, step: Step, gradients: Any, opt_state: Any, params: Any) -> tuple[dict[str, Any], Any]:
        """New stored parameters and optimizer state."""
        specs = {g.key: step.sharding(g.spec(optimizer=True)) for g in self.storage.groups}
        constrain: Callable = jax.lax.with_sharding_constraint
        params = constrain(params, specs)
        if self.stored_update is not None:
            new, opt_state = self.stored_update(gradients, opt_state, params)
        else:
            own = nested({path: step.sharding(spec) for path, spec in self._specs.items()})
            gradients, params = constrain(self._view(gradients), own), constrain(self._view(params), own)
            new, opt_state = update_fn(self.optimizer)(gradients, opt_state, params)
            new = self.storage.pack(flat(constrain(new, own)))
        new = constrain(new, specs)
        return (step.publish(new) if step.publishes else new), opt_state

    @cached_property
    def _specs(self) -> dict[str, PartitionSpec]:
        return model_specs(self.storage, self.parameters)

    def shardings(self, opt_state: Any, mirrored: Mapping[str, NamedSharding], whole: NamedSharding) -> Any:
        """Shardings of the optimizer's state: arrays that mirror parameters as the optimizer's, everything else whole.

        Args:
            opt_state: the state, as shapes.
            mirrored: the optimizer's sharding per group.
            whole: the sharding of what every device has.
        """
        tree = self.layout.tree
        if self.stored:
            slots, others = self.layout.split(opt_state)
            return self.layout.join(
                [{key: mirrored[key] for key in slot} for slot in slots], dict.fromkeys(others, whole)
            )
        leaves = [whole] * len(tree.shapes)
        for position, (_, path) in tree.mirrored.items():
            leaves[position] = NamedSharding(whole.mesh, self._specs[path])
        return tree.tree.unflatten(leaves)

    def to_tree(self, step: Step, state: State) -> State:
        """The state as without any plan: the model's own leaves by path, and what optax has for them."""
        opt_state = self.layout.unpack(state["opt_state"]) if self.stored else state["opt_state"]
        return {**state, "params": self.storage.unpack(state["params"], list(self.parameters)), "opt_state": opt_state}

    def from_tree(self, step: Step, tree: State) -> State:
        """The inverse of `to_tree`."""
        opt_state = self.layout.pack(tree["opt_state"]) if self.stored else tree["opt_state"]
        return {**tree, "params": self.storage.pack(tree["params"]), "opt_state": opt_state}


def make_optimizer(
    optimizer: optax.GradientTransformation, parameters: Mapping[str, Any], storage: Storage
) -> OptimizerProgram:
    """Prepares an optimizer for a way of storing parameters.

    Args:
        optimizer: any optax optimizer whose update needs gradients, state and parameters only.
        parameters: their shapes by path.
        storage: how they are stored.

    Raises:
        InputError: when the optimizer does not run on these parameters.
    """
    tree, closed = trace_update(optimizer, parameters)
    layout = StoredState(tree, storage, dict(parameters))
    try:
        update = prove(closed, layout)
    except UnprovedError as reason:
        logger.info("The optimizer updates the model's own arrays, since %s.", reason)
        return OptimizerProgram(optimizer, dict(parameters), layout, None)
    logger.info("The optimizer updates stored arrays: it treats all layers of each alike.")
    return OptimizerProgram(optimizer, dict(parameters), layout, update)


def update_fn(optimizer: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """An optimizer's update of parameters, not only what it adds to them."""

    def update(gradients: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    return update


def trace_update(optimizer: optax.GradientTransformation, parameters: Mapping[str, Any]) -> tuple[StateTree, Any]:
    """The state for the model's own tree, and the update as a jaxpr."""
    own = nested(parameters)
    try:
        state = jax.eval_shape(optimizer.init, own)
        closed, (_, after) = jax.make_jaxpr(update_fn(optimizer), return_shape=True)(own, state, own)
    except Exception as error:
        raise InputError(
            f"The optimizer does not run on the model's parameters: {type(error).__name__}: {error}\n"
            "Its update gets gradients, its state and the parameters, as dicts nested by path and nothing else: an "
            "optimizer that needs the loss or its function (line searches, reduce_on_plateau) cannot be used, and "
            "masks and labels must be given as functions of the parameters or as such dicts."
        ) from error
    if jax.tree.structure(after) != jax.tree.structure(state):
        raise InputError(
            "The optimizer's update returns a state of another structure than init gave:\n"
            f"{jax.tree.structure(after)}\nafter\n{jax.tree.structure(state)}."
        )
    return state_tree(state, parameters), closed
