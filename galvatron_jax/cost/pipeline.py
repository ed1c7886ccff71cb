"""Seconds and bytes of pipeline stages, and the prediction of a plan that has several.

Stages meet at cuts: what crosses one waits in the plan-wide layout, is sent on after each forward, and stays in the
receiving stage until its backward. All stages send at once, after the slowest of a tick has ended. What a stage stashes
is copied into a slot and out of it again. A step takes the makespan of the schedule's table, and then what the slowest
group of devices does once a step: gradient synchronisation (parameters that stages share included) and update.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Protocol

import numpy as np

from galvatron_jax.cost.memory import Flat, LayerMemory, parameter_dtype, stored_bytes
from galvatron_jax.cost.model import Batching, CostModel, LayerCost
from galvatron_jax.cost.schedules import in_flight, makespan, recomputes, tick_kinds
from galvatron_jax.cost.sizes import batch_spec, itemsize, local_bytes, value_dims
from galvatron_jax.cost.wiring import LayerWiring
from galvatron_jax.partition.layer_plan import Collective
from galvatron_jax.spec.plan import MemoryBreakdown, MeshAxis, Prediction, Schedule, StageTime, TimeBreakdown
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.spec.program import sum_dtype
from galvatron_jax.spec.strategy import LayerStrategy


@dataclass(frozen=True)
class Pipelining:
    """How stages lie on groups of devices and take turns."""

    schedule: Schedule
    axes: tuple[MeshAxis, ...]
    """Mesh axes along which the groups lie, slowest link first."""
    num_chunks: int = 1
    """Virtual stages on each group."""

    @property
    def degree(self) -> int:
        """Groups of devices."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def num_stages(self) -> int:
        """Virtual stages."""
        return self.degree * self.num_chunks

    @property
    def recomputes(self) -> bool:
        """Whether backward begins with the forward of its stage."""
        return recomputes(self.schedule)

    def in_flight(self, num_microbatches: int) -> tuple[int, ...]:
        """Per virtual stage, micro-batches whose input it holds at once."""
        return in_flight(
            self.schedule, num_stages=self.degree, num_microbatches=num_microbatches, num_chunks=self.num_chunks
        )


def residuals_kept(in_flight: int, *, recomputes: bool) -> int:
    """Micro-batches whose residuals a stage holds at once.

    Where they wait in a pool of slots, the one whose forward or backward runs is there once more, outside of the pool:
    its arrays are made before they are put into their slot, and taken out of it before they are read.

    Args:
        in_flight: slots of the pool.
        recomputes: whether residuals are made anew in backward, so that there are no slots for them.
    """
    return 1 if recomputes else in_flight + 1


@dataclass(frozen=True)
class CutCost:
    """What lies between two stages, per micro-batch and device."""

    bytes: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0


class Sends(Protocol):
    """Seconds to send a micro-batch's values over a cut, and their gradients back."""

    @property
    def forward_s(self) -> float:
        """There."""
        ...

    @property
    def backward_s(self) -> float:
        """Back."""
        ...


def passing_seconds(cuts: Sequence[Sends], *, recomputes: bool) -> np.ndarray:
    """Seconds that a stage's forward and backward of a micro-batch take for what then moves between stages.

    All groups of devices exchange values together, so each waits for both ways: a first stage hands nothing back, and a
    last one nothing on, but the others do.

    Args:
        cuts: per layer, in front of it; the first is empty.
        recomputes: whether the last stage has no forward of its own, so that all is its backward's.

    Returns:
        float64[2, layers + 1, layers + 1], by way, a stage's first layer and the layer after its last; zeros where one
        stage has all layers.
    """
    last = len(cuts)
    there, back = (np.array([*own, 0.0]) for own in zip(*((c.forward_s, c.backward_s) for c in cuts), strict=True))
    found = np.zeros((2, last + 1, last + 1))
    found[0], found[1] = there, back[:, None]
    found[0, :, last], found[1, 0] = there, back
    if recomputes:
        found[1, :, last] += found[0, :, last]
        found[0, :, last] = 0.0
    return found


@dataclass(frozen=True)
class HeldValue:
    """A value with several readers, made in one layer and last read in another."""

    producer: int
    last: int
    bytes: int
    """Of one micro-batch on one device."""
    differentiable: bool


def held_values(costs: CostModel, batching: Batching) -> tuple[HeldValue, ...]:
    """The model's values that are held in the plan-wide layout."""
    layers, found = costs.model.layers, []
    for producer, wiring in enumerate(costs.wiring.layers):
        for write in wiring.writes:
            if not write.batched:
                continue
            reference = layers[producer].outputs[write.port]
            last = max(index for index, layer in enumerate(layers) if reference in layer.inputs)
            size = _bytes(costs, wiring.kind, write.port, batching)
            found.append(HeldValue(producer, last, size, write.differentiable))
    return tuple(found)


def cut_costs(costs: CostModel, pipelining: Pipelining, batching: Batching) -> tuple[CutCost, ...]:
    """Per layer, the cost of a cut in front of it; none before the first."""
    held, found = held_values(costs, batching), [CutCost()]
    # Most layers hand on the same.
    sent = cache(lambda kind, port: _bytes(costs, kind, port, batching))
    seconds = cache(lambda size: _send_seconds(costs, pipelining, size))
    for index, wiring in enumerate(costs.wiring.layers[1:], start=1):
        before = costs.wiring.layers[index - 1].kind
        sizes = [(sent(before, hop.output), hop.differentiable) for hop in wiring.hops]
        sizes += [(h.bytes, h.differentiable) for h in held if h.producer < index <= h.last]
        there, back = sum(size for size, _ in sizes), sum(size for size, flows in sizes if flows)
        found.append(CutCost(there, seconds(there), seconds(back)))
    return tuple(found)


def _bytes(costs: CostModel, kind: int, port: int, batching: Batching) -> int:
    """Local bytes of an output, for one micro-batch in the plan-wide layout."""
    layer_kind = costs.model.kinds[kind]
    value = layer_kind.outputs[port].value
    dims = value_dims(layer_kind, value, microbatch=batching.microbatch, model_microbatch=costs.model.microbatch)
    spec = batch_spec(layer_kind, value, batching.axes)
    return local_bytes(dims, layer_kind.program.values[value].dtype, spec, costs.table.sizes)


def _send_seconds(costs: CostModel, pipelining: Pipelining, size: int) -> float:
    return _between_groups(costs, pipelining, CollectiveKind.PERMUTE, size)


def exchange_seconds(costs: CostModel, pipelining: Pipelining, name: str, gradient_bytes: int, *, user: int) -> float:
    """Seconds per step to add up, over all groups of devices, the gradient of a parameter that several stages hold.

    Args:
        costs: prices on the stages' mesh.
        pipelining: the groups.
        name: of the parameter.
        gradient_bytes: of its gradient in its own type, on one device.
        user: a layer that uses it.
    """
    wiring = costs.wiring.layers[user]
    own = parameter_dtype(costs.model.kinds[wiring.kind], dict(wiring.tied)[name])
    size = gradient_bytes // itemsize(own) * itemsize(sum_dtype(own, costs.table.gradient_sum_dtype))
    return _between_groups(costs, pipelining, CollectiveKind.ALL_REDUCE, size)


def _between_groups(costs: CostModel, pipelining: Pipelining, op: CollectiveKind, size: int) -> float:
    if not size:
        return 0.0
    axes = tuple(axis.name for axis in pipelining.axes)
    return costs.links.seconds(Collective(op, axes, pipelining.degree, size))


def stage_wirings(wiring: LayerWiring) -> tuple[LayerWiring, LayerWiring | None]:
    """A layer as the first of its stage to use its parameters; and, where it shares some, as a later one."""
    shared = {port for _, port in wiring.tied}
    owned = tuple(sorted(set(wiring.owned) | shared))
    repeat = tuple(port for port in wiring.owned if port not in shared)
    return replace(wiring, owned=owned), replace(wiring, owned=repeat) if shared else None


def tied_users(costs: CostModel) -> dict[str, tuple[int, ...]]:
    """Layers that use each tied parameter."""
    layers = costs.wiring.layers
    return {
        name: tuple(index for index, layer in enumerate(layers) if any(name == tied for tied, _ in layer.tied))
        for name in costs.wiring.tied
    }


def predict_pipeline(
    costs: CostModel,
    pipelining: Pipelining,
    starts: Sequence[int],
    strategies: Sequence[LayerStrategy],
    batching: Batching,
    *,
    memory_bytes: int | None,
) -> Prediction:
    """Time and memory of stages with one strategy per layer.

    Args:
        costs: prices on the stages' mesh.
        pipelining: schedule and groups.
        starts: first layer of each virtual stage.
        strategies: one per layer.
        batching: how the batch is fed.
        memory_bytes: budget to note.
    """
    priced = _Priced(costs, pipelining, tuple(strategies), batching)
    stops = (*starts[1:], len(strategies))
    stages = [priced.stage(number, *ends) for number, ends in enumerate(zip(starts, stops, strict=True))]
    count, degree = batching.num_microbatches, pipelining.degree
    kinds = tick_kinds(pipelining.schedule, num_stages=degree, num_microbatches=count, num_chunks=pipelining.num_chunks)
    ticks = float(makespan(kinds, [s.forward_s for s in stages], [s.backward_s for s in stages]))
    groups = [stages[group::degree] for group in range(degree)]
    step = ticks + max(sum(stage.once_s for stage in group) for group in groups)
    return Prediction(
        time=_breakdown(step, stages, count, degree),
        memory=_memory(costs, groups, batching),
        stages=tuple(StageTime(forward_s=s.forward_s, backward_s=s.backward_s, once_s=s.once_s) for s in stages),
        memory_budget_bytes=memory_bytes,
        provenance=costs.provenance,
    )


@dataclass(frozen=True)
class _Stage:
    """One virtual stage, summed up."""

    forward_s: float
    backward_s: float
    compute_s: float
    """Per micro-batch, both ways, recomputation included."""
    synchronisation_s: float
    update_s: float
    memory: tuple[LayerMemory, ...]
    state: Counter[Flat]
    """See `memory.stored_bytes`."""
    gradients: Counter[str]
    pooled_bytes: int
    """In slots: stage inputs in flight, residuals in flight."""
    outside_bytes: int
    """Residuals outside of the slots, or held values."""
    recomputed_bytes: int
    """Residuals of the micro-batch whose backward runs."""

    @property
    def once_s(self) -> float:
        """Per step."""
        return self.synchronisation_s + self.update_s


@dataclass(frozen=True)
class _Priced:
    costs: CostModel
    pipelining: Pipelining
    strategies: tuple[LayerStrategy, ...]
    batching: Batching

    @cached_property
    def cuts(self) -> tuple[CutCost, ...]:
        return cut_costs(self.costs, self.pipelining, self.batching)

    @cached_property
    def passing(self) -> np.ndarray:
        return passing_seconds(self.cuts, recomputes=self.pipelining.recomputes)

    @cached_property
    def held(self) -> tuple[HeldValue, ...]:
        return held_values(self.costs, self.batching)

    def stage(self, number: int, start: int, stop: int) -> _Stage:
        pipelining, cuts = self.pipelining, self.cuts
        layers = [self._layer(index, start) for index in range(start, stop)]
        forward = sum(layer.forward.seconds for layer in layers)
        backward = sum(layer.backward.seconds for layer in layers)
        for there, back in self._moves(start, stop):
            forward, backward = forward + there, backward + back
        residual = sum(layer.memory.residual_bytes for layer in layers)
        recomputed, last = forward, stop == len(self.strategies)
        compute = sum(layer.compute_s for layer in layers)
        if not last:
            there, back = self._edge(stop, leaving=True)
            forward, backward = forward + there, backward + back
        if pipelining.recomputes:
            backward += recomputed
            compute += 0.0 if last else sum(layer.forward.compute_s for layer in layers)
            forward = 0.0 if last else forward
        else:
            stashed = self.costs.copy_seconds(residual)
            forward, backward, compute = forward + stashed, backward + stashed, compute + 2 * stashed
        there, back = self.passing[:, start, stop].tolist()
        forward, backward = forward + there, backward + back
        flying = pipelining.in_flight(self.batching.num_microbatches)[number]
        pooled = flying * cuts[start].bytes if start else 0
        made = sum(held.bytes for held in self.held if start <= held.producer < stop)
        again = residual if pipelining.recomputes else 0
        held = residuals_kept(flying, recomputes=pipelining.recomputes)
        outside = made if pipelining.recomputes else residual + made
        state, gradients = self._stored(start, stop)
        return _Stage(
            forward,
            backward,
            compute,
            sum(layer.synchronisation_s for layer in layers) + self._exchanges(start, stop),
            sum(layer.update_s for layer in layers),
            tuple(layer.memory for layer in layers),
            state,
            gradients,
            pooled + (held - 1) * outside,
            outside,
            again,
        )

    def _stored(self, start: int, stop: int) -> tuple[Counter[Flat], Counter[str]]:
        """What its flat arrays hold."""
        costs = self.costs
        state: Counter[Flat] = Counter()
        gradients: Counter[str] = Counter()
        for index in range(start, stop):
            wiring, kind = self._wiring(index, start), costs.model.kinds[costs.wiring.layers[index].kind]
            parameters = costs.plan(index, self.strategies[index], self.batching).parameters
            own = stored_bytes(kind, parameters, owned=wiring.owned, optimizer=costs.optimizer)
            state.update(own[0])
            gradients.update(own[1])
        return state, gradients

    def _layer(self, index: int, start: int) -> LayerCost:
        return self.costs.layer_cost(self._wiring(index, start), self.strategies[index], self.batching)

    def _wiring(self, index: int, start: int) -> LayerWiring:
        first, repeat = stage_wirings(self.costs.wiring.layers[index])
        earlier = any(
            index in users and any(start <= user < index for user in users) for users in tied_users(self.costs).values()
        )
        return repeat if earlier and repeat is not None else first

    def _moves(self, start: int, stop: int) -> list[tuple[float, float]]:
        costs = self.costs
        found = [self._edge(start, leaving=False)] if start else []
        for index in range(start + 1, stop):
            found.append(
                costs.transition_seconds(
                    costs.wiring.layers[index - 1].kind,
                    costs.wiring.layers[index],
                    costs.plan(index - 1, self.strategies[index - 1], self.batching),
                    costs.plan(index, self.strategies[index], self.batching),
                    microbatch=self.batching.microbatch,
                )
            )
        return found

    def _edge(self, cut: int, *, leaving: bool) -> tuple[float, float]:
        layer = cut - 1 if leaving else cut
        plan = self.costs.plan(layer, self.strategies[layer], self.batching)
        layers = self.costs.wiring.layers
        return self.costs.cut_seconds(layers[cut - 1].kind, layers[cut], plan, self.batching, leaving=leaving)

    def _exchanges(self, start: int, stop: int) -> float:
        total = 0.0
        for name, users in tied_users(self.costs).items():
            inside = [user for user in users if start <= user < stop]
            if inside and len(inside) < len(users):
                wiring = self.costs.wiring.layers[users[0]]
                plan = self.costs.plan(users[0], self.strategies[users[0]], self.batching)
                port = dict(wiring.tied)[name]
                size = next(p.optimizer_bytes for p in plan.parameters if p.port == port)
                total += exchange_seconds(self.costs, self.pipelining, name, size, user=users[0])
        return total


def _breakdown(step_s: float, stages: Sequence[_Stage], count: int, degree: int) -> TimeBreakdown:
    """Where the average group's time goes; what it waits is the bubble."""
    busy = count * sum(stage.forward_s + stage.backward_s for stage in stages) / degree
    compute = count * sum(stage.compute_s for stage in stages) / degree
    synchronisation = sum(stage.synchronisation_s for stage in stages) / degree
    update = sum(stage.update_s for stage in stages) / degree
    return TimeBreakdown(
        step_s=step_s,
        compute_s=compute,
        communication_s=busy - compute,
        synchronisation_s=synchronisation,
        update_s=update,
        bubble_s=step_s - busy - synchronisation - update,
    )


def _memory(costs: CostModel, groups: Sequence[Sequence[_Stage]], batching: Batching) -> tuple[MemoryBreakdown, ...]:
    """Memory of each group of devices, and what each has beside for the others' sake.

    One program runs on all devices: XLA plans one heap for it, in which programs of stages take turns, and flat arrays
    are as long as the longest group's (`runtime.packing`). Parameters that nothing reads lie in the first group.
    """
    found = [_group_memory(costs, group, batching) for group in groups]
    states = [sum((stage.state for stage in group), Counter()) for group in groups]
    states[0].update(costs.unread_state())
    state = _longest(states) + costs.optimizer.scalar_bytes
    gradients = [sum((stage.gradients for stage in group), Counter()) for group in groups]
    pools = [sum(stage.pooled_bytes for stage in group) for group in groups]
    passing = [
        m.copied_bytes + m.residual_bytes - pool + m.workspace_bytes for m, pool in zip(found, pools, strict=True)
    ]
    step = _longest(gradients) + max(pools) + max(passing)
    unread = costs.unread_memory().gradient_bytes
    return tuple(
        memory.model_copy(
            update={
                "padded_bytes": state - memory.parameter_bytes - memory.optimizer_bytes,
                "reserved_bytes": step - (memory.gradient_bytes - unread) - pool - temporary,
            }
        )
        for memory, pool, temporary in zip(found, pools, passing, strict=True)
    )


def _longest(groups: Sequence[Counter]) -> int:
    """Bytes of flat arrays that have the length of the longest group's, on every device."""
    return sum(max(group[name] for group in groups) for name in set().union(*groups))


def _group_memory(costs: CostModel, stages: Sequence[_Stage], batching: Batching) -> MemoryBreakdown:
    unread = costs.unread_memory()
    layers = [*(memory for stage in stages for memory in stage.memory), unread]
    # One chunk at a time passes through its backward: what it recomputes, and its workspace.
    passing = max(stages, key=lambda s: s.recomputed_bytes + max(memory.workspace_bytes for memory in s.memory))
    parts = {
        "parameter_bytes": sum(layer.parameter_bytes for layer in layers),
        "optimizer_bytes": sum(layer.optimizer_bytes for layer in layers) + costs.optimizer.scalar_bytes,
        "gradient_bytes": sum(layer.gradient_bytes for layer in layers),
        "copied_bytes": sum(layer.copied_bytes for layer in layers),
        "residual_bytes": sum(s.pooled_bytes + s.outside_bytes for s in stages) + passing.recomputed_bytes,
        "workspace_bytes": max(memory.workspace_bytes for memory in passing.memory),
        "batch_bytes": costs.batch_bytes(batching),
        "state_bytes": costs.state_bytes(),
    }
    return MemoryBreakdown(total_bytes=sum(parts.values()), **parts)


def fixed_stage_bytes(costs: CostModel, batching: Batching, *, one_program: bool) -> int:
    """Bytes on every device that no strategy and no cut changes.

    Args:
        costs: prices.
        batching: how the batch is fed.
        one_program: whether what only the first group keeps is left out: where that group needs less than others, it
            takes nothing more of the program's.
    """
    unread = costs.unread_memory()
    fixed = costs.batch_bytes(batching) + costs.state_bytes() + costs.optimizer.scalar_bytes
    return fixed + (unread.gradient_bytes if one_program else unread.static_bytes)
