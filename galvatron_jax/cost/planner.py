"""The planner as the cost model sees it, with a memo so that each (kind, strategy, micro-batch) is planned once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from galvatron_jax import partition
from galvatron_jax.partition.layer_plan import BoundarySpec, Collective, LayerPlan
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.spec.model import LayerKind, ModelSpec
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.strategy import LayerStrategy, Remat


class Planner(Protocol):
    """What turns a strategy into layouts, collectives and sizes. `partition` is one; tests bring simpler ones."""

    def plan_layer(
        self, kind: LayerKind, strategy: LayerStrategy, *, mesh: dict[str, int], microbatch: int, model_microbatch: int
    ) -> LayerPlan:
        """Plans one layer kind under one strategy, for a global micro-batch of `microbatch` examples."""
        ...

    def plan_series(
        self,
        kind: LayerKind,
        strategy: LayerStrategy,
        *,
        mesh: dict[str, int],
        microbatches: tuple[int, ...],
        model_microbatch: int,
    ) -> tuple[LayerSeries, ...]:
        """The same for several global micro-batches, ascending, without instructions."""
        ...

    def distinct_remats(self, kind: LayerKind, policies: tuple[Remat, ...]) -> tuple[Remat, ...]:
        """Of some policies, those that differ in what a layer keeps and repeats; of equal ones the first."""
        ...

    def looks_up_parameters(self, kind: LayerKind) -> bool:
        """Whether a layer looks up rows of a parameter, as embeddings do."""
        ...

    def boundary_collectives(
        self, dims: tuple[int, ...], dtype: str, source: BoundarySpec, target: BoundarySpec, *, mesh: Mapping[str, int]
    ) -> tuple[Collective, ...]:
        """The collectives that turn one layout of an array with global shape `dims` into another."""
        ...


def default_planner() -> Planner:
    """The partitioner itself."""
    return partition


@dataclass
class PlanTable:
    """Plans of one model on one mesh, each computed when first asked for."""

    model: ModelSpec
    mesh: tuple[MeshAxis, ...]
    planner: Planner
    microbatches: tuple[int, ...] = ()
    """Micro-batches that will be asked for, ascending: with these, layers are planned for many of them at once."""
    gradient_sum_dtype: str | None = None
    """See `Plan.gradient_sum_dtype`."""
    _plans: dict[tuple[int, LayerStrategy, int], LayerPlan] = field(default_factory=dict, repr=False)
    _series: dict[tuple[int, LayerStrategy, int], LayerSeries] = field(default_factory=dict, repr=False)
    _moves: dict[tuple, tuple[Collective, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.sizes: dict[str, int] = {axis.name: axis.size for axis in self.mesh}
        dtype = self.gradient_sum_dtype
        self._sums: dict[str, Any] = {} if dtype is None else {"gradient_sum_dtype": dtype}
        """For the partitioner: simpler planners know gradients of one type alone."""
        self.planned: int = 0
        """Plans and series made."""

    def exact(self) -> PlanTable:
        """A new one in which each layer is planned alone."""
        return replace(self, microbatches=(), _plans={}, _series={}, _moves={})

    def plan(self, kind: int, strategy: LayerStrategy, *, microbatch: int) -> LayerPlan:
        """The plan of `model.kinds[kind]` under a strategy; it may come without instructions."""
        key = (kind, strategy, microbatch)
        if key not in self._plans:
            reachable = self._reachable(strategy)
            self._plans[key] = (
                self.series(kind, strategy, microbatch=microbatch).at(microbatch)
                if microbatch in reachable
                else self._plan(kind, strategy, microbatch)
            )
        return self._plans[key]

    def series(self, kind: int, strategy: LayerStrategy, *, microbatch: int) -> LayerSeries:
        """The series of plans that a micro-batch belongs to; of that one alone if it was not announced."""
        key = (kind, strategy, microbatch)
        if key not in self._series:
            reachable = self._reachable(strategy)
            if microbatch in reachable:
                for found in self._plan_series(kind, strategy, reachable):
                    self._series.update(dict.fromkeys([(kind, strategy, each) for each in found.microbatches], found))
            else:
                self._series[key] = LayerSeries.of(self.plan(kind, strategy, microbatch=microbatch), microbatch)
        return self._series[key]

    def _reachable(self, strategy: LayerStrategy) -> tuple[int, ...]:
        """Announced micro-batches that the data axes divide."""
        ways = math.prod([self.sizes[axis] for axis in strategy.dp])
        return tuple([size for size in self.microbatches if size % ways == 0])

    def _plan(self, kind: int, strategy: LayerStrategy, microbatch: int) -> LayerPlan:
        self.planned += 1
        return self.planner.plan_layer(
            self.model.kinds[kind],
            strategy,
            mesh=self.sizes,
            microbatch=microbatch,
            model_microbatch=self.model.microbatch,
            **self._sums,
        )

    def _plan_series(
        self, kind: int, strategy: LayerStrategy, microbatches: tuple[int, ...]
    ) -> tuple[LayerSeries, ...]:
        found = self.planner.plan_series(
            self.model.kinds[kind],
            strategy,
            mesh=self.sizes,
            microbatches=microbatches,
            model_microbatch=self.model.microbatch,
            **self._sums,
        )
        self.planned += len(found)
        return found

    def move(
        self, dims: tuple[int, ...], dtype: str, *, source: BoundarySpec, target: BoundarySpec
    ) -> tuple[Collective, ...]:
        """The collectives of a layout change; none when the layouts are equal."""
        if source == target:
            return ()
        key = (dims, dtype, source, target)
        if key not in self._moves:
            self._moves[key] = self.planner.boundary_collectives(dims, dtype, source, target, mesh=self.sizes)
        return self._moves[key]
