"""What planning a layer yields: collectives, FLOPs, bytes, residuals, layouts. Plain data, no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from galvatron_jax.spec.profile import CollectiveKind

BoundarySpec = tuple[tuple[str, ...], ...]
"""Per dim of a value that crosses layers, the mesh axes that split it, major to minor (a PartitionSpec)."""


@dataclass(frozen=True)
class Collective:
    """One collective operation of a device's local program."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    """Mesh axes of the group, major to minor."""
    group_size: int
    bytes: int
    """The full array the group holds together: all-reduce, the array; all-gather, its result; reduce-scatter, its
    operand; all-to-all, the local operand. As `CollectiveTiming.bytes`."""
    combine: str = "sum"
    dtype: str = "float32"


@dataclass(frozen=True)
class PhasePlan:
    """The forward or the backward program of a layer, for one micro-batch on one device."""

    instructions: tuple = field(repr=False)
    """Conversions and applications in order; see `partition.instructions`."""
    collectives: tuple[Collective, ...]
    flops: float
    """Local FLOPs of one device."""
    bytes: float
    """Local bytes read and written by operations that are not fused elementwise work: a roofline bound."""
    peak_bytes: int
    """Largest sum of live temporaries, inputs and residuals excluded."""
    operations: int
    """Operations applied."""
    through_peak_bytes: int = 0
    """For the backward of a layer that ends in the loss: the peak of its forward and backward, one after the other."""
    unscattered_bytes: int = 0
    """Of the backward: gradients of parameters that are spread over ZeRO's axes only while the next layer works, whole
    on each device; see `partition.scatters`."""


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter of a layer is stored, updated and synchronised."""

    port: int
    """Input port of the layer kind."""
    name: str
    storage: tuple[tuple[tuple[str, ...], ...], ...]
    """Per dim, per factor of the dim: mesh axes."""
    optimizer: tuple[tuple[tuple[str, ...], ...], ...]
    """The same for gradients handed to the optimizer, and for its state."""
    storage_bytes: int
    """Local bytes of the stored parameter."""
    optimizer_bytes: int
    """Local bytes of one array shaped like the parameter in the optimizer's layout."""
    accumulator_bytes: int
    """Local bytes of the gradient accumulated over micro-batches."""
    sync: tuple[Collective, ...]
    """Once per step, after the last micro-batch."""
    publish: tuple[Collective, ...]
    """Once per step, after the update: gathers of updated parameters (ZeRO 1 and 2)."""
    turned: bool = False
    """Whether ZeRO 3 gathers it along another dim than its first: XLA's GPU collectives want that dim first in memory,
    so that a copy in that order is made of the stored array."""


@dataclass(frozen=True)
class LayerPlan:
    """A layer kind under one strategy: what will run, and what it costs."""

    forward: PhasePlan
    backward: PhasePlan
    residual_bytes: int
    """What forward leaves for backward per micro-batch on one device, activation inputs of the layer included."""
    parameters: tuple[ParameterPlan, ...]
    inputs: tuple[BoundarySpec | None, ...]
    """Per input port: how the value arrives (None for parameters)."""
    outputs: tuple[BoundarySpec | None, ...]
    """Per output port: how the value leaves."""
    notes: tuple[str, ...] = ()
    kept_inputs: tuple[tuple[int, int], ...] = ()
    """The activation inputs among the residuals: input port and bytes. Layers that read one value keep it together."""

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Collectives of one micro-batch, forward and backward."""
        return self.forward.collectives + self.backward.collectives
