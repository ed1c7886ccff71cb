"""Saying why nothing fits, and what would."""

from __future__ import annotations

from dataclasses import replace

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.step import plan_memory
from galvatron_jax.errors import InfeasibleError
from galvatron_jax.search.explain import describe_groups, memory_rows
from galvatron_jax.search.pipeline_problems import PipelineBest
from galvatron_jax.search.problems import Best
from galvatron_jax.search.space import SearchSpace
from galvatron_jax.spec.plan import MeshAxis, Plan
from galvatron_jax.spec.strategy import LayerStrategy, Remat
from galvatron_jax.units import MIB, format_bytes

_DOUBLINGS = 4


class NothingFitsError(InfeasibleError):
    """No plan fits the budget. Carries the nearest one."""

    def __init__(self, message: str, *, nearest: Plan, need_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.nearest = nearest
        """The plan that needs least memory."""
        self.need_bytes = need_bytes
        self.budget_bytes = budget_bytes


def nothing_fits(
    nearest: Best | PipelineBest, plan: Plan, *, memory_bytes: int, space: SearchSpace
) -> NothingFitsError:
    """The error for a search in which even the smallest plan is too large.

    Args:
        nearest: the solution that needs least memory.
        plan: the plan made of it.
        memory_bytes: the budget per device.
        space: what was searched.
    """
    assert plan.prediction is not None
    memory = plan.prediction.largest
    largest = memory_rows(memory)[0]
    need = plan.prediction.peak_bytes
    message = (
        f"No plan of {plan.model!r} with a global batch of {plan.global_batch} fits in {format_bytes(memory_bytes)} "
        f"per device on {plan.num_devices} × {nearest.problem.costs.cluster.device.name}. "
        f"The nearest needs {format_bytes(need)}, {format_bytes(need - memory_bytes)} too much: "
        f"{plan.num_microbatches} micro-batch(es), {'; '.join(describe_groups(plan))}. "
        f"{_stage_over(plan, memory_bytes)}"
        f"Largest part: {largest.name}, {format_bytes(largest.value)} ({largest.share:.0%}). "
        f"What would fit: {', or '.join(_remedies(nearest, plan, memory_bytes, space))}."
    )
    return NothingFitsError(message, nearest=plan, need_bytes=need, budget_bytes=memory_bytes)


def _stage_over(plan: Plan, memory_bytes: int) -> str:
    """Which groups of stages are over the budget, and by how much; nothing for one stage."""
    if len(plan.stages) == 1 or plan.prediction is None:
        return ""
    over = [
        f"group {index} by {format_bytes(memory.total_bytes - memory_bytes)}"
        for index, memory in enumerate(plan.prediction.memory)
        if memory.total_bytes > memory_bytes
    ]
    if not over:
        return "Each group's own stages fit; the one program of all groups holds the most of each part that any needs. "
    return f"Over the budget: {', '.join(over)}. "


def _remedies(nearest: Best | PipelineBest, plan: Plan, memory_bytes: int, space: SearchSpace) -> list[str]:
    assert plan.prediction is not None
    need = plan.prediction.peak_bytes
    remedies = [f"a budget of {-(-need // MIB)} MiB per device"]
    larger = _on_more_devices(nearest, plan, memory_bytes)
    if larger is not None:
        remedies.append(f"{larger[0]} such devices ({format_bytes(larger[1])} each)")
    if 3 not in space.zero:
        remedies.append("allowing ZeRO 3")
    if Remat.FULL not in space.remat:
        remedies.append("allowing full rematerialisation")
    if space.num_microbatches is not None and max(space.num_microbatches) < plan.global_batch:
        remedies.append("allowing more micro-batches")
    if larger is None:
        remedies.append("a smaller model or shorter sequences")
    return remedies


def _on_more_devices(nearest: Best | PipelineBest, plan: Plan, memory_bytes: int) -> tuple[int, int] | None:
    """Devices, and bytes on each, at which the nearest plan fits once its data parallelism is doubled often enough."""
    if len(plan.stages) > 1:
        return None
    costs, count = nearest.problem.costs, plan.num_microbatches
    mesh, strategies = plan.mesh, plan.strategies
    axes = plan.batch_axes
    for step in range(_DOUBLINGS):
        name = f"more{step}"
        mesh = (MeshAxis(name=name, size=2, level="inter"), *mesh)
        strategies = tuple(_widened(strategy, name) for strategy in strategies)
        axes = (name, *axes)
        count = count // 2 if count % 2 == 0 else count
        batching = Batching(plan.global_batch, count, axes)
        if _indivisible(strategies, batching, mesh):
            return None
        larger = _moved(costs, mesh)
        need = plan_memory(larger, strategies, batching).total_bytes
        if need <= memory_bytes:
            return plan.num_devices * 2 ** (step + 1), need
    return None


def _widened(strategy: LayerStrategy, axis: str) -> LayerStrategy:
    zero = 3 if strategy.zero == 0 else strategy.zero
    return strategy.model_copy(update={"dp": (axis, *strategy.dp), "zero": zero})


def _indivisible(strategies: tuple[LayerStrategy, ...], batching: Batching, mesh: tuple[MeshAxis, ...]) -> bool:
    sizes = {axis.name: axis.size for axis in mesh}
    for axes in {strategy.dp for strategy in strategies} | {batching.axes}:
        ways = 1
        for axis in axes:
            ways *= sizes[axis]
        if batching.microbatch % ways:
            return True
    return False


def _moved(costs: CostModel, mesh: tuple[MeshAxis, ...]) -> CostModel:
    """The same cost model on another mesh; only its memory is asked for."""
    return replace(costs, table=replace(costs.table.exact(), mesh=mesh))
