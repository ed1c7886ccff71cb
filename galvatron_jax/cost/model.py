"""`CostModel`: seconds and bytes of the layers of one model on one mesh, and of the steps between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from galvatron_jax.cost.compute import Compute, compute_for, local_shape
from galvatron_jax.cost.links import Links, links_for
from galvatron_jax.cost.memory import (
    Flat,
    LayerMemory,
    OptimizerMemory,
    parameter_memory,
    passing_bytes,
    update_traffic_bytes,
)
from galvatron_jax.cost.planner import Planner, PlanTable
from galvatron_jax.cost.sizes import batch_spec, local_bytes, value_dims, whole_bytes
from galvatron_jax.cost.wiring import LayerWiring, Wiring, wire
from galvatron_jax.partition.counts import Sent
from galvatron_jax.partition.layer_plan import BoundarySpec, Collective, LayerPlan, ParameterPlan
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.profile import Profile
from galvatron_jax.spec.strategy import LayerStrategy

CPU = "cpu"
"""Kind of the devices of a host."""
_STEP_NUMBER_BYTES = 4
"""An int32."""


@dataclass(frozen=True)
class Batching:
    """How a plan feeds its global batch."""

    global_batch: int
    num_microbatches: int
    axes: tuple[str, ...]
    """`Plan.batch_axes`."""

    @property
    def microbatch(self) -> int:
        """Examples of one micro-batch, over all devices."""
        return self.global_batch // self.num_microbatches


class Ports(Protocol):
    """Layouts at a layer's ports: a plan's, or those of a series of plans."""

    @property
    def inputs(self) -> tuple[BoundarySpec | None, ...]:
        """Per input port, None for parameters."""
        ...

    @property
    def outputs(self) -> tuple[BoundarySpec | None, ...]:
        """Per output port."""
        ...


@dataclass(frozen=True)
class PhaseCost:
    """Seconds of forward or backward of one layer for one micro-batch."""

    compute_s: float
    communication_s: float
    """Not hidden by computation."""

    @property
    def seconds(self) -> float:
        """Both."""
        return self.compute_s + self.communication_s


@dataclass(frozen=True)
class LayerCost:
    """One layer's share of a step."""

    forward: PhaseCost
    backward: PhaseCost
    synchronisation_s: float
    """Per step."""
    update_s: float
    memory: LayerMemory
    estimated: bool
    """Whether its computation time is scaled or derived, not measured."""

    @property
    def compute_s(self) -> float:
        """Per micro-batch, both ways."""
        return self.forward.compute_s + self.backward.compute_s

    @property
    def communication_s(self) -> float:
        """Per micro-batch, both ways."""
        return self.forward.communication_s + self.backward.communication_s

    @property
    def once_s(self) -> float:
        """Per step, whatever the number of micro-batches."""
        return self.synchronisation_s + self.update_s

    def step_s(self, num_microbatches: int) -> float:
        """Seconds of a whole step."""
        return num_microbatches * (self.compute_s + self.communication_s) + self.synchronisation_s + self.update_s


@dataclass(frozen=True)
class ParameterCost:
    """What a layer's parameters cost."""

    synchronisation_s: float
    """Per step."""
    update_s: float
    accumulation_s: float
    """Per micro-batch, where gradients of several are added up."""
    memory: LayerMemory
    """Without residuals and workspace."""

    @property
    def once_s(self) -> float:
        """Per step."""
        return self.synchronisation_s + self.update_s


@dataclass(frozen=True)
class CostModel:
    """Prices layers and transitions. One object serves the search and `price_plan`, so both say the same."""

    model: ModelSpec
    cluster: ClusterSpec
    table: PlanTable
    wiring: Wiring
    compute: Compute
    links: Links
    optimizer: OptimizerMemory
    overlap: float
    update_bytes_per_s: float
    provenance: str
    staged: bool = False
    """Whether layers are put into pipeline stages."""
    combines: bool = True
    """Whether XLA puts collectives together that wait for nothing else. Its compiler for CPUs does not, or runs one
    after the other what it put together."""
    _seconds: dict[tuple, float] = field(default_factory=dict, repr=False, compare=False)
    """Of collectives priced so far."""
    _parameters: dict[tuple, tuple[tuple[ParameterPlan, ...], ParameterCost]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Of parameters priced so far, which do not depend on the micro-batch."""

    @classmethod
    def build(
        cls,
        model: ModelSpec,
        *,
        cluster: ClusterSpec,
        mesh: tuple[MeshAxis, ...],
        profile: Profile | None,
        optimizer: OptimizerMemory,
        planner: Planner,
        pipeline_axes: tuple[MeshAxis, ...] = (),
        microbatches: tuple[int, ...] = (),
        gradient_sum_dtype: str | None = None,
    ) -> CostModel:
        """A cost model from measurements where `profile` has them, from the cluster's figures otherwise.

        Args:
            model: what is priced.
            cluster: devices and links.
            mesh: axes that each stage is spread over.
            profile: measurements, if any.
            optimizer: its state per parameter.
            planner: turns strategies into collectives and sizes.
            pipeline_axes: axes along which stages lie.
            microbatches: those that will be asked for, ascending; plans between some of them are interpolated.
            gradient_sum_dtype: in which gradients are summed over devices; None for their own.
        """
        bandwidth = profile.update_bytes_per_s if profile is not None else None
        return cls(
            model=model,
            cluster=cluster,
            table=PlanTable(model, mesh, planner, microbatches, gradient_sum_dtype),
            wiring=wire(model),
            compute=compute_for(profile, cluster=cluster, planner=planner, model=model),
            links=links_for(profile, cluster=cluster, mesh=(*pipeline_axes, *mesh)),
            optimizer=optimizer,
            overlap=profile.overlap if profile is not None else 0.0,
            update_bytes_per_s=bandwidth or cluster.device.memory_bandwidth_bytes_per_s,
            provenance=str(profile.provenance) if profile is not None else "derived",
            staged=bool(pipeline_axes),
            combines=cluster.device.name != CPU,
        )

    def plan(self, layer: int, strategy: LayerStrategy, batching: Batching) -> LayerPlan:
        """The plan of a layer of the model."""
        return self.table.plan(self.model.layers[layer].kind, strategy, microbatch=batching.microbatch)

    def layer_cost(self, wiring: LayerWiring, strategy: LayerStrategy, batching: Batching) -> LayerCost:
        """Cost of a layer with the given connections under a strategy, transitions to its neighbours excluded."""
        kind = self.model.kinds[wiring.kind]
        plan = self.table.plan(wiring.kind, strategy, microbatch=batching.microbatch)
        shape = local_shape(strategy, mesh=self.table.sizes, microbatch=batching.microbatch)
        compute = self.compute.layer(kind, plan, strategy=strategy, shape=shape)
        there, back = self.held_seconds(wiring, plan, batching)
        state = self.parameter_cost(wiring, plan.parameters)
        accumulates = batching.num_microbatches > 1
        residual, workspace = passing_bytes(plan, wiring=wiring, staged=self.staged, accumulates=accumulates)
        backward_s = compute.backward_s + (state.accumulation_s if self.adds_up(batching) else 0.0)
        return LayerCost(
            forward=PhaseCost(compute.forward_s, self._exposed(plan.forward.collectives, compute.forward_s) + there),
            backward=PhaseCost(backward_s, self._exposed(plan.backward.collectives, compute.backward_s) + back),
            synchronisation_s=state.synchronisation_s,
            update_s=state.update_s,
            memory=replace(
                state.memory, residual_bytes=residual, workspace_bytes=workspace + state.memory.workspace_bytes
            ),
            estimated=compute.estimated,
        )

    def parameter_cost(self, wiring: LayerWiring, parameters: tuple[ParameterPlan, ...]) -> ParameterCost:
        """What a layer's parameters cost, whatever the micro-batch."""
        key = (id(parameters), wiring.kind, wiring.owned, wiring.looped)
        if key not in self._parameters:
            kind, owned = self.model.kinds[wiring.kind], wiring.owned
            publish = [c for parameter in parameters if parameter.port in owned for c in parameter.publish]
            # A later user's gradient is added to the owner's before that is summed.
            sync = [c for parameter in parameters if parameter.port in owned for c in parameter.sync]
            traffic = update_traffic_bytes(kind, parameters, owned=owned, optimizer=self.optimizer)
            memory = parameter_memory(kind, parameters, wiring=wiring, optimizer=self.optimizer, staged=self.staged)
            found = ParameterCost(
                self._together_seconds(sync, wiring) + self._together_seconds(publish, wiring),
                traffic / self.update_bytes_per_s,
                self.copy_seconds(memory.gradient_bytes),
                memory,
            )
            # The parameters are kept, so that no others come to have their identity.
            self._parameters[key] = parameters, found
        return self._parameters[key][1]

    def adds_up(self, batching: Batching) -> bool:
        """Whether gradients are added to those of earlier micro-batches, or to the zeros that a stage begins with."""
        return self.staged or batching.num_microbatches > 1

    def copy_seconds(self, size: float) -> float:
        """Seconds to read bytes in a device's memory and to write as many."""
        return 2 * size / self.cluster.device.memory_bandwidth_bytes_per_s

    def _together_seconds(self, collectives: Sequence[Collective], wiring: LayerWiring) -> float:
        """A layer's share of collectives that wait for nothing else.

        Where XLA leaves them apart, like layers of a loop still have each parameter's in one.
        """
        if self.combines:
            return self.seconds(fused(collectives))
        count = sum(layer.kind == wiring.kind for layer in self.model.layers) if wiring.looped else 1
        return self.seconds([replace(each, bytes=each.bytes * count) for each in collectives]) / count

    def transition_seconds(
        self, before: int, wiring: LayerWiring, source: Ports, target: Ports, *, microbatch: int
    ) -> tuple[float, float]:
        """Seconds per micro-batch to hand values from a layer of kind `before` to the next one, and gradients back."""
        kind = self.model.kinds[before]
        moves = [
            self._move_seconds(
                before,
                kind.outputs[hop.output].value,
                source.outputs[hop.output],
                target.inputs[hop.input],
                microbatch=microbatch,
                both_ways=hop.differentiable,
            )
            for hop in wiring.hops
        ]
        return _sum_pairs(moves)

    def cut_seconds(
        self, before: int, wiring: LayerWiring, plan: Ports, batching: Batching, *, leaving: bool
    ) -> tuple[float, float]:
        """Seconds per micro-batch, there and back, between a layer's layouts and the plan-wide one at a stage's edge.

        Args:
            before: kind of the layer in front of the cut.
            wiring: of the layer behind it.
            plan: of the layer in front when `leaving`, of the layer behind otherwise.
            batching: how the batch is fed.
            leaving: whether the values leave their stage or enter the next.
        """
        kind, moves = self.model.kinds[before], []
        for hop in wiring.hops:
            value = kind.outputs[hop.output].value
            whole = batch_spec(kind, value, batching.axes)
            pair = (plan.outputs[hop.output], whole) if leaving else (whole, plan.inputs[hop.input])
            moves.append(
                self._move_seconds(before, value, *pair, microbatch=batching.microbatch, both_ways=hop.differentiable)
            )
        return _sum_pairs(moves)

    def seconds(self, collectives: Iterable[Collective]) -> float:
        """Collectives one after another."""
        return self.sent_seconds([(collective, False) for collective in collectives], microbatch=1, planned_at=1)

    def sent_seconds(self, sent: Iterable[Sent], *, microbatch: int, planned_at: int) -> float:
        """Collectives one after another, at another micro-batch than the one they were planned at."""
        total, known = 0.0, self._seconds
        for collective, grows in sent:
            size = collective.bytes * microbatch // planned_at if grows else collective.bytes
            key = (collective.kind, collective.axes, size)
            found = known.get(key)
            if found is None:
                found = known[key] = self.links.seconds(replace(collective, bytes=size))
            total += found
        return total

    def batch_bytes(self, batching: Batching) -> int:
        """Bytes of the whole global batch on one device."""
        return self._sum_bytes(self.wiring.batch, batching.global_batch, batching.axes, side="inputs")

    def held_bytes(self, batching: Batching) -> int:
        """Bytes, for one micro-batch, of the values that are held in the plan-wide layout."""
        return self._sum_bytes(self.wiring.held, batching.microbatch, batching.axes, side="outputs")

    def state_bytes(self) -> int:
        """Bytes of non-trained state and of the step's number, whole on every device."""
        return _STEP_NUMBER_BYTES + sum(whole_bytes(variable) for variable in self.model.state)

    def unread_memory(self) -> LayerMemory:
        """What parameters take that no layer uses: the executor keeps them, with state and gradients of zero."""
        sizes = [(whole_bytes(parameter), parameter.dtype) for parameter in self.wiring.unread]
        total = sum(size for size, _ in sizes)
        slots = sum(self.optimizer.slot_bytes(size, dtype) for size, dtype in sizes)
        return LayerMemory(total, slots, total, residual_bytes=0, workspace_bytes=0)

    def unread_state(self) -> Counter[Flat]:
        """The same in a pipeline's flat arrays; see `memory.stored_bytes`."""
        found: Counter[Flat] = Counter()
        for parameter in self.wiring.unread:
            found.update(self.optimizer.state_bytes(whole_bytes(parameter), whole_bytes(parameter), parameter.dtype))
        return found

    def _sum_bytes(
        self, places: tuple[tuple[int, int], ...], examples: int, axes: tuple[str, ...], *, side: str
    ) -> int:
        total = 0
        for layer, port in places:
            kind = self.model.kinds[self.model.layers[layer].kind]
            value = getattr(kind, side)[port].value
            dims = value_dims(kind, value, microbatch=examples, model_microbatch=self.model.microbatch)
            spec = batch_spec(kind, value, axes)
            total += local_bytes(dims, kind.program.values[value].dtype, spec, self.table.sizes)
        return total

    def _exposed(self, collectives: tuple[Collective, ...], compute_s: float) -> float:
        total = self.seconds(collectives)
        return total - self.overlap * min(total, compute_s)

    def held_seconds(self, wiring: LayerWiring, plan: Ports, batching: Batching) -> tuple[float, float]:
        """Conversions between the plan-wide layout and the layer's own, in forward and in backward."""
        kind, moves = self.model.kinds[wiring.kind], []
        for held, reading in [(h, True) for h in wiring.reads] + [(h, False) for h in wiring.writes]:
            port = kind.inputs[held.port] if reading else kind.outputs[held.port]
            spec = plan.inputs[held.port] if reading else plan.outputs[held.port]
            whole = batch_spec(kind, port.value, batching.axes if held.batched else ())
            pair = (whole, spec) if reading else (spec, whole)
            moves.append(
                self._move_seconds(
                    wiring.kind, port.value, *pair, microbatch=batching.microbatch, both_ways=held.differentiable
                )
            )
        return _sum_pairs(moves)

    def _move_seconds(
        self,
        kind: int,
        value: int,
        source: BoundarySpec | None,
        target: BoundarySpec | None,
        *,
        microbatch: int,
        both_ways: bool,
    ) -> tuple[float, float]:
        """Seconds to bring a value of a layer kind into another layout, and its gradient back."""
        if source is None or target is None or source == target:
            return 0.0, 0.0
        layer_kind = self.model.kinds[kind]
        dims = value_dims(layer_kind, value, microbatch=microbatch, model_microbatch=self.model.microbatch)
        dtype = layer_kind.program.values[value].dtype
        there = self.seconds(self.table.move(dims, dtype, source=source, target=target))
        back = self.seconds(self.table.move(dims, dtype, source=target, target=source)) if both_ways else 0.0
        return there, back


def _sum_pairs(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    there = back = 0.0
    for one, other in pairs:
        there, back = there + one, back + other
    return there, back


def fused(collectives: Iterable[Collective]) -> list[Collective]:
    """Collectives of one sort put together, as XLA's combiners do with those that wait for nothing else."""
    sums: dict[Collective, int] = {}
    for collective in collectives:
        sort = replace(collective, bytes=0)
        sums[sort] = sums.get(sort, 0) + collective.bytes
    return [replace(sort, bytes=total) for sort, total in sums.items()]
