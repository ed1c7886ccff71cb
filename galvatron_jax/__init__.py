"""Automatic hybrid-parallel training for JAX and Flax.

The whole of it in one picture; each arrow is a document that a file can hold::

    Flax model ──trace──▶ ModelSpec ─┐
                                     ├─search─▶ Plan ──run──▶ train step (one XLA program)
    devices ──profile──▶ ClusterSpec │            │
                         + Profile ──┘            └──verify──▶ what the real compiler says

Names are loaded when first used (PEP 562), so that importing `galvatron_jax.search` does not import JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galvatron_jax.api import auto_shard as auto_shard
    from galvatron_jax.api import train_step as train_step
    from galvatron_jax.errors import GalvatronError as GalvatronError
    from galvatron_jax.errors import InfeasibleError as InfeasibleError
    from galvatron_jax.spec.cluster import ClusterSpec as ClusterSpec
    from galvatron_jax.spec.model import ModelSpec as ModelSpec
    from galvatron_jax.spec.plan import Plan as Plan
    from galvatron_jax.spec.profile import Profile as Profile
    from galvatron_jax.spec.strategy import LayerStrategy as LayerStrategy
    from galvatron_jax.trace.rules import register_rule as register_rule

__version__ = "0.1.0"

_HOMES = {
    "auto_shard": "galvatron_jax.api",
    "train_step": "galvatron_jax.api",
    "Plan": "galvatron_jax.spec.plan",
    "ClusterSpec": "galvatron_jax.spec.cluster",
    "ModelSpec": "galvatron_jax.spec.model",
    "Profile": "galvatron_jax.spec.profile",
    "LayerStrategy": "galvatron_jax.spec.strategy",
    "GalvatronError": "galvatron_jax.errors",
    "InfeasibleError": "galvatron_jax.errors",
    "register_rule": "galvatron_jax.trace.rules",
}
"""Where each public name is defined."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'galvatron_jax' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
