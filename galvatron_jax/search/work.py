"""What a step computes at least, before anything is planned: FLOPs at the rate of the roofline, and the bubble."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy

from galvatron_jax.cost.compute import Roofline
from galvatron_jax.cost.model import CostModel
from galvatron_jax.cost.pipeline import Pipelining
from galvatron_jax.cost.schedules import recomputes, tick_kinds
from galvatron_jax.search.bounds import mirrored
from galvatron_jax.search.space import SearchSpace
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import MeshAxis, Schedule
from galvatron_jax.spec.profile import Provenance
from galvatron_jax.spec.strategy import LayerStrategy

_ROUNDING = 1e-6
_DIGITS = 7
_SMALL = 16
"""Groups up to which every tick is looked at by itself; of more, a tick and its mirror image together, and where
chunks share a group only the work of the slowest."""


@dataclass(frozen=True)
class Work:
    """The least computation of a step with one number of groups and of micro-batches."""

    forward_s: float
    """Of a micro-batch, on the devices of one group."""
    backward_s: float
    count: int
    """Micro-batches."""

    def even_s(self, degree: int) -> float:
        """Seconds of a step whose stages are alike: about what a good plan takes."""
        return (self.forward_s + self.backward_s) / degree * (self.count + degree - 1)

    def undercuts(self, pipelining: Pipelining, upper_s: float) -> bool:
        """Whether the work alone leaves room for a step faster than `upper_s`."""
        both, degree, again = self.forward_s + self.backward_s, pipelining.degree, self._again(pipelining)
        if both * (1 + again) * (self.count + degree - 1) < upper_s * degree:
            return True  # Even stages do, and so do the best ones.
        # A micro-batch passes all stages, forward and backward; and a stage works on all micro-batches.
        least = both * max(1.0, self.count * _alike(again, degree)) * (1 - _ROUNDING)
        return least < upper_s and self.least_s(pipelining) < upper_s

    def least_s(self, pipelining: Pipelining) -> float:
        """Seconds of a step that no plan with this schedule undercuts."""
        share, degree = self._share, pipelining.degree
        least = _least_makespan(pipelining.schedule, degree, self.count, pipelining.num_chunks, share)
        return (self.forward_s + self.backward_s) * least * (1 - _ROUNDING)

    @property
    def _share(self) -> float:
        """Of forward in all work."""
        both = self.forward_s + self.backward_s
        return round(self.forward_s / both, _DIGITS) if both else 0.0

    def _again(self, pipelining: Pipelining) -> float:
        return self._share if pipelining.recomputes else 0.0


@dataclass(frozen=True)
class Computation:
    """What a model computes."""

    model: ModelSpec
    space: SearchSpace
    global_batch: int
    one_device_s: dict[int, tuple[float, float]]
    """Seconds of a whole step forward and backward on one device, per layer kind."""

    @classmethod
    def of(cls, costs: CostModel, space: SearchSpace, global_batch: int) -> Computation | None:
        """The computation; None where times are measured, and small shapes may be the fastest."""
        if costs.provenance != Provenance.DERIVED:
            return None
        model, roofline, found = costs.model, Roofline(costs.cluster.device), {}
        for index in {layer.kind for layer in model.layers}:
            kind, examples = model.kinds[index], model.microbatch
            plan = costs.table.planner.plan_layer(
                kind, LayerStrategy(), mesh={}, microbatch=examples, model_microbatch=examples
            )
            rate = roofline.peak(kind) * roofline.efficiency * examples / global_batch
            found[index] = plan.forward.flops / rate, plan.backward.flops / rate
        return cls(model, space, global_batch, found)

    def work(self, stage_axes: tuple[MeshAxis, ...], count: int) -> Work:
        """The work of one micro-batch of `count`, which may be too small to be shared out over all devices."""
        parts = {}
        for index, seconds in self.one_device_s.items():
            kind, microbatch = self.model.kinds[index], self.global_batch // count
            devices = self.space.most_devices(kind, mesh=stage_axes, microbatch=microbatch)
            parts[index] = [part / (devices * count) for part in seconds]
        forward, backward = (math.fsum(parts[layer.kind][part] for layer in self.model.layers) for part in range(2))
        return Work(forward, backward, count)


def _alike(again: float, degree: int) -> float:
    """Part of a micro-batch's second that every stage takes if all take alike.

    All but the last stage repeat the forward, which takes `again`.
    """
    return (1 + again) / (again + degree)


@lru_cache(maxsize=4096)
def _least_makespan(schedule: Schedule, degree: int, count: int, chunks: int, share: float) -> float:
    """Seconds of a step when a micro-batch takes one second, shared out over the stages as it is best.

    A linear program over the stages' parts; forward takes `share` of the second.
    """
    again = share if recomputes(schedule) else 0.0
    if schedule in (Schedule.ONE_F_ONE_B, Schedule.ONE_F_ONE_B_STASH) and count > 2 * degree:
        # Stages that take alike are the best: every tick and its mirror image can be charged to stages such that none
        # gains by a smaller part (the first forwards to the stage they have reached, the last to the one they leave).
        return (count + degree - 1) * _alike(again, degree)
    if chunks > 1 and degree > _SMALL:
        return count * _alike(again, degree)
    kinds = tick_kinds(schedule, num_stages=degree, num_microbatches=count, num_chunks=chunks)
    if chunks == 1 and degree > _SMALL:
        steady, pairs = mirrored(kinds, recomputes=recomputes(schedule))
        who = np.stack([np.ones(degree, bool), *(stages for stages, _ in pairs)])
        seconds = np.append(np.full(degree - 1, 1 + again), 1.0)
        return _least_sum(np.array([steady, *(ticks for _, ticks in pairs)]), who * seconds, degree)
    seconds = share * kinds.forward + (1 - share + again) * kinds.backward
    return _least_sum(kinds.count, seconds, degree)


def _least_sum(count: np.ndarray, seconds: np.ndarray, groups: int) -> float:
    """Least sum of ticks over parts of the stages that sum to one, a tick being what its slowest group takes.

    Args:
        count: ticks of each kind. float64[kinds]
        seconds: of a stage's whole part. float64[kinds, stages]
        groups: stage `k` lies on group `k % groups`.
    """
    ticks, stages = seconds.shape
    tick, stage = np.nonzero(seconds)
    place, row = np.unique(tick * groups + stage % groups, return_inverse=True)
    rows = scipy.sparse.csr_array(
        (
            np.concatenate([-np.ones(len(place)), seconds[tick, stage]]),
            (np.concatenate([np.arange(len(place)), row]), np.concatenate([place // groups, ticks + stage])),
        ),
        shape=(len(place), ticks + stages),
    )
    whole = np.concatenate([np.zeros(ticks), np.ones(stages)])[None]
    objective = np.concatenate([count, np.zeros(stages)])
    found = scipy.optimize.linprog(objective, A_ub=rows, b_ub=np.zeros(len(place)), A_eq=whole, b_eq=np.ones(1))
    return float(found.fun) if found.status == 0 else 0.0
