"""Costs of one layer under many strategies at once: `CostModel.layer_cost` for every option of a search."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from galvatron_jax.cost.compute import Work
from galvatron_jax.cost.memory import passing, scatters_late
from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.wiring import LayerWiring
from galvatron_jax.partition.counts import Amount, Counts
from galvatron_jax.partition.layer_plan import ParameterPlan
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.spec.strategy import LayerStrategy


@dataclass(frozen=True, eq=False)
class PhaseCosts:
    """What a layer kind costs under several strategies, however the layer is connected."""

    series: tuple[LayerSeries, ...]
    """Per strategy, the series of plans that the micro-batch belongs to."""
    compute_s: np.ndarray
    """Forward and backward of one micro-batch. float64[strategies, 2]"""
    communication_s: np.ndarray
    """Not hidden by computation. float64[strategies, 2]"""
    residual_bytes: np.ndarray
    """Per micro-batch in flight. int64[strategies]"""
    workspace_bytes: np.ndarray
    """int64[strategies]"""
    unscattered_bytes: np.ndarray
    """See `PhasePlan.unscattered_bytes`. int64[strategies]"""
    estimated: np.ndarray
    """Whether its computation time is scaled or derived, not measured. bool[strategies]"""
    ports: tuple[LayerSeries, ...]
    """Of each set of layouts at the ports, one series."""
    ports_of: np.ndarray
    """Per strategy, the index in `ports`. int64[strategies]"""
    parameters: tuple[tuple[ParameterPlan, ...], ...]
    """Each way to keep the parameters."""
    parameters_of: np.ndarray
    """Per strategy, the index in `parameters`. int64[strategies]"""


@dataclass(frozen=True, eq=False)
class LayerCosts:
    """What a layer costs under several strategies, transitions to its neighbours excluded."""

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


def phase_costs(costs: CostModel, kind: int, strategies: Sequence[LayerStrategy], *, microbatch: int) -> PhaseCosts:
    """Costs of a layer kind under several strategies.

    Args:
        costs: prices on one mesh.
        kind: index of the layer kind.
        strategies: what to price.
        microbatch: examples of one micro-batch, over all devices.
    """
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
    residual = np.array([each.residual_bytes_at(microbatch) for each in series], np.int64)
    residual, workspace = _passing(costs, series, residual, workspace, microbatch)
    ports, ports_of = _distinct((id(each.inputs), id(each.outputs)) for each in series)
    parameters, parameters_of = _distinct(id(each.parameters) for each in series)
    return PhaseCosts(
        series=series,
        compute_s=times.seconds,
        communication_s=sent - costs.overlap * np.minimum(sent, times.seconds),
        residual_bytes=residual,
        workspace_bytes=workspace,
        unscattered_bytes=np.array([each.backward.unscattered_bytes for each in series], np.int64),
        estimated=times.estimated,
        ports=tuple([series[index] for index in ports]),
        ports_of=ports_of,
        parameters=tuple([series[index].parameters for index in parameters]),
        parameters_of=parameters_of,
    )


def _passing(
    costs: CostModel, series: Sequence[LayerSeries], residual: np.ndarray, workspace: np.ndarray, microbatch: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `memory.passing` does, for several strategies."""
    if not any(each.backward.through_peaks for each in series):
        return residual, workspace
    through = [each.backward.through_peak_bytes_at(microbatch, each.planned_at) for each in series]
    rows = zip(residual.tolist(), workspace.tolist(), through, strict=True)
    found = np.array([passing(*row, staged=costs.staged) for row in rows], np.int64)
    return found[:, 0], found[:, 1]


def layer_costs(costs: CostModel, wiring: LayerWiring, phases: PhaseCosts, batching: Batching) -> LayerCosts:
    """Costs of a layer with the given connections.

    Args:
        costs: prices on one mesh.
        wiring: the layer's connections.
        phases: costs of its kind, at the same micro-batch.
        batching: how the batch is fed.
    """
    held = np.array([costs.held_seconds(wiring, each, batching) for each in phases.ports])[phases.ports_of]
    seconds = phases.compute_s + (phases.communication_s + held)
    parameters = [costs.parameter_cost(wiring, each) for each in phases.parameters]
    if costs.adds_up(batching):
        seconds[:, 1] += np.array([each.accumulation_s for each in parameters])[phases.parameters_of]
    late = scatters_late(wiring, staged=costs.staged, accumulates=batching.num_microbatches > 1)
    return LayerCosts(
        forward_s=seconds[:, 0],
        backward_s=seconds[:, 1],
        once_s=np.array([each.once_s for each in parameters])[phases.parameters_of],
        static_bytes=np.array([each.memory.static_bytes for each in parameters], np.int64)[phases.parameters_of],
        residual_bytes=phases.residual_bytes - _shared(wiring, phases, batching),
        workspace_bytes=phases.workspace_bytes
        + (phases.unscattered_bytes if late else 0)
        + np.array([each.memory.workspace_bytes for each in parameters], np.int64)[phases.parameters_of],
    )


def _shared(wiring: LayerWiring, phases: PhaseCosts, batching: Batching) -> np.ndarray | int:
    """Bytes of inputs that wait for other layers too, and so are counted once for all, per strategy."""
    ports = wiring.held_ports
    if not ports:
        return 0
    return np.array([each.shared_bytes_at(batching.microbatch, ports) for each in phases.series], np.int64)


def _distinct(keys: Iterable[Hashable]) -> tuple[list[int], np.ndarray]:
    """Of equal keys the first one's index, and per key its place among these."""
    places: dict[Hashable, int] = {}
    first, place = [], []
    for index, key in enumerate(keys):
        if key not in places:
            places[key] = len(first)
            first.append(index)
        place.append(places[key])
    return first, np.array(place, np.int64)


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
