"""Stand-ins: what a layer that is not priced in full costs at least.

On the same axes no option is taken to be faster than the *plain* ones: ZeRO 0 or 1, nothing repeated. So a layer may be
priced plainly on all its axes first. What else there is on some axes has a stand-in, as fast as the fastest plain
option and with no more memory than the layer's parameters take when all devices share them. Plans then have lower
bounds that tell on which axes pricing the rest is worth the while: those are *opened*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from galvatron_jax.cost.memory import parameter_dtype
from galvatron_jax.cost.model import Batching, CostModel, ParameterCost
from galvatron_jax.cost.sizes import itemsize
from galvatron_jax.cost.wiring import LayerWiring
from galvatron_jax.partition.layer_plan import ParameterPlan
from galvatron_jax.search.space import Axes, Rule, SearchSpace, axes_of
from galvatron_jax.search.tables import COLUMNS, Slot, Table, TableBuilder
from galvatron_jax.spec.model import PortRole
from galvatron_jax.spec.profile import Provenance
from galvatron_jax.spec.strategy import LayerStrategy, Remat

_SURPRISE = 1e-3
"""Part of a layer's seconds by which an option is faster than the plain ones to count as such."""


def on_demand(space: SearchSpace, costs: Iterable[CostModel]) -> bool:
    """Whether axes are opened on demand: times are derived, and plain options are the first of those offered."""
    plain = space.remat[0] is Remat.NONE and (1 in space.zero or max(space.zero) == 0)
    derived = all(model.provenance == Provenance.DERIVED for model in costs)
    return space.applies(Rule.AXES_ON_DEMAND) and plain and derived


@dataclass
class OpenedTables(TableBuilder):
    """Prices layers in full on some axes, plainly on the others."""

    _opened: dict[int, set[Axes]] = field(default_factory=dict, repr=False)
    """Per layer kind."""
    _shared: dict[int, tuple[ParameterPlan, ...]] = field(default_factory=dict, repr=False)
    """Parameters that all devices share, per layer kind."""

    def open(self, kind: int, axes: Iterable[Axes]) -> None:
        """From now on prices every strategy of a layer kind on some axes; tables must be asked for again."""
        opened = self._opened.setdefault(kind, set())
        new = set(axes) - opened
        if new:
            opened |= new
            self.forget({kind})

    def candidates(self, kind: int, batching: Batching) -> tuple[LayerStrategy, ...]:
        """Strategies of a layer kind that are priced."""
        return tuple([each for each in super().candidates(kind, batching) if self._is_priced(kind, each)])

    def closed(self, kind: int, batching: Batching) -> dict[Axes, list[int]]:
        """Axes on which some strategies of a layer kind are not priced, with the options that are."""
        every = super().candidates(kind, batching)
        found = {axes_of(each): list[int]() for each in every if not self._is_priced(kind, each)}
        for index, each in enumerate(self.candidates(kind, batching) if found else ()):
            if axes_of(each) in found:
                found[axes_of(each)].append(index)
        return found

    def surprises(self, kind: int, strategies: Sequence[LayerStrategy], seconds: np.ndarray) -> bool:
        """Whether on some axes an option is faster than all plain ones: then stand-ins may be too slow elsewhere."""
        fastest: dict[Axes, list[float]] = {}
        for strategy, taken in zip(strategies, seconds.tolist(), strict=True):
            both = fastest.setdefault(axes_of(strategy), [math.inf, math.inf])
            plain = self._is_plain(kind, strategy)
            both[plain] = min(both[plain], taken)
        return any(other < plain * (1 - _SURPRISE) for other, plain in fastest.values())

    def unpriced(self) -> dict[tuple[int, int], int]:
        """Per layer kind and micro-batch asked about, how many strategies are not priced."""
        asked = self._strategies.items()
        return {key: sum([not self._is_priced(key[0], each) for each in every]) for key, every in asked}

    def _is_priced(self, kind: int, strategy: LayerStrategy) -> bool:
        return self._is_plain(kind, strategy) or axes_of(strategy) in self._opened.get(kind, ())

    def _is_plain(self, kind: int, strategy: LayerStrategy) -> bool:
        return strategy.remat is Remat.NONE and (strategy.zero <= 1 or kind in self._plain_at_all_stages)

    @cached_property
    def _plain_at_all_stages(self) -> frozenset[int]:
        """Layer kinds of which options at every ZeRO stage are plain.

        Joint layouts of tied parameters must not depend on what is open; and of tables, ZeRO 3 may send rows only,
        which ZeRO 0 would sum up whole.
        """
        costs = self.costs
        looking = [i for i, kind in enumerate(costs.model.kinds) if costs.table.planner.looks_up_parameters(kind)]
        return frozenset(looking).union([layer.kind for layer in costs.wiring.layers if layer.tied])

    def least(self, wiring: LayerWiring) -> ParameterCost:
        """What a layer's parameters cost at least: updated, and kept, by all devices together."""
        return self.costs.parameter_cost(wiring, self.shared(wiring.kind))

    def shared(self, kind: int) -> tuple[ParameterPlan, ...]:
        """A layer kind's parameters as if all devices shared them."""
        if kind not in self._shared:
            layer, ways = self.costs.model.kinds[kind], math.prod(self.costs.table.sizes.values())
            factors, found = layer.program.factors, []
            for index, port in enumerate(layer.inputs):
                if port.role is PortRole.PARAMETER:
                    dims = layer.program.values[port.value].dims
                    elements = math.prod([factors[factor].size for dim in dims for factor in dim])
                    size = elements * itemsize(parameter_dtype(layer, index)) // ways
                    found.append(ParameterPlan(index, port.name, (), (), size, size, size, (), ()))
            self._shared[kind] = tuple(found)
        return self._shared[kind]


@dataclass
class BoundingTables(OpenedTables):
    """Tables of pipelines with stand-ins: plans made of them bound the real ones, and are not real themselves."""

    _bounding: dict[tuple, Table] = field(default_factory=dict, repr=False)

    def table(self, slot: Slot, batching: Batching) -> Table:
        """A slot's options and stand-ins, none pruned but by the space's rules."""
        key = self.key(slot, batching)
        if key not in self._bounding:
            table, groups = super().table(slot, batching), self.closed(slot.wiring.kind, batching).values()
            if not groups:
                self._bounding[key] = table
            elif slot.wiring.kind in self._plain_at_all_stages:
                self._bounding[key] = self._as_stored(table, [option for options in groups for option in options])
            else:
                self._bounding[key] = self._shared_out(slot, table, list(groups))
        return self._bounding[key]

    def forget(self, kinds: set[int]) -> None:
        """Forgets what some layer kinds cost."""
        super().forget(kinds)
        for key in [key for key in self._bounding if key[0].wiring.kind in kinds]:
            del self._bounding[key]

    def _as_stored(self, table: Table, options: list[int]) -> Table:
        """With a stand-in for each of some options, whose parameters are kept as that option keeps them."""
        columns = {name: getattr(table, name)[options] for name in (*COLUMNS, "stored")}
        return _with(table, options, columns | {"residual_bytes": 0, "workspace_bytes": 0})

    def _shared_out(self, slot: Slot, table: Table, groups: list[list[int]]) -> Table:
        """With a stand-in for each group of options on the same axes, its parameters shared out over all devices.

        They are synchronised for nothing: others may do that while they work.
        """
        assert table.flat_bytes is not None, "not of a pipeline"
        least, flat = self.least(slot.wiring), self.flat_bytes(slot.wiring, self.shared(slot.wiring.kind))
        columns = {
            "forward_s": [table.forward_s[options].min() for options in groups],
            "backward_s": [table.backward_s[options].min() for options in groups],
            "once_s": least.once_s,
            "static_bytes": least.memory.static_bytes,
            "residual_bytes": 0,
            "workspace_bytes": least.memory.workspace_bytes,
            "stored": len(table.ties),
        }
        table = replace(
            table,
            ties=(*table.ties, {}),
            tied_bytes=(*table.tied_bytes, {}),
            flat_bytes=np.array([*table.flat_bytes, flat], np.int64),
        )
        return _with(table, [options[0] for options in groups], columns)


def _with(table: Table, like: list[int], columns: dict[str, Any]) -> Table:
    """A table with more options, whose strategies and boundaries are as those of some others."""
    more = {name: np.broadcast_to(column, len(like)) for name, column in columns.items()}
    more |= {"boundary": table.boundary[like]}
    longer: dict[str, Any] = {name: np.append(getattr(table, name), column) for name, column in more.items()}
    return replace(table, strategies=(*table.strategies, *[table.strategies[option] for option in like]), **longer)
