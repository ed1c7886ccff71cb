"""The zoo by name: families, their presets, and models built from a preset with some fields changed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx

from . import bert, gpt2, llama, moe, swin, t5, vit

_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a family of models offers, whichever it is.

    Example:
        >>> gpt2 = family("gpt2")
        >>> gpt2.example_batch(gpt2.presets["tiny"], 4)["tokens"].shape
        (4, 33)
    """

    name: str
    model: Callable[..., nnx.Module]
    """The class, called as ``model(config, rngs=rngs)``."""
    loss_fn: Callable[..., Any]
    """``loss_fn(model, batch)``, the loss or ``(loss, aux)``."""
    example_batch: Callable[[Any, int], dict[str, jax.ShapeDtypeStruct]]
    """``example_batch(config, batch_size)``, the shapes of a batch."""
    random_batch: Callable[..., dict[str, np.ndarray]]
    """``random_batch(config, batch_size, seed=0)``, arrays of those shapes."""
    presets: Mapping[str, Any]
    """Configurations by size."""


def _family(name: str, module: ModuleType, model: type[nnx.Module]) -> Family:
    return Family(
        name=name,
        model=model,
        loss_fn=module.loss_fn,
        example_batch=module.example_batch,
        random_batch=module.random_batch,
        presets=module.PRESETS,
    )


_FAMILIES = {
    entry.name: entry
    for entry in (
        _family("bert", bert, bert.Bert),
        _family("gpt2", gpt2, gpt2.GPT2),
        _family("llama", llama, llama.Llama),
        _family("moe", moe, moe.MoE),
        _family("swin", swin, swin.Swin),
        _family("t5", t5, t5.T5),
        _family("vit", vit, vit.ViT),
    )
}


def families() -> tuple[str, ...]:
    """Names of the families.

    Example:
        >>> families()
        ('bert', 'gpt2', 'llama', 'moe', 'swin', 't5', 'vit')
    """
    return tuple(_FAMILIES)


def family(name: str) -> Family:
    """A family by name.

    Raises:
        ValueError: when there is none of that name; the message lists the near ones.
    """
    return _FAMILIES[_known(name, _FAMILIES, "family", "the zoo")]


def presets(name: str) -> tuple[str, ...]:
    """Names of a family's presets.

    Raises:
        ValueError: when there is no such family.

    Example:
        >>> presets("gpt2")
        ('tiny', 'small', 'medium', 'large', 'xl')
    """
    return tuple(family(name).presets)


def model_config(name: str, preset: str, **overrides: Any) -> Any:
    """The configuration of a preset, with some fields changed.

    Args:
        name: the family.
        preset: one of :func:`presets`.
        **overrides: fields of the family's configuration.

    Raises:
        ValueError: when the family, the preset or fields are unknown (with the near names), a value has the wrong
            type, or the sizes do not go together. Every faulty field is named.

    Example:
        >>> model_config("llama", "llama2-7b", dtype="bfloat16").num_layers
        32
    """
    found = family(name)
    base = found.presets[_known(preset, found.presets, "preset", f"family {name!r}")]
    defaults = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    faults, values = [], {}
    for key, value in overrides.items():
        try:
            values[key] = _converted(key, value, defaults[_known(key, defaults, "field", type(base).__name__)])
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return dataclasses.replace(base, **values)


def build(name: str, preset: str | Mapping[str, Any], *, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a model of the zoo.

    Args:
        name: the family.
        preset: a preset's name, or a mapping of fields to change with the preset's name under ``"preset"``.
        rngs: randomness for the parameters.

    Raises:
        ValueError: as :func:`model_config`.

    Example:
        >>> model = build("gpt2", {"preset": "tiny", "num_layers": 2}, rngs=nnx.Rngs(0))
        >>> len(model.blocks)
        2
    """
    fields = {"preset": preset} if isinstance(preset, str) else dict(preset)
    if "preset" not in fields:
        raise ValueError(f"No preset named for family {name!r}; give 'preset', one of: {', '.join(presets(name))}.")
    size = fields.pop("preset")
    return family(name).model(model_config(name, size, **fields), rngs=rngs)


def _known(name: str, names: Iterable[str], what: str, where: str) -> str:
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"No {what} {name!r} in {where}. {hint}There are: {', '.join(names)}.")


def _converted(key: str, value: Any, default: Any) -> Any:
    """The value in the type of the field's default: lists become tuples, whole numbers become floats."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(_converted(f"{key}[{index}]", entry, default[0]) for index, entry in enumerate(value))
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{key}={value!r} is {_article(value)}, but {key} must be {_article(default)}.")
    if key in ("dtype", "param_dtype") and value not in _DTYPES:
        raise ValueError(f"{key}={value!r} is no floating-point type; choose one of: {', '.join(_DTYPES)}.")
    return value


def _article(value: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")
