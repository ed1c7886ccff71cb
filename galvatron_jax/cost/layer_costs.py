"""Costs of one layer under many strategies at once: `CostModel.layer_cost` for every option of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from galvatron_jax.cost.compute import Work
from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.wiring import LayerWiring
from galvatron_jax.partition.counts import Amount, Counts
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.spec.strategy import LayerStrategy


@dataclass(frozen=True, eq=False)
class LayerCosts:
    """What a layer costs under several strategies, transitions to its neighbours excluded."""

    series: tuple[LayerSeries, ...]
    """Per strategy, the series of plans that the micro-batch belongs to."""
    forward_s: np.ndarray
    """Per micro-batch. float64[strategies]"""
    backward_s: np.ndarray
    """Per micro-batch. float64[strategies]"""
    once_s: np.ndarray
    """Per step. float64[strategies]"""
    static_bytes: np.ndarray
    """Parameters, optimizer state, gradients. int64[strategies]"""
    residual_bytes: np.ndarray
    """Per micro-batch in flight. int64[strategies]"""
    workspace_bytes: np.ndarray
    """int64[strategies]"""
    estimated: np.ndarray
    """Whether its computation time is scaled or derived, not measured. bool[strategies]"""


def layer_costs(
    costs: CostModel, wiring: LayerWiring, strategies: Sequence[LayerStrategy], batching: Batching
) -> LayerCosts:
    """Costs of a layer with the given connections under several strategies.

    Args:
        costs: prices on one mesh.
        wiring: the layer's connections.
        strategies: what to price.
        batching: how the batch is fed.
    """
    microbatch, kind = batching.microbatch, wiring.kind
    series = tuple([costs.table.series(kind, strategy, microbatch=microbatch) for strategy in strategies])
    phases = _Phases(costs, series, microbatch)
    times = costs.compute.layers(
        costs.model.kinds[kind],
        Work(phases.amounts(lambda counts: counts.flops), phases.amounts(lambda counts: counts.moved)),
        strategies=strategies,
        mesh=costs.table.sizes,
        microbatch=microbatch,
    )
    sent, workspace = phases.sent_and_peaks()
    exposed = sent - costs.overlap * np.minimum(sent, times.seconds)
    seconds = times.seconds + (exposed + _held_seconds(costs, wiring, series, batching))
    parameters = [costs.parameter_cost(wiring, each.parameters) for each in series]
    return LayerCosts(
        series=series,
        forward_s=seconds[:, 0],
        backward_s=seconds[:, 1],
        once_s=np.array([parameter.once_s for parameter in parameters]),
        static_bytes=np.array([parameter.memory.static_bytes for parameter in parameters], np.int64),
        residual_bytes=np.array([each.residual_bytes_at(microbatch) for each in series], np.int64),
        workspace_bytes=workspace,
        estimated=times.estimated,
    )


@dataclass(frozen=True, eq=False)
class _Phases:
    """Forward and backward of several plans."""

    costs: CostModel
    series: tuple[LayerSeries, ...]
    microbatch: int

    def amounts(self, of: Callable[[Counts], Amount]) -> np.ndarray:
        """Some amount of each phase. float64[plans, 2]."""
        both = np.array([(of(each.forward), of(each.backward)) for each in self.series])
        planned_at = np.array([each.planned_at for each in self.series])[:, None]
        return both[:, :, 0] + both[:, :, 1] * self.microbatch / planned_at

    def sent_and_peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the collectives of each phase, float64[plans, 2]; and the larger peak, int64[plans]."""
        sent, peaks = [], []
        known: dict[int, tuple[float, int]] = {}
        for each in self.series:
            found = []
            for counts in (each.forward, each.backward):
                # Plans that differ in what they store alone share a phase.
                if id(counts) not in known:
                    known[id(counts)] = self._sent_and_peak(counts, each.planned_at)
                found.append(known[id(counts)])
            sent.append((found[0][0], found[1][0]))
            peaks.append(max(found[0][1], found[1][1]))
        return np.array(sent), np.array(peaks, np.int64)

    def _sent_and_peak(self, counts: Counts, planned_at: int) -> tuple[float, int]:
        seconds = self.costs.sent_seconds(counts.sent, microbatch=self.microbatch, planned_at=planned_at)
        return seconds, counts.peak_bytes_at(self.microbatch, planned_at)


def _held_seconds(
    costs: CostModel, wiring: LayerWiring, series: Sequence[LayerSeries], batching: Batching
) -> np.ndarray:
    """Seconds of conversions between the plan-wide layout and each plan's own. float64[plans, 2]."""
    known: dict[tuple, tuple[float, float]] = {}
    found = []
    for each in series:
        layouts = each.inputs, each.outputs
        if layouts not in known:
            known[layouts] = costs.held_seconds(wiring, each, batching)
        found.append(known[layouts])
    return np.array(found)
