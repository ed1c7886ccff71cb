"""Any optax optimizer on stored arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import optax

from galvatron_jax.runtime.storage import Storage

if TYPE_CHECKING:
    from galvatron_jax.runtime.step import State, Step


@dataclass(frozen=True)
class OptimizerProgram:
    """The optimizer's state and update, on stored arrays or on the model's own."""

    optimizer: optax.GradientTransformation
    storage: Storage
    paths: tuple[str, ...]
    stored: bool
    """Whether the update runs on stored arrays: it then acts elementwise but for sums over all parameters. Otherwise
    (Adafactor, layer-wise norms, masks by path) stored arrays are taken apart into the model's own for the update."""

    def init(self, params: Mapping[str, Any]) -> Any:
        """The optimizer's state for stored parameters."""
        return self.optimizer.init(self._view(params))

    def _view(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        return dict(stored) if self.stored else self.storage.unpack(stored, self.paths)

    def update(self, step: Step, gradients: Any, opt_state: Any, params: Any) -> tuple[dict[str, Any], Any]:
        """New stored parameters and optimizer state."""
        specs = {g.key: step.sharding(g.spec(optimizer=True)) for g in self.storage.groups}
        constrain: Callable = jax.lax.with_sharding_constraint
        params = constrain(params, specs)
        view = self._view(params)
        updates, opt_state = self.optimizer.update(self._view(gradients), opt_state, view)
        new = optax.apply_updates(view, updates)
        if not self.stored:
            new = self.storage.pack(new)
        new = constrain(new, specs)
        return (step.publish(new) if step.publishes else new), opt_state

    def shardings(self, opt_state: Any, mirrored: Mapping[str, Any], whole: Any) -> Any:
        """Shardings of the optimizer's state: arrays that mirror a parameter as it, everything else whole."""
        shapes = {g.key: g.stored_shape for g in self.storage.groups}

        def sharding(path: tuple, leaf: Any) -> Any:
            for key in reversed(path):
                name = getattr(key, "key", None)
                if name in shapes and leaf.shape == shapes[name]:
                    return mirrored[name]
            return whole

        return jax.tree_util.tree_map_with_path(sharding, opt_state)

    def to_tree(self, step: Step, state: State) -> State:
        """The state with the model's own leaves by path."""
        return {**state, "params": self.storage.unpack(state["params"], self.paths)}

    def from_tree(self, step: Step, tree: State) -> State:
        """The inverse of `to_tree`."""
        return {**tree, "params": self.storage.pack(tree["params"])}


def make_optimizer(
    optimizer: optax.GradientTransformation, parameters: Mapping[str, Any], storage: Storage
) -> OptimizerProgram:
    """Prepares an optimizer for a way of storing parameters."""
    return OptimizerProgram(optimizer, storage, tuple(parameters), stored=True)
