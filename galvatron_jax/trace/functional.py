"""A Flax model and its loss as one pure function of parameters, state and batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from galvatron_jax import _compat
from galvatron_jax.errors import InputError, TraceError
from galvatron_jax.trace import discover, marks

Annotation = tuple[Any, ...]
"""Per dim of a parameter, the name its author gave it, or None."""

Leaves = dict[str, Any]
"""Leaves by path, such as `blocks/0/attn/qkv/kernel`."""


@dataclass(frozen=True)
class LossOutput:
    """What one evaluation of the loss gives."""

    loss: Any
    weight: Any | None
    aux: Leaves
    state: Leaves


@dataclass(frozen=True)
class Functional:
    """A model as data and pure functions."""

    name: str
    parameters: Leaves
    """Shapes and dtypes of what is trained."""
    state: Leaves
    """Shapes and dtypes of everything else: random keys and counters, batch statistics."""
    apply: Callable[[Leaves, Leaves, Any], LossOutput]
    init: Callable[[jax.Array | int], tuple[Leaves, Leaves]]
    """From a seed to parameters and state; traceable, so that it can be born sharded."""
    classes: frozenset
    """Classes of the repeated blocks (names of them, for Linen)."""
    marks: Callable[[frozenset], Any]
    """Context manager under which calls of those classes are marked."""
    annotations: Mapping[str, Annotation] = field(default_factory=dict)
    """The user's own sharding annotations by parameter: dims without a name stay whole under tensor parallelism."""


def path_name(path: tuple) -> str:
    """A key path as text: `blocks/0/kernel`."""
    parts = []
    for key in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
    if parts and parts[-1] == "value":
        parts.pop()
    return "/".join(parts)


def named_leaves(tree: Any) -> Leaves:
    """The leaves of a pytree by path."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def functional(
    model: nnx.Module | nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    batch: Any,
    *,
    make: Callable[[Any], nnx.Module] | None = None,
) -> Functional:
    """Makes a pure function of a model, NNX (concrete or abstract) or Linen.

    Args:
        model: the module; its leaves may be `jax.ShapeDtypeStruct`s.
        loss_fn: `loss_fn(model, batch) -> loss` or `(loss, aux)`.
        batch: pytree of arrays or shapes, of one micro-batch.
        make: constructs the NNX model afresh inside a trace (given a seed); without it, `init` hands out the
            model's own values.

    Raises:
        InputError: when `model` is no Flax module.
    """
    if isinstance(model, nnx.Module):
        return _functional_nnx(model, loss_fn, make)
    if isinstance(model, nn.Module):
        return _functional_linen(model, loss_fn, batch)
    raise InputError(f"model is a {type(model).__name__}; give a flax.nnx.Module or a flax.linen.Module.")


def _unpack(output: Any) -> tuple[Any, Any, Leaves]:
    """The loss, the weight if any, and the other aux leaves."""
    loss, aux = output if isinstance(output, tuple) and len(output) == 2 else (output, {})
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise InputError(
            f"loss_fn must return a scalar float loss (or a pair of it and aux), got shape {jnp.shape(loss)} and dtype "
            f"{jnp.result_type(loss)}. Take the mean over the batch, for example with jnp.mean."
        )
    weight = aux.get("weight") if isinstance(aux, Mapping) else None
    rest = {k: v for k, v in aux.items() if k != "weight"} if isinstance(aux, Mapping) else aux
    return loss, weight, named_leaves(rest)


# ------------------------------------------------------------------------------------------------------ NNX


def _functional_nnx(
    model: nnx.Module, loss_fn: Callable[[Any, Any], Any], make: Callable[[Any], nnx.Module] | None
) -> Functional:
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    parameter_leaves, parameter_tree = jax.tree.flatten(parameters)
    rest_leaves, rest_tree = jax.tree.flatten(rest)
    parameter_names, rest_names = list(named_leaves(parameters)), list(named_leaves(rest))

    def apply(parameters: Leaves, state: Leaves, batch: Any) -> LossOutput:
        module = nnx.merge(
            graph,
            jax.tree.unflatten(parameter_tree, [parameters[n] for n in parameter_names]),
            jax.tree.unflatten(rest_tree, [state[n] for n in rest_names]),
            copy=True,
        )
        loss, weight, aux = _unpack(loss_fn(module, batch))
        after = named_leaves(nnx.split(module, nnx.Param, ...)[2])
        if set(after) != set(rest_names):
            raise TraceError(
                f"the loss added or removed variables of the model: {sorted(set(after) ^ set(rest_names))}. "
                "Create every variable in the constructor."
            )
        return LossOutput(loss, weight, aux, after)

    def init(seed: Any) -> tuple[Leaves, Leaves]:
        if make is None:
            return dict(zip(parameter_names, parameter_leaves, strict=True)), dict(
                zip(rest_names, rest_leaves, strict=True)
            )
        with _compat.brief_tracer_errors():
            _, parameters, rest = nnx.split(make(seed), nnx.Param, ...)
        return named_leaves(parameters), named_leaves(rest)

    return Functional(
        name=type(model).__name__,
        parameters=dict(zip(parameter_names, map(_shape, parameter_leaves), strict=True)),
        state=dict(zip(rest_names, map(_shape, rest_leaves), strict=True)),
        apply=apply,
        init=init,
        classes=discover.repeated_classes(
            discover.nnx_candidates(model), sum(_bytes(leaf) for leaf in parameter_leaves)
        ),
        marks=marks.nnx_marks,
        annotations=_nnx_annotations(parameters),
    )


def _nnx_annotations(parameters: nnx.State) -> dict[str, Annotation]:
    """`out_sharding` metadata of the model's variables (`nnx.with_partitioning` puts it there)."""
    found = {}
    for path, variable in nnx.to_flat_state(parameters):
        names = variable.get_metadata().get("out_sharding")
        if names is not None:
            found["/".join(map(str, path))] = tuple(names)
    return found


# ------------------------------------------------------------------------------------------------------ Linen


def _functional_linen(module: nn.Module, loss_fn: Callable[[Any, Any], Any], batch: Any) -> Functional:
    """Trained: the `params` collection. State: the other collections, and a key with a counter for `make_rng`."""

    def init_boxed(key: Any, batch: Any) -> Any:
        return nn.init(lambda bound, batch: loss_fn(bound, batch), module)({"params": key}, batch)

    def init_variables(key: Any, batch: Any) -> Any:
        return nn.unbox(init_boxed(key, batch))

    abstract = jax.tree.map(_shape, batch)
    boxed = jax.eval_shape(init_boxed, jax.random.key(0), abstract)
    shapes = nn.unbox(boxed)
    trained = shapes.get("params", {})
    others = {name: tree for name, tree in shapes.items() if name != "params"}
    trained_tree, others_tree = jax.tree.structure(trained), jax.tree.structure(others)
    trained_names, others_names = list(named_leaves(trained)), list(named_leaves(others))

    def run(parameters: Leaves, state: Leaves, batch: Any) -> tuple[Any, Any]:
        variables = {
            "params": jax.tree.unflatten(trained_tree, [parameters[n] for n in trained_names]),
            **jax.tree.unflatten(others_tree, [state[n] for n in others_names]),
        }
        key = jax.random.fold_in(state["rng/key"], state["rng/count"])
        call = nn.apply(lambda bound, batch: loss_fn(bound, batch), module, mutable=list(others))
        return call(variables, batch, rngs={"params": key})

    def apply(parameters: Leaves, state: Leaves, batch: Any) -> LossOutput:
        output, changed = run(parameters, state, batch)
        loss, weight, aux = _unpack(output)
        after = dict(state) | named_leaves(changed)
        after["rng/count"] = state["rng/count"] + jnp.uint32(1)
        return LossOutput(loss, weight, aux, after)

    def init(seed: Any) -> tuple[Leaves, Leaves]:
        key = jax.random.key(seed)
        filled = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
        variables = init_variables(key, filled)
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        state = named_leaves(rest) | {"rng/key": jax.random.fold_in(key, 1), "rng/count": jnp.uint32(0)}
        return named_leaves(variables["params"]), state

    state = named_leaves(others) | {
        "rng/key": jax.eval_shape(lambda: jax.random.key(0)),
        "rng/count": jax.ShapeDtypeStruct((), jnp.uint32),
    }
    parameters = named_leaves(trained)

    def call() -> Any:
        return jax.eval_shape(lambda *arguments: apply(*arguments).loss, parameters, state, abstract)

    return Functional(
        name=type(module).__name__,
        parameters=parameters,
        state=state,
        apply=apply,
        init=init,
        classes=discover.repeated_classes(
            discover.linen_candidates(module, shapes, call), sum(_bytes(leaf) for leaf in parameters.values())
        ),
        marks=marks.linen_marks,
        annotations=_linen_annotations(boxed.get("params", {})),
    )


def _linen_annotations(boxed: Any) -> dict[str, Annotation]:
    """Names from `nn.with_partitioning` or `nn.with_logical_partitioning`, logical ones by the rules in force."""
    specs = nn.get_partition_spec(boxed)
    if nn.get_logical_axis_rules():
        specs = nn.logical_to_mesh(specs)
    leaves = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    return {
        path_name(path): tuple(spec)
        for path, spec in leaves[0]
        if isinstance(spec, jax.sharding.PartitionSpec) and spec
    }


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize
