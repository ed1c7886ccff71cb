"""How to build an NNX model, recorded instead of done: what lets a 70-billion-parameter model cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from galvatron_jax import _compat


class Recipe:
    """The construction of one NNX module: its class and arguments, with the random generators as they were.

    The generators among the arguments are copied, so building twice gives the same module, and the caller's
    own generators do not advance.
    """

    def __init__(self, construct: Callable[..., nnx.Module], /, *args: Any, **kwargs: Any):
        self._construct = construct
        self._args = tuple(_freeze(argument) for argument in args)
        self._kwargs = {name: _freeze(argument) for name, argument in kwargs.items()}

    def build(self, seed: jax.typing.ArrayLike | None = None) -> nnx.Module:
        """Builds the module.

        Traceable; call it under `jax.jit` or `jax.eval_shape`, where the initial values may be born sharded.

        Args:
            seed: seeds every generator among the arguments anew; None builds with the generators as given.
        """
        args = [_thaw(argument, seed) for argument in self._args]
        kwargs = {name: _thaw(argument, seed) for name, argument in self._kwargs.items()}
        # The user's sharding annotations are read by the tracer; they need no mesh here.
        with nnx.use_eager_sharding(False), _compat.brief_tracer_errors():
            return self._construct(*args, **kwargs)

    def abstract(self) -> nnx.Module:
        """The module with a `jax.ShapeDtypeStruct` in place of every array."""
        return nnx.eval_shape(self.build)

    def concrete(self) -> nnx.Module:
        """The module itself, on the default device."""
        return nnx.jit(self.build)()


class _FrozenNode:
    """An NNX object among the arguments (`nnx.Rngs`, a module), split so that each use gets its own copy."""

    def __init__(self, node: Any):
        self.graphdef, self.state = nnx.split(node)
        self.reseedable = isinstance(node, nnx.Rngs)


def _freeze(argument: Any) -> Any:
    return _FrozenNode(argument) if isinstance(argument, (nnx.Rngs, nnx.Module, nnx.Variable)) else argument


def _thaw(argument: Any, seed: jax.typing.ArrayLike | None) -> Any:
    if not isinstance(argument, _FrozenNode):
        return argument
    node = nnx.merge(argument.graphdef, jax.tree.map(lambda leaf: leaf, argument.state))
    return _reseeded(node, seed) if argument.reseedable and seed is not None else node


def _reseeded(rngs: nnx.Rngs, seed: jax.typing.ArrayLike) -> nnx.Rngs:
    """One stream gets `seed` itself, as `nnx.Rngs(seed)` would; several get keys folded from it."""
    streams = sorted(rngs)
    key = jax.random.key(seed)
    keys = [key] if len(streams) == 1 else [jax.random.fold_in(key, index) for index in range(len(streams))]
    for name, stream_key in zip(streams, keys, strict=True):
        rngs[name].key.set_value(stream_key)
        rngs[name].count.set_value(jax.numpy.zeros((), jax.numpy.uint32))
    return rngs
