"""`auto_shard`: marks a Flax class for automatic parallelism. Its instances are abstract until called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import flax.linen
import jax
from flax import nnx

from galvatron_jax.api.budget import memory_budget
from galvatron_jax.api.recipe import Recipe
from galvatron_jax.errors import InputError

M = TypeVar("M")

_OPTIONS, _RECIPE = "_galvatron_options", "_galvatron_recipe"
"""Attributes of decorated classes and of their instances."""


@dataclass(frozen=True)
class Options:
    """What the decorator was told; `train_step` uses it where its own arguments leave a choice."""

    memory_bytes: int | None = None
    """Budget per device; None means all of the device's memory."""
    num_microbatches: int | None = None
    """Micro-batches per step; None lets the search choose."""


@overload
def auto_shard(cls: type[M], /) -> type[M]: ...
@overload
def auto_shard(
    *, memory_per_device: str | int | None = None, num_microbatches: int | None = None
) -> Callable[[type[M]], type[M]]: ...


def auto_shard(
    cls: type[M] | None = None,
    /,
    *,
    memory_per_device: str | int | None = None,
    num_microbatches: int | None = None,
) -> type[M] | Callable[[type[M]], type[M]]:
    """Class decorator for any `flax.nnx.Module` or `flax.linen.Module`; bare, or with options.

    An instance of a decorated NNX class holds shapes instead of arrays, so building one of 70 billion
    parameters costs nothing; `train_step` gives its parameters their values, sharded. Calling the instance,
    or `materialize(instance)`, gives a small one its values on the default device. Inside `jax.jit`,
    `jax.eval_shape` and the like the class builds as it would undecorated. (Linen modules hold no arrays anyway.)

    The generators handed to the class (`rngs=nnx.Rngs(0)`) are copied and do not advance.

    Args:
        cls: the class, where the decorator is used bare.
        memory_per_device: budget such as ``"20GiB"``, or bytes; by default all of the device's memory.
        num_microbatches: micro-batches per step; by default the search chooses.

    Raises:
        InputError: when the class is no Flax module or an option makes no sense.

    Example:
        >>> from flax import nnx
        >>> @auto_shard(memory_per_device="20GiB")
        ... class Net(nnx.Module):
        ...     def __init__(self, *, rngs):
        ...         self.linear = nnx.Linear(8, 8, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.linear(x)
        >>> Net(rngs=nnx.Rngs(0)).linear.kernel.get_value()
        ShapeDtypeStruct(shape=(8, 8), dtype=float32)
    """
    options = Options(memory_bytes=memory_budget(memory_per_device), num_microbatches=num_microbatches)
    if num_microbatches is not None and num_microbatches < 1:
        raise InputError(f"num_microbatches is {num_microbatches}; give 1 or more, or leave it out to have it chosen.")
    if cls is None:
        return lambda decorated: _decorate(decorated, options)
    return _decorate(cls, options)


def options_of(model: object) -> Options:
    """The options of the decorator on the model's class; the defaults where it is undecorated."""
    return getattr(model, _OPTIONS, None) or Options()


def recipe_of(model: object) -> Recipe | None:
    """How to build the model anew; None for a Linen module or an undecorated class."""
    return getattr(model, _RECIPE, None)


def is_abstract(model: nnx.Module) -> bool:
    """Whether the model's variables hold shapes instead of arrays."""
    leaves = jax.tree.leaves(nnx.state(model))
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def materialize(model: M) -> M:
    """Gives an instance of a decorated NNX class its initial values on the default device, in place, once.

    Raises:
        InputError: when the model is abstract and no record of its construction exists.
    """
    if not isinstance(model, nnx.Module) or not is_abstract(model):
        return model
    recipe = recipe_of(model)
    if recipe is None:
        raise InputError(
            f"This {type(model).__name__} holds shapes only and does not say how it was built. "
            "Decorate its class with @auto_shard, or build it without nnx.eval_shape."
        )
    nnx.update(model, nnx.state(recipe.concrete()))
    return model


def _decorate(cls: type, options: Options) -> type:
    if not isinstance(cls, type) or not issubclass(cls, (nnx.Module, flax.linen.Module)):
        raise InputError(
            f"auto_shard decorates classes of flax.nnx.Module or flax.linen.Module, and {cls!r} is neither."
        )
    namespace: dict[str, Any] = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace[_OPTIONS] = options
    if issubclass(cls, flax.linen.Module):
        return type(cls)(cls.__name__, (cls,), namespace)
    namespace["__call__"] = _materializing_call
    metaclass = type("LazyMeta", (_LazyConstruction, type(cls)), {})
    return metaclass(cls.__name__, (cls,), namespace)


class _LazyConstruction(type):
    """Metaclass part: a call of the class records the construction and gives the abstract module."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if _under_trace():
            return super().__call__(*args, **kwargs)
        recipe = Recipe(cls, *args, **kwargs)
        module = recipe.abstract()
        setattr(module, _RECIPE, recipe)
        return module


def _materializing_call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    decorated: Any = next(base for base in type(self).__mro__ if vars(base).get("__call__") is _materializing_call)
    return super(decorated, materialize(self)).__call__(*args, **kwargs)


def _under_trace() -> bool:
    return isinstance(jax.numpy.zeros(()), jax.core.Tracer)
