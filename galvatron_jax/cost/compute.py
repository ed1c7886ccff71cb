"""Seconds of a layer's computation at its local shape: measured where a profile has it, by roofline otherwise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from galvatron_jax.cost.lines import interpolate
from galvatron_jax.cost.planner import Planner
from galvatron_jax.partition.layer_plan import LayerPlan, PhasePlan
from galvatron_jax.spec.cluster import ClusterSpec, DeviceSpec
from galvatron_jax.spec.mesh import prime_factors
from galvatron_jax.spec.model import LayerKind, ModelSpec
from galvatron_jax.spec.profile import LayerTiming, LocalShape, Profile, Provenance
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel

PUBLISHED_EFFICIENCY = 0.5
"""Share of peak FLOP/s that tuned Transformer training reaches: 52 % on A100 (Narayanan et al., 2021, table 1),
46 % on TPU v4 (Chowdhery et al., 2022). Only roofline estimates use it."""


@dataclass(frozen=True)
class ComputeTime:
    """Seconds of one layer for one micro-batch on one device, collectives excluded."""

    forward_s: float
    backward_s: float
    estimated: bool
    """Whether no measurement at this shape (or between two) stands behind it."""


@dataclass(frozen=True, eq=False)
class Work:
    """What one device computes under several plans of a layer, forward and backward."""

    flops: np.ndarray
    """float64[plans, 2]"""
    bytes: np.ndarray
    """Read and written. float64[plans, 2]"""


@dataclass(frozen=True, eq=False)
class ComputeTimes:
    """`ComputeTime` of several plans."""

    seconds: np.ndarray
    """Forward and backward. float64[plans, 2]"""
    estimated: np.ndarray
    """bool[plans]"""


class Compute(Protocol):
    """Where computation times come from."""

    def layer(self, kind: LayerKind, plan: LayerPlan, *, strategy: LayerStrategy, shape: LocalShape) -> ComputeTime:
        """Time of a layer kind under a strategy, whose plan and local shape are given."""
        ...

    def layers(
        self, kind: LayerKind, work: Work, *, strategies: Sequence[LayerStrategy], mesh: dict[str, int], microbatch: int
    ) -> ComputeTimes:
        """The same under several strategies."""
        ...


def local_shape(strategy: LayerStrategy, *, mesh: dict[str, int], microbatch: int) -> LocalShape:
    """The shape at which one device sees a layer under a strategy."""
    return LocalShape(
        batch=microbatch // math.prod(mesh[axis] for axis in strategy.dp),
        tp=math.prod(mesh[axis] for axis in strategy.tp),
        sp=math.prod(mesh[axis] for axis in strategy.sp),
        sp_kind=strategy.sp_kind,
    )


def compute_dtype(kind: LayerKind) -> str:
    """The dtype in which a layer kind does most of its FLOPs."""
    program, flops = kind.program, defaultdict(float)
    for operation in program.operations:
        if operation.flops_per_point and operation.operands:
            points = math.prod(program.factors[rule.factor].size for rule in operation.factors)
            flops[program.values[operation.operands[0]].dtype] += operation.flops_per_point * points
    return max(flops, key=lambda dtype: flops[dtype], default="float32")


@dataclass(frozen=True)
class Roofline:
    """`max(FLOPs / (peak * efficiency), bytes / bandwidth)` per phase (Williams et al., "Roofline", 2009)."""

    device: DeviceSpec
    efficiency: float = PUBLISHED_EFFICIENCY
    _dtypes: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def layer(self, kind: LayerKind, plan: LayerPlan, *, strategy: LayerStrategy, shape: LocalShape) -> ComputeTime:
        """Time of a layer kind by its planned local FLOPs and bytes."""
        peak = self.peak(kind)
        return ComputeTime(self._phase(plan.forward, peak), self._phase(plan.backward, peak), estimated=True)

    def layers(
        self, kind: LayerKind, work: Work, *, strategies: Sequence[LayerStrategy], mesh: dict[str, int], microbatch: int
    ) -> ComputeTimes:
        """The same for several plans."""
        peak, bandwidth = self.peak(kind), self.device.memory_bandwidth_bytes_per_s
        seconds = np.maximum(work.flops / (peak * self.efficiency), work.bytes / bandwidth)
        return ComputeTimes(seconds, np.ones(len(seconds), bool))

    def peak(self, kind: LayerKind) -> float:
        """Peak FLOP/s for the kind's dtype; a dtype without a figure takes the device's lowest."""
        if kind.fingerprint not in self._dtypes:
            self._dtypes[kind.fingerprint] = compute_dtype(kind)
        figures = self.device.peak_flops_per_s
        return figures.get(self._dtypes[kind.fingerprint], min(figures.values()))

    def _phase(self, phase: PhasePlan, peak: float) -> float:
        return max(phase.flops / (peak * self.efficiency), phase.bytes / self.device.memory_bandwidth_bytes_per_s)


@dataclass(frozen=True)
class ProfiledCompute:
    """Measured times, piecewise linear in the local batch.

    A combination of degrees and remat that was not measured is scaled from the nearest one by the ratio of their
    rooflines, and flagged as estimated. So is one that was measured at another batch, but where the same degrees
    without remat were measured around both: what is repeated grows with the batch as what is done once.
    """

    profile: Profile
    roofline: Roofline
    planner: Planner
    model_microbatch: int
    _tables: dict = field(init=False, repr=False, compare=False, default_factory=dict)
    _references: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        tables: dict[str, dict[tuple, list[LayerTiming]]] = defaultdict(lambda: defaultdict(list))
        for timing in self.profile.layers:
            tables[timing.kind][_combination(timing.shape, timing.remat)].append(timing)
        for kind, combinations in tables.items():
            self._tables[kind] = {key: _curves(timings) for key, timings in combinations.items()}

    def layer(self, kind: LayerKind, plan: LayerPlan, *, strategy: LayerStrategy, shape: LocalShape) -> ComputeTime:
        """Time of a layer kind at a local shape."""
        bound = self.roofline.layer(kind, plan, strategy=strategy, shape=shape)
        return self._time(kind, bound, _combination(shape, strategy.remat), shape.batch)

    def layers(
        self, kind: LayerKind, work: Work, *, strategies: Sequence[LayerStrategy], mesh: dict[str, int], microbatch: int
    ) -> ComputeTimes:
        """The same for several plans."""
        bounds = self.roofline.layers(kind, work, strategies=strategies, mesh=mesh, microbatch=microbatch)
        times = []
        for strategy, seconds in zip(strategies, bounds.seconds.tolist(), strict=True):
            shape = local_shape(strategy, mesh=mesh, microbatch=microbatch)
            bound = ComputeTime(*seconds, estimated=True)
            times.append(self._time(kind, bound, _combination(shape, strategy.remat), shape.batch))
        seconds = np.array([(time.forward_s, time.backward_s) for time in times])
        return ComputeTimes(seconds, np.array([time.estimated for time in times]))

    def _time(self, kind: LayerKind, bound: ComputeTime, wanted: tuple, batch: int) -> ComputeTime:
        """Time of a combination of degrees and remat at a local batch, whose roofline is `bound`."""
        combinations = self._tables.get(kind.fingerprint)
        if not combinations:
            return bound
        key = wanted if wanted in combinations else min(combinations, key=lambda have: _distance(have, wanted))
        batches, forward, backward = combinations[key]
        if key == wanted and batches[0] <= batch <= batches[-1]:
            seconds = interpolate(batches, forward, batch), interpolate(batches, backward, batch)
            return ComputeTime(*seconds, estimated=False)
        nearest = int(min(batches, key=lambda measured: abs(math.log(measured / batch))))
        index = int(np.searchsorted(batches, nearest))
        plain = combinations.get((*wanted[:3], Remat.NONE))
        if (
            key == wanted
            and plain is not None
            and all(plain[0][0] <= size <= plain[0][-1] for size in (batch, nearest))
        ):
            here, there = ([interpolate(plain[0], y, size) for y in plain[1:]] for size in (batch, nearest))
            measured = zip((forward[index], backward[index]), here, there, strict=True)
            return ComputeTime(*(_scaled(*figures) for figures in measured), estimated=True)
        reference = self._reference(kind, key, nearest)
        return ComputeTime(
            _scaled(forward[index], bound.forward_s, reference.forward_s),
            _scaled(backward[index], bound.backward_s, reference.backward_s),
            estimated=True,
        )

    def _reference(self, kind: LayerKind, combination: tuple, batch: int) -> ComputeTime:
        """Roofline of a measured shape: planned on a mesh that holds only its tp and sp axes."""
        key = (kind.fingerprint, combination, batch)
        if key not in self._references:
            tp, sp, sp_kind, remat = combination
            tp_axes = {f"t{index}": size for index, size in enumerate(prime_factors(tp))}
            sp_axes = {f"s{index}": size for index, size in enumerate(prime_factors(sp))}
            if sp_kind is not SequenceParallel.ULYSSES:
                sp_axes = tp_axes if sp_kind is SequenceParallel.MEGATRON else {}
            strategy = LayerStrategy(tp=tuple(tp_axes), sp=tuple(sp_axes), sp_kind=sp_kind, remat=remat)
            plan = self.planner.plan_layer(
                kind, strategy, mesh=sp_axes | tp_axes, microbatch=batch, model_microbatch=self.model_microbatch
            )
            shape = LocalShape(batch=batch, tp=tp, sp=sp, sp_kind=sp_kind)
            self._references[key] = self.roofline.layer(kind, plan, strategy=strategy, shape=shape)
        return self._references[key]


def compute_for(profile: Profile | None, *, cluster: ClusterSpec, planner: Planner, model: ModelSpec) -> Compute:
    """Measured computation where a profile has it, the cluster's roofline otherwise."""
    roofline = Roofline(cluster.device)
    if profile is None or profile.provenance is Provenance.DERIVED:
        return roofline
    return ProfiledCompute(profile, roofline, planner, model.microbatch)


def _combination(shape: LocalShape, remat: Remat) -> tuple[int, int, SequenceParallel, Remat]:
    return shape.tp, shape.sp, shape.sp_kind, remat


def _curves(timings: list[LayerTiming]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending batches with forward and backward seconds; of equal shapes the last measurement counts."""
    by_batch = {timing.shape.batch: timing for timing in timings}
    batches = sorted(by_batch)
    return (
        np.array(batches, float),
        np.array([by_batch[batch].forward.median_s for batch in batches]),
        np.array([by_batch[batch].backward.median_s for batch in batches]),
    )


def _distance(have: tuple, wanted: tuple) -> tuple:
    """How unlike two combinations are: in what backward repeats, in the kind of sp, in degrees."""
    remats = list(Remat)
    repeats = abs(remats.index(have[3]) - remats.index(wanted[3]))
    shards = abs(math.log(have[0] * max(1, have[1]) / (wanted[0] * max(1, wanted[1]))))
    return repeats, have[2] is not wanted[2], shards, remats.index(have[3]), have[:3]


def _scaled(measured: float, bound: float, reference: float) -> float:
    return float(measured * bound / reference) if reference > 0 else float(max(measured, bound))
