"""A layer over some logical axes at one micro-batch, before its passes are planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from galvatron_jax.partition.agreement import Agreement, Dear
from galvatron_jax.partition.counts import Counts
from galvatron_jax.partition.layer_plan import ParameterPlan
from galvatron_jax.partition.layout import Layout
from galvatron_jax.partition.parameters import Storage, StoredParameter
from galvatron_jax.partition.ports import Ports
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.partition.setting import Keep, Setting
from galvatron_jax.partition.static import StaticKind
from galvatron_jax.partition.strategy_axes import plan_axes
from galvatron_jax.spec.strategy import LayerStrategy


@dataclass(frozen=True, eq=False)
class Counted:
    """What both passes over a layer count for."""

    counts: tuple[Counts, Counts]
    """Of forward and of backward."""
    residual_bytes: tuple[int, int]
    """What stays, and what grows with the micro-batch."""
    kept_inputs: tuple[tuple[int, int, int], ...]
    """Of it, per input port, what stays and what grows."""
    gradient_layouts: tuple[Layout, ...]
    """In which gradients leave."""
    dear: Dear
    """What was chosen at a cost."""


class Occasion(NamedTuple):
    """At what, and for what, a layer is planned."""

    microbatch: int
    """Examples of one global micro-batch."""
    traced_at: int
    """Examples at which the kind was traced."""
    keep: Keep
    """What is wanted of what is planned."""
    gradient_sum_dtype: str | None
    """In which gradients are summed over devices; None for their own."""


class Placement:
    """A layer over some logical axes at one micro-batch: what strategies share that differ in ZeRO and remat alone."""

    def __init__(
        self, static: StaticKind, strategy: LayerStrategy, mesh: Mapping[str, int], occasion: Occasion
    ) -> None:
        """Nothing is planned yet.

        Args:
            static: the layer kind.
            strategy: its axes; ZeRO and remat do not matter.
            mesh: axes of the stage with their prime sizes, slowest link first.
            occasion: the micro-batch, and what else matters.
        """
        microbatch, traced_at, keep, self.gradient_sum_dtype = occasion
        self.static, self.kind, self.program, self.microbatch = static, static.kind, static.program, microbatch
        self.sizes = static.program.sizes(self.kind.batch_factor, microbatch, traced_at)
        self.axes = plan_axes(static, strategy, mesh, self.sizes)
        sum_dtypes = static.sum_dtypes(self.gradient_sum_dtype)
        self.storage = Storage(static, self.axes, self.sizes, sum_dtypes)
        growing = static.program.growing(self.kind.batch_factor, traced_at)
        self.setting = Setting(
            static.program, self.sizes, self.axes.axes, self.axes.allowed, growing=growing, keep=keep,
            outlines=static.memo.outlines, sum_dtypes=sum_dtypes,
        )  # fmt: skip
        self.ports = Ports(static, self.axes, self.sizes, strategy.sp_kind, self.storage)
        self.output_specs = self.ports.output_specs()
        self.agreement = Agreement(
            static, strategy, mesh, self.setting, self.ports, planned_at=microbatch, traced_at=traced_at
        )
        self.gradients = tuple((i, p, p.gradient) for i, p in enumerate(self.kind.inputs) if p.gradient is not None)
        self._parameters: dict[tuple, tuple[ParameterPlan, ...]] = {}

    def series(self, zero: int, counted: Counted, microbatches: tuple[int, ...]) -> LayerSeries:
        """The plan at a ZeRO stage with some passes, as it grows with the micro-batch."""
        return LayerSeries(
            microbatches=microbatches,
            planned_at=self.microbatch,
            forward=counted.counts[0],
            backward=counted.counts[1],
            residual_bytes=counted.residual_bytes,
            kept_inputs=counted.kept_inputs,
            parameters=self.parameters(zero, counted.gradient_layouts),
            inputs=self.ports.input_specs(sharded=zero == 3),
            outputs=self.output_specs,
            notes=self.kind.notes,
        )

    def stored(self, zero: int, gradient_layouts: tuple[Layout, ...]) -> dict[int, StoredParameter]:
        """Each parameter's way through a step."""
        accumulated = {i: layout for (i, _, _), layout in zip(self.gradients, gradient_layouts, strict=True)}
        return {i: self.storage.parameter(i, zero=zero, accumulated=accumulated.get(i)) for i in self.static.parameters}

    def parameters(self, zero: int, gradient_layouts: tuple[Layout, ...]) -> tuple[ParameterPlan, ...]:
        """The same as planned; one object for all remat policies that leave gradients alike."""
        key = zero, gradient_layouts
        if key not in self._parameters:
            stored = self.stored(zero, gradient_layouts)
            self._parameters[key] = tuple(parameter.plan for parameter in stored.values())
        return self._parameters[key]
