"""Layer marks: an identity primitive at each block's entry and exit, put there while the loss is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

layer_mark_p = jex.Primitive("layer_mark")
layer_mark_p.multiple_results = True
layer_mark_p.def_impl(lambda *arrays, **_: list(arrays))
layer_mark_p.def_abstract_eval(lambda *avals, **_: list(avals))
mlir.register_lowering(layer_mark_p, lambda _, *arrays, **__: list(arrays))
batching.primitive_batchers[layer_mark_p] = lambda arrays, dims, **params: (
    layer_mark_p.bind(*arrays, **params),
    list(dims),
)


def _mark_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[list, list]:
    return layer_mark_p.bind(*primals, **params), [ad.instantiate_zeros(t) for t in tangents]


ad.primitive_jvps[layer_mark_p] = _mark_jvp


def mark(tree: Any, *, entry: bool, block: str) -> Any:
    """Marks every array of a pytree. Modules and variables in it pass as they are: rebuilt, they would lose state."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, nnx.Object | nnx.Variable | nn.Module))
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | jax.core.Tracer)]
    if arrays:
        marked = layer_mark_p.bind(*[leaves[i] for i in arrays], entry=entry, block=block)
        for i, leaf in zip(arrays, marked, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


@contextlib.contextmanager
def nnx_marks(classes: frozenset[type]) -> Iterator[None]:
    """While open, calls of these NNX classes are marked (outermost calls only)."""
    depth = [0]
    originals = {cls: cls.__call__ for cls in classes}

    def marked(original: Callable) -> Callable:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if depth[0]:
                return original(self, *args, **kwargs)
            depth[0] += 1
            try:
                args, kwargs = mark((args, kwargs), entry=True, block=type(self).__name__)
                return mark(original(self, *args, **kwargs), entry=False, block=type(self).__name__)
            finally:
                depth[0] -= 1

        return call

    try:
        for cls, original in originals.items():
            cls.__call__ = marked(original)
        yield
    finally:
        for cls, original in originals.items():
            cls.__call__ = original


@contextlib.contextmanager
def linen_marks(classes: frozenset[str]) -> Iterator[None]:
    """While open, calls of the Linen classes with these names are marked (outermost calls only)."""
    depth = [0]

    def intercept(next_fun: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        name = linen_class_name(type(context.module))
        if context.method_name != "__call__" or depth[0] or name not in classes:
            return next_fun(*args, **kwargs)
        depth[0] += 1
        try:
            args, kwargs = mark((args, kwargs), entry=True, block=name)
            return mark(next_fun(*args, **kwargs), entry=False, block=name)
        finally:
            depth[0] -= 1

    with nn.intercept_methods(intercept):
        yield


def linen_class_name(cls: type) -> str:
    """A name that two uses of one class share, also where each lifted transform makes a class of its own."""
    return cls.__qualname__.rsplit(".", 1)[-1]
