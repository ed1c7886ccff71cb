"""What the compiler says of a plan, beside what was predicted of it: values, filled in by `api.verification`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.plan import Plan, Prediction
from galvatron_jax.verify.replay import Span


@dataclass(frozen=True)
class CompiledMemory:
    """Bytes on one device, as the compiler laid them out."""

    peak_bytes: int
    """The most that is in use at one time."""
    argument_bytes: int
    """State and batch."""
    output_bytes: int
    """New state and metrics."""
    alias_bytes: int
    """Of the output, what lies where the state was."""
    temporary_bytes: int
    """All else: gradients, residuals, workspace."""

    @classmethod
    def of(cls, compiled: Any) -> CompiledMemory:
        """Of a program that JAX compiled for a GPU."""
        found = compiled.memory_analysis()
        return cls(
            peak_bytes=found.peak_memory_in_bytes,
            argument_bytes=found.argument_size_in_bytes,
            output_bytes=found.output_size_in_bytes,
            alias_bytes=found.alias_size_in_bytes,
            temporary_bytes=found.temp_size_in_bytes,
        )


@dataclass(frozen=True)
class Volume:
    """Collectives of one kind over one group."""

    count: int
    """In a step of one device."""
    bytes: int
    """Of operands on one device, all of them together."""


@dataclass(frozen=True)
class CollectiveCheck:
    """Collectives of one kind over one group, as predicted and as compiled."""

    operation: str
    axes: tuple[str, ...]
    """Mesh axes of the group; `?` where it lies along none."""
    members: int
    predicted: Volume
    compiled: Volume
    """Fewer and larger ones where the compiler combined some."""

    @property
    def as_predicted(self) -> bool:
        """Whether as many bytes move."""
        return self.predicted.bytes == self.compiled.bytes


@dataclass(frozen=True)
class Verification:
    """A plan's step, compiled for devices that need not be here."""

    plan: Plan
    cluster: ClusterSpec
    prediction: Prediction
    """Made anew for the cluster."""
    memory: CompiledMemory
    budget_bytes: int
    collectives: tuple[CollectiveCheck, ...]
    replay: Span
    seconds: Mapping[str, float]
    """What verifying took: `trace`, `lower`, `compile`, `replay`."""

    @property
    def fits(self) -> bool:
        """Whether the compiler's peak is within the budget."""
        return self.memory.peak_bytes <= self.budget_bytes

    @property
    def memory_error(self) -> float:
        """Predicted over compiled peak, less one."""
        return self.prediction.peak_bytes / self.memory.peak_bytes - 1.0
