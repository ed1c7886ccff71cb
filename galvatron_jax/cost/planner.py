"""The planner as the cost model sees it, with a memo so that each (kind, strategy, micro-batch) is planned once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from galvatron_jax import partition
from galvatron_jax.cost.interpolation import plan_between
from galvatron_jax.partition.layer_plan import BoundarySpec, Collective, LayerPlan
from galvatron_jax.spec.model import LayerKind, ModelSpec
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.strategy import LayerStrategy


class Planner(Protocol):
    """What turns a strategy into layouts, collectives and sizes. `partition` is one; tests bring simpler ones."""

    def plan_layer(
        self, kind: LayerKind, strategy: LayerStrategy, *, mesh: dict[str, int], microbatch: int, model_microbatch: int
    ) -> LayerPlan:
        """Plans one layer kind under one strategy, for a global micro-batch of `microbatch` examples."""
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
    """Micro-batches that will be asked for: with these, plans may be interpolated (see `interpolation`)."""
    _plans: dict[tuple[int, LayerStrategy, int], LayerPlan] = field(default_factory=dict, repr=False)
    _planned: dict[tuple[int, LayerStrategy, int], LayerPlan] = field(default_factory=dict, repr=False)
    _moves: dict[tuple, tuple[Collective, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.sizes: dict[str, int] = {axis.name: axis.size for axis in self.mesh}

    @property
    def planned(self) -> int:
        """How often the planner was called."""
        return len(self._planned)

    def plan(self, kind: int, strategy: LayerStrategy, *, microbatch: int) -> LayerPlan:
        """The plan of `model.kinds[kind]` under a strategy; interpolated ones hold no instructions."""
        key = (kind, strategy, microbatch)
        if key not in self._plans:
            ways = math.prod(self.sizes[axis] for axis in strategy.dp)
            reachable = [size for size in self.microbatches if size % ways == 0]
            if microbatch in reachable:
                found = plan_between(lambda size: self._exact(kind, strategy, size), reachable, at=microbatch)
            else:
                found = self._exact(kind, strategy, microbatch)
            self._plans[key] = found
        return self._plans[key]

    def _exact(self, kind: int, strategy: LayerStrategy, microbatch: int) -> LayerPlan:
        key = (kind, strategy, microbatch)
        if key not in self._planned:
            self._planned[key] = self.planner.plan_layer(
                self.model.kinds[kind],
                strategy,
                mesh=self.sizes,
                microbatch=microbatch,
                model_microbatch=self.model.microbatch,
            )
        return self._planned[key]

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
