"""`LayerSeries`: a layer's plans at many micro-batches as one.

Under one strategy the planner takes the same decisions over a wide range of micro-batches, and then every figure of a
plan is affine in the micro-batch: activations grow with it, parameters do not. A choice compares costs in bytes, which
are affine as well, so what is cheapest at both ends of a range is cheapest between them.
"""

from __future__ import annotations

from dataclasses import dataclass

from galvatron_jax.partition.counts import Counts
from galvatron_jax.partition.layer_plan import BoundarySpec, LayerPlan, ParameterPlan, PhasePlan


@dataclass(frozen=True, eq=False)
class LayerSeries:
    """A layer kind under one strategy at micro-batches for which everything is decided alike."""

    microbatches: tuple[int, ...]
    """Where it holds, ascending."""
    planned_at: int
    """Micro-batch at which amounts that grow are given."""
    forward: Counts
    backward: Counts
    residual_bytes: tuple[int, int]
    """See `LayerPlan.residual_bytes`: what stays, and what grows."""
    parameters: tuple[ParameterPlan, ...]
    inputs: tuple[BoundarySpec | None, ...]
    outputs: tuple[BoundarySpec | None, ...]
    notes: tuple[str, ...] = ()
    kept_inputs: tuple[tuple[int, int, int], ...] = ()
    """See `LayerPlan.kept_inputs`: port, what stays, and what grows."""

    @classmethod
    def of(cls, plan: LayerPlan, microbatch: int) -> LayerSeries:
        """A single plan."""
        return cls(
            microbatches=(microbatch,),
            planned_at=microbatch,
            forward=_counts(plan.forward),
            backward=_counts(plan.backward),
            residual_bytes=(plan.residual_bytes, 0),
            parameters=plan.parameters,
            inputs=plan.inputs,
            outputs=plan.outputs,
            notes=plan.notes,
            kept_inputs=tuple((port, size, 0) for port, size in plan.kept_inputs),
        )

    def at(self, microbatch: int) -> LayerPlan:
        """The plan at one of the micro-batches, without instructions."""
        assert microbatch in self.microbatches, f"{microbatch} is not one of {self.microbatches}"
        return LayerPlan(
            forward=self.forward.at(microbatch, self.planned_at),
            backward=self.backward.at(microbatch, self.planned_at),
            residual_bytes=self.residual_bytes_at(microbatch),
            parameters=self.parameters,
            inputs=self.inputs,
            outputs=self.outputs,
            notes=self.notes,
            kept_inputs=tuple(
                (port, stays + grows * microbatch // self.planned_at) for port, stays, grows in self.kept_inputs
            ),
        )

    def shared_bytes_at(self, microbatch: int, ports: frozenset[int]) -> int:
        """Bytes at one of the micro-batches of what backward reads at some input ports."""
        return sum(
            stays + grows * microbatch // self.planned_at for port, stays, grows in self.kept_inputs if port in ports
        )

    def residual_bytes_at(self, microbatch: int) -> int:
        """Residuals at one of the micro-batches."""
        stays, grows = self.residual_bytes
        return stays + grows * microbatch // self.planned_at


def _counts(phase: PhasePlan) -> Counts:
    return Counts(
        sent=tuple((collective, False) for collective in phase.collectives),
        flops=(phase.flops, 0.0),
        moved=(phase.bytes, 0.0),
        peaks=((phase.peak_bytes, 0.0),),
        operations=phase.operations,
        through_peaks=((phase.through_peak_bytes, 0.0),) if phase.through_peak_bytes else (),
        unscattered_bytes=phase.unscattered_bytes,
    )
