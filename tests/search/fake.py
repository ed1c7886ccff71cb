"""A toy model and a planner simple enough to check by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from galvatron_jax.partition.counts import Counts
from galvatron_jax.partition.layer_plan import BoundarySpec, Collective, LayerPlan, ParameterPlan, PhasePlan
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.spec.cluster import ClusterSpec, DeviceSpec, Link
from galvatron_jax.spec.model import InputPort, Layer, LayerKind, ModelSpec, OutputPort, Parameter, PortRole
from galvatron_jax.spec.profile import CollectiveKind
from galvatron_jax.spec.program import Factor, FactorRole, Program, Value
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel

BATCH, SEQUENCE, EMBEDDING, HIDDEN = range(4)
RESIDUAL_SHARE = {Remat.NONE: 1.0, Remat.ATTENTION: 0.7, Remat.DOTS: 0.4, Remat.FULL: 0.1}
REPEATED_WORK = {Remat.NONE: 2.0, Remat.ATTENTION: 2.2, Remat.DOTS: 2.4, Remat.FULL: 3.0}


def cluster(num_nodes: int = 1, devices_per_node: int = 4) -> ClusterSpec:
    """Round figures: 1 TFLOP/s (half of it reached), 100 GB/s memory, 10 GB/s inside a node, 1 GB/s between nodes."""
    return ClusterSpec(
        name="toys",
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        device=DeviceSpec(
            name="toy",
            memory_bytes=2**30,
            peak_flops_per_s={"float32": 1e12},
            memory_bandwidth_bytes_per_s=1e11,
        ),
        intra=Link(name="inside", latency_s=1e-6, bandwidth_bytes_per_s=1e10),
        inter=Link(name="between", latency_s=1e-5, bandwidth_bytes_per_s=1e9),
        source="invented",
    )


def toy_model(
    num_blocks: int = 2,
    *,
    tied: bool = False,
    skip: bool = False,
    microbatch: int = 8,
    width: int = 64,
    hidden: int = 64,
    sequence: int = 32,
    unread: bool = False,
) -> ModelSpec:
    """Embedding, blocks, head. Tied: the head uses the embedding's parameter. Skip: it also reads the first output.
    Unread: there is one more parameter, which nothing uses.
    """
    sizes = (microbatch, sequence, width, hidden)
    kinds = (
        _kind("embedding", sizes, reads=("tokens",), activations=0),
        _kind("block", sizes, reads=(), activations=1),
        _kind("head", sizes, reads=("labels",), activations=2 if skip else 1),
    )
    layers = [Layer(kind=0, name="embedding", inputs=("param:table", "batch:tokens"), outputs=("value:0",))]
    for index in range(num_blocks):
        values = f"value:{index}", f"value:{index + 1}"
        layers.append(
            Layer(kind=1, name=f"blocks/{index}", inputs=(f"param:w{index}", values[0]), outputs=(values[1],))
        )
    table = "param:table" if tied else "param:head"
    reads = (f"value:{num_blocks}", "value:0")[: 2 if skip else 1]
    layers.append(Layer(kind=2, name="head", inputs=(table, "batch:labels", *reads), outputs=("loss",)))
    paths = dict.fromkeys(["table", *(f"w{index}" for index in range(num_blocks)), table.removeprefix("param:")])
    paths |= {"unread": None} if unread else {}
    return ModelSpec(
        name="toy",
        fingerprint="toy",
        microbatch=microbatch,
        kinds=kinds,
        layers=tuple(layers),
        parameters=tuple(Parameter(path=path, shape=(width, hidden), dtype="float32") for path in paths),
    )


def _kind(name: str, sizes: tuple[int, ...], *, reads: tuple[str, ...], activations: int) -> LayerKind:
    roles = (FactorRole.BATCH, FactorRole.SEQUENCE, FactorRole.EMBEDDING, FactorRole.HIDDEN)
    weight = Value(dims=((EMBEDDING,), (HIDDEN,)), dtype="float32")
    tokens = Value(dims=((BATCH,), (SEQUENCE,)), dtype="int32")
    activation = Value(dims=((BATCH,), (SEQUENCE,), (EMBEDDING,)), dtype="float32")
    loss = Value(dims=(), dtype="float32")
    inputs = [InputPort(role=PortRole.PARAMETER, name="w", value=0, gradient=0)]
    inputs += [InputPort(role=PortRole.BATCH, name=label, value=1) for label in reads]
    inputs += [InputPort(role=PortRole.ACTIVATION, name="x", value=2, gradient=2)] * activations
    output = OutputPort(role=PortRole.ACTIVATION, name="y", value=2, cotangent=2)
    if name == "head":
        output = OutputPort(role=PortRole.LOSS, name="loss", value=3)
    return LayerKind(
        name=name,
        fingerprint=name,
        program=Program(
            factors=tuple(Factor(size=size, role=role) for size, role in zip(sizes, roles, strict=True)),
            values=(weight, tokens, activation, loss),
            inputs=(0, 1, 2),
            outputs=(2,),
            operations=(),
        ),
        inputs=tuple(inputs),
        outputs=(output,),
        batch_factor=BATCH,
    )


@dataclass(frozen=True)
class FakePlanner:
    """One matrix product per layer; everything follows from the strategy's degrees."""

    work: float = 1.0
    """Scales FLOPs."""
    activation: float = 4.0
    """Activations kept, in units of the boundary activation."""

    def plan_layer(
        self, kind: LayerKind, strategy: LayerStrategy, *, mesh: dict[str, int], microbatch: int, model_microbatch: int
    ) -> LayerPlan:
        shape = _Shape.of(kind, strategy, mesh, microbatch, model_microbatch)
        layouts = {0: None, 1: (strategy.dp, ()), 2: (strategy.dp, strategy.sp, ()), 3: ()}
        flops = 2.0 * self.work * shape.examples * shape.sequence * shape.width * shape.hidden / shape.shards
        weights = _gather(strategy, shape)
        forward = _activation_collectives(strategy, shape) + weights
        backward = _activation_collectives(strategy, shape) + weights + _backward_sync(strategy, shape)
        workspace = shape.boundary_bytes + (shape.weight_bytes if strategy.zero == 3 else 0)
        return LayerPlan(
            forward=_phase(flops, forward, workspace),
            backward=_phase(flops * REPEATED_WORK[strategy.remat], backward, 2 * workspace),
            residual_bytes=int(self.activation * RESIDUAL_SHARE[strategy.remat] * shape.boundary_bytes),
            parameters=(_parameter(strategy, shape),),
            inputs=tuple(layouts[port.value] for port in kind.inputs),
            outputs=tuple(layouts[port.value] for port in kind.outputs),
        )

    def plan_series(
        self,
        kind: LayerKind,
        strategy: LayerStrategy,
        *,
        mesh: dict[str, int],
        microbatches: tuple[int, ...],
        model_microbatch: int,
    ) -> tuple[LayerSeries, ...]:
        low, high = (
            self.plan_layer(kind, strategy, mesh=mesh, microbatch=microbatch, model_microbatch=model_microbatch)
            for microbatch in (microbatches[0], microbatches[-1])
        )
        return (line(low, high, microbatches),)

    def distinct_remats(self, kind: LayerKind, policies: tuple[Remat, ...]) -> tuple[Remat, ...]:
        return policies

    def looks_up_parameters(self, kind: LayerKind) -> bool:
        return False

    def boundary_collectives(
        self, dims: tuple[int, ...], dtype: str, source: BoundarySpec, target: BoundarySpec, *, mesh: Mapping[str, int]
    ) -> tuple[Collective, ...]:
        """Gathers each dim over the axes that only the source uses; slicing is free."""
        moves = []
        for before, after in zip(source, target, strict=True):
            extra = tuple(axis for axis in before if axis not in after)
            if extra:
                size = math.prod(mesh[axis] for axis in extra)
                moves.append(Collective(CollectiveKind.ALL_GATHER, extra, size, 4 * math.prod(dims)))
        return tuple(moves)


def line(low: LayerPlan, high: LayerPlan, microbatches: tuple[int, ...]) -> LayerSeries:
    """The line through a layer's plans at the least and the largest micro-batch."""
    if len(microbatches) == 1:
        return LayerSeries.of(high, microbatches[0])
    stretch = microbatches[-1] / (microbatches[-1] - microbatches[0])

    def amount(one: float, other: float) -> tuple[float, float]:
        grows = (other - one) * stretch
        return other - grows, grows

    def counts(one: PhasePlan, other: PhasePlan) -> Counts:
        return Counts(
            sent=tuple((b, a.bytes != b.bytes) for a, b in zip(one.collectives, other.collectives, strict=True)),
            flops=amount(one.flops, other.flops),
            moved=amount(one.bytes, other.bytes),
            peaks=(amount(one.peak_bytes, other.peak_bytes),),
            operations=one.operations,
        )

    stays, grows = amount(low.residual_bytes, high.residual_bytes)
    return LayerSeries(
        microbatches=microbatches,
        planned_at=microbatches[-1],
        forward=counts(low.forward, high.forward),
        backward=counts(low.backward, high.backward),
        residual_bytes=(round(stays), round(grows)),
        parameters=low.parameters,
        inputs=low.inputs,
        outputs=low.outputs,
    )


@dataclass(frozen=True)
class _Shape:
    examples: int
    sequence: int
    width: int
    hidden: int
    shards: int
    replicas: int
    tp: int
    boundary_bytes: int

    @property
    def weight_bytes(self) -> int:
        return 4 * self.width * self.hidden // self.tp

    @classmethod
    def of(
        cls, kind: LayerKind, strategy: LayerStrategy, mesh: dict[str, int], microbatch: int, model_microbatch: int
    ) -> _Shape:
        sizes = [factor.size for factor in kind.program.factors]
        dp, tp, sp = (math.prod(mesh[axis] for axis in axes) for axes in (strategy.dp, strategy.tp, strategy.sp))
        examples = sizes[BATCH] * microbatch // model_microbatch
        ulysses = sp if strategy.sp_kind is SequenceParallel.ULYSSES else 1
        boundary = 4 * examples * sizes[SEQUENCE] * sizes[EMBEDDING] // (dp * sp)
        return cls(examples, *sizes[1:], dp * tp * ulysses, dp * ulysses, tp, boundary)


def _phase(flops: float, collectives: tuple[Collective, ...], workspace: int) -> PhasePlan:
    return PhasePlan((), collectives, flops, 0.0, workspace, 1)


def _activation_collectives(strategy: LayerStrategy, shape: _Shape) -> tuple[Collective, ...]:
    if strategy.sp_kind is SequenceParallel.ULYSSES:
        sizes = shape.replicas
        return (Collective(CollectiveKind.ALL_TO_ALL, strategy.sp, sizes, shape.boundary_bytes),) * 2
    whole = shape.boundary_bytes * (shape.tp if strategy.sp else 1)
    if strategy.sp_kind is SequenceParallel.MEGATRON:
        kinds = CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER
        return tuple(Collective(kind, strategy.tp, shape.tp, whole) for kind in kinds)
    return (Collective(CollectiveKind.ALL_REDUCE, strategy.tp, shape.tp, whole),) if strategy.tp else ()


def _gather(strategy: LayerStrategy, shape: _Shape) -> tuple[Collective, ...]:
    if strategy.zero < 3:
        return ()
    return (Collective(CollectiveKind.ALL_GATHER, strategy.replicas, shape.replicas, shape.weight_bytes),)


def _backward_sync(strategy: LayerStrategy, shape: _Shape) -> tuple[Collective, ...]:
    if strategy.zero < 2 or not strategy.replicas:
        return ()
    return (Collective(CollectiveKind.REDUCE_SCATTER, strategy.replicas, shape.replicas, shape.weight_bytes),)


def _parameter(strategy: LayerStrategy, shape: _Shape) -> ParameterPlan:
    whole, part = shape.weight_bytes, shape.weight_bytes // shape.replicas
    kept, zero = ((), (strategy.tp,)), strategy.zero if strategy.replicas else 0
    spread = ((strategy.replicas,), (strategy.tp,))
    sync, publish = (), ()
    if zero < 2 and strategy.replicas:
        kind = CollectiveKind.REDUCE_SCATTER if zero else CollectiveKind.ALL_REDUCE
        sync = (Collective(kind, strategy.replicas, shape.replicas, whole),)
    if zero in (1, 2):
        publish = (Collective(CollectiveKind.ALL_GATHER, strategy.replicas, shape.replicas, whole),)
    return ParameterPlan(
        port=0,
        name="w",
        storage=spread if zero == 3 else kept,
        optimizer=spread if zero else kept,
        storage_bytes=part if zero == 3 else whole,
        optimizer_bytes=part if zero else whole,
        accumulator_bytes=part if zero >= 2 else whole,
        sync=sync,
        publish=publish,
    )
