"""`Profile`: measured (or derived, and then so marked) times of layers and collectives."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from os import PathLike
from typing import Any

from pydantic import Field

from galvatron_jax.spec.document import Document, Record
from galvatron_jax.spec.strategy import Remat, SequenceParallel


class Provenance(StrEnum):
    """How the numbers of a profile came about."""

    MEASURED = "measured"
    DERIVED = "derived"
    """By a roofline from a `ClusterSpec` alone."""
    IMPORTED = "imported"


class Timing(Record):
    """A repeated measurement."""

    median_s: float
    spread_s: float = 0.0
    """Interquartile range."""
    samples: int = 1
    least_s: float | None = None
    """Of the quickest sample, a share of what it takes to call it included: a machine's other work only adds to it."""


class LocalShape(Record):
    """The shape at which one device sees a layer."""

    batch: int
    """Examples of one micro-batch on one device."""
    tp: int = 1
    sp: int = 1
    """Ulysses degree (Megatron's equals `tp`)."""
    sp_kind: SequenceParallel = SequenceParallel.NONE


class LayerTiming(Record):
    """Forward and backward of one layer kind at one local shape, collectives excluded."""

    kind: str
    """Fingerprint of the layer kind."""
    shape: LocalShape
    remat: Remat
    forward: Timing
    backward: Timing
    """Of the backward program alone, recomputation included."""


class CollectiveKind(StrEnum):
    """Collective operations, named as HLO names them."""

    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_TO_ALL = "all-to-all"
    PERMUTE = "collective-permute"


class CollectiveTiming(Record):
    """One collective at one message size."""

    kind: CollectiveKind
    axis_size: int
    """Devices in the group."""
    level: str
    """`intra` (group within a node) or `inter`."""
    bytes: int
    """Payload: the full array that the group holds together (all-reduce: the array itself; all-gather: its result;
    reduce-scatter: its operand; all-to-all: the local operand)."""
    timing: Timing


class Profile(Document):
    """Times of layers and collectives on one kind of cluster."""

    version: int = 1
    provenance: Provenance
    device: str
    """Device kind as JAX names it, or as the `ClusterSpec` does."""
    num_devices: int
    model_fingerprint: str
    layers: tuple[LayerTiming, ...]
    collectives: tuple[CollectiveTiming, ...]
    overlap: float = 0.0
    """Share of communication that hides behind computation, 0 to 1."""
    update_bytes_per_s: float | None = None
    """Optimizer update: parameter and state bytes touched per second."""
    software: dict[str, str] = Field(default_factory=dict)
    """Versions of jax, jaxlib, galvatron_jax and Python."""

    @classmethod
    def from_galvatron(
        cls,
        folder: str | PathLike[str],
        *,
        hardware: str | PathLike[str],
        model_fingerprint: str = "galvatron",
        kinds: Mapping[str, str] | None = None,
        **choices: Any,
    ) -> Profile:
        """Reads measurements that Hetu-Galvatron published: see `spec.galvatron.read_profile`, also for `choices`.

        Args:
            folder: Where its `computation_profiling_*.json` lies, or that file.
            hardware: Folder of its hardware files.
            model_fingerprint: Fingerprint of the `ModelSpec` that the profile is to serve.
            kinds: Fingerprints of layer kinds, by `layertype_0`, ..., `embedding` and `head`.
            choices: `sequence`, `num_nodes`, `devices_per_node`, `device`, where the files leave them open.

        Raises:
            DocumentError: naming every fault of a file.
            InputError: when `kinds` names something that was not measured.
        """
        from galvatron_jax.spec.galvatron.profile import read_profile  # it imports this module

        return read_profile(folder, hardware=hardware, model_fingerprint=model_fingerprint, kinds=kinds, **choices)
