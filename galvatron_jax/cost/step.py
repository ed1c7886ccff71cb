"""`price_plan`: seconds of a step and bytes per device of a whole plan; of one stage by what its layers sum to."""

from __future__ import annotations

from collections.abc import Sequence

from galvatron_jax.cost.memory import LayerMemory, OptimizerMemory, layer_memory
from galvatron_jax.cost.model import Batching, CostModel, LayerCost
from galvatron_jax.cost.pipeline import Pipelining, predict_pipeline
from galvatron_jax.cost.planner import Planner, default_planner
from galvatron_jax.errors import PlanMismatchError
from galvatron_jax.partition.layer_plan import LayerPlan, ParameterPlan
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import MemoryBreakdown, Plan, Prediction, TimeBreakdown
from galvatron_jax.spec.plan_checks import check_plan
from galvatron_jax.spec.profile import Profile
from galvatron_jax.spec.strategy import LayerStrategy


def price_plan(
    model: ModelSpec,
    plan: Plan,
    *,
    cluster: ClusterSpec,
    profile: Profile | None = None,
    optimizer: OptimizerMemory,
    memory_bytes: int | None = None,
    planner: Planner | None = None,
) -> Prediction:
    """What a plan, found or written by hand, is expected to cost. The search's own predictions are made here.

    Args:
        model: the model that the plan is for.
        plan: of one stage or several.
        cluster: devices and links.
        profile: measurements; None derives times from the cluster's figures.
        optimizer: its state per parameter.
        memory_bytes: budget to note in the prediction.
        planner: for tests; the partitioner otherwise.

    Raises:
        PlanMismatchError: when it does not fit the model or its batch, or layers disagree on a tied parameter.
    """
    check_plan(plan, model, plan.num_devices)
    batching = Batching(plan.global_batch, plan.num_microbatches, plan.batch_axes)
    pipeline_axes = tuple(axis for axis in plan.mesh if axis.name in plan.pipeline_axes)
    costs = CostModel.build(
        model,
        cluster=cluster,
        mesh=plan.stage_mesh,
        profile=profile,
        optimizer=optimizer,
        planner=planner or default_planner(),
        pipeline_axes=pipeline_axes,
        gradient_sum_dtype=plan.gradient_sum_dtype,
    )
    if len(plan.stages) == 1:
        return predict(costs, plan.strategies, batching, memory_bytes=memory_bytes)
    plans = [costs.plan(index, strategy, batching) for index, strategy in enumerate(plan.strategies)]
    check_ties(costs, plans, plan.strategies)
    pipelining = Pipelining(plan.schedule, pipeline_axes, len(plan.stages) // plan.pipeline_degree)
    starts = [stage.groups[0].start for stage in plan.stages]
    return predict_pipeline(costs, pipelining, starts, plan.strategies, batching, memory_bytes=memory_bytes)


def predict(
    costs: CostModel, strategies: Sequence[LayerStrategy], batching: Batching, *, memory_bytes: int | None
) -> Prediction:
    """Time and memory of one strategy per layer.

    Raises:
        PlanMismatchError: when layers that share a parameter would store it differently.
    """
    plans = [costs.plan(index, strategy, batching) for index, strategy in enumerate(strategies)]
    check_ties(costs, plans, strategies)
    layers = [
        costs.layer_cost(wiring, strategy, batching)
        for wiring, strategy in zip(costs.wiring.layers, strategies, strict=True)
    ]
    moves = sum(
        sum(
            costs.transition_seconds(
                costs.wiring.layers[index - 1].kind,
                costs.wiring.layers[index],
                plans[index - 1],
                plans[index],
                microbatch=batching.microbatch,
            )
        )
        for index in range(1, len(plans))
    )
    return Prediction(
        time=_time(layers, moves, batching.num_microbatches),
        memory=(_memory(costs, [layer.memory for layer in layers], batching),),
        memory_budget_bytes=memory_bytes,
        provenance=costs.provenance,
    )


def tie_signature(parameter: ParameterPlan) -> tuple:
    """What all layers that use a tied parameter must agree on: it is stored, updated and synchronised once."""
    return (
        parameter.storage,
        parameter.optimizer,
        parameter.accumulator_bytes,
        parameter.sync,
        parameter.publish,
    )


def signatures(parameters: Sequence[ParameterPlan], tied: tuple[tuple[str, int], ...]) -> dict[str, tuple]:
    """Signature per tied parameter that a layer with these parameters uses."""
    by_port = {parameter.port: parameter for parameter in parameters} if tied else {}
    return {name: tie_signature(by_port[port]) for name, port in tied if port in by_port}


def check_ties(costs: CostModel, plans: Sequence[LayerPlan], strategies: Sequence[LayerStrategy]) -> None:
    """Refuses plans whose layers disagree on a tied parameter."""
    owners: dict[str, tuple[int, tuple]] = {}
    for index, (wiring, plan) in enumerate(zip(costs.wiring.layers, plans, strict=True)):
        for name, signature in signatures(plan.parameters, wiring.tied).items():
            owner, expected = owners.setdefault(name, (index, signature))
            if signature != expected:
                first, second = costs.model.layers[owner].name, costs.model.layers[index].name
                raise PlanMismatchError(
                    f"{first!r} ({strategies[owner].short()}) and {second!r} ({strategies[index].short()}) share "
                    f"{name.removeprefix('param:')!r} but would lay it out differently. Give both one strategy."
                )


def _time(layers: Sequence[LayerCost], moves_s: float, num_microbatches: int) -> TimeBreakdown:
    compute = num_microbatches * sum(layer.compute_s for layer in layers)
    communication = num_microbatches * (sum(layer.communication_s for layer in layers) + moves_s)
    synchronisation = sum(layer.synchronisation_s for layer in layers)
    update = sum(layer.update_s for layer in layers)
    return TimeBreakdown(
        step_s=compute + communication + synchronisation + update,
        compute_s=compute,
        communication_s=communication,
        synchronisation_s=synchronisation,
        update_s=update,
    )


def plan_memory(costs: CostModel, strategies: Sequence[LayerStrategy], batching: Batching) -> MemoryBreakdown:
    """Memory alone of one strategy per layer."""
    layers = [
        layer_memory(
            costs.model.kinds[wiring.kind],
            costs.table.plan(wiring.kind, strategy, microbatch=batching.microbatch),
            wiring=wiring,
            optimizer=costs.optimizer,
            accumulates=batching.num_microbatches > 1,
        )
        for wiring, strategy in zip(costs.wiring.layers, strategies, strict=True)
    ]
    return _memory(costs, layers, batching)


def _memory(costs: CostModel, layers: Sequence[LayerMemory], batching: Batching) -> MemoryBreakdown:
    layers = [*layers, costs.unread_memory()]
    parts = {
        "parameter_bytes": sum(layer.parameter_bytes for layer in layers),
        "optimizer_bytes": sum(layer.optimizer_bytes for layer in layers) + costs.optimizer.scalar_bytes,
        "gradient_bytes": sum(layer.gradient_bytes for layer in layers),
        "copied_bytes": sum(layer.copied_bytes for layer in layers),
        "residual_bytes": sum(layer.residual_bytes for layer in layers) + costs.held_bytes(batching),
        "workspace_bytes": max(layer.workspace_bytes for layer in layers),
        "batch_bytes": costs.batch_bytes(batching),
        "state_bytes": costs.state_bytes(),
    }
    return MemoryBreakdown(total_bytes=sum(parts.values()), **parts)


def fixed_bytes(costs: CostModel, batching: Batching) -> int:
    """Bytes that no layer's strategy changes: batch, held values, state, the optimizer's scalars, unread parameters."""
    fixed = costs.batch_bytes(batching) + costs.held_bytes(batching) + costs.state_bytes()
    return fixed + costs.optimizer.scalar_bytes + costs.unread_memory().resident_bytes
