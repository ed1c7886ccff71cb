"""A plan as tables: how each group of layers is spread over the devices, and where time and memory go."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from galvatron_jax.report.schedule_picture import timeline_text
from galvatron_jax.report.text import facts, per_second, share, titled
from galvatron_jax.report.timelines import plan_timeline
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import LayerGroup, MemoryBreakdown, Plan, TimeBreakdown
from galvatron_jax.spec.strategy import Remat, SequenceParallel
from galvatron_jax.units import format_bytes, format_seconds

_MOST_GROUPS, _MOST_BLOCKS = 16, 16
"""Groups of devices, and blocks of each, up to which a timeline is printed as text."""
_ROOM = "room: one program serves all groups, and holds the most of each part that any of them needs"
_ZERO_STAGES = ("–", "1: optimizer state", "2: + gradients", "3: + parameters")


def plan_report(plan: Plan, *, model: ModelSpec | None = None) -> Iterator[RenderableType]:
    """Everything about a plan.

    Args:
        plan: the plan.
        model: names its layers.
    """
    yield strategy_table(plan, model=model)
    if plan.prediction is None:
        return
    yield time_table(plan)
    if plan.prediction.stages:
        yield stage_table(plan)
        if _fits_a_line(plan):
            yield timeline_text(plan_timeline(plan))
    yield memory_table(plan)


def plan_title(plan: Plan) -> str:
    """Model, devices, batch and stages in a line."""
    devices = f"{plan.num_devices} device{'s' if plan.num_devices != 1 else ''}"
    cut = f" in {plan.num_microbatches} micro-batches" if plan.num_microbatches > 1 else ""
    stages = f", {len(plan.stages)} stages ({plan.schedule})" if len(plan.stages) > 1 else ""
    return f"{plan.model} on {devices}, batch {plan.global_batch}{cut}{stages}"


def strategy_table(plan: Plan, *, model: ModelSpec | None = None) -> Group:
    """One row per group of layers with the same strategy; parallelism as degree and mesh axes."""
    table = Table()
    several = len(plan.stages) > 1
    for name in (["stage"] if several else []) + [
        "layers",
        "what",
        "data",
        "tensor",
        "sequence",
        "ZeRO shards",
        "remat",
    ]:
        table.add_column(name)
    for index, stage in enumerate(plan.stages):
        for group in stage.groups:
            cells = _group_cells(plan, group, model)
            table.add_row(*([str(index)] if several else []), *cells)
    mesh = " × ".join(f"{axis.name}={axis.size}" for axis in plan.mesh) or "no axes"
    return titled(f"Plan: {plan_title(plan)}, mesh {mesh}", table)


def time_table(plan: Plan) -> Group:
    """The predicted step and what it consists of."""
    assert plan.prediction is not None
    time, whole = plan.prediction.time, plan.prediction.time.step_s
    rows = [(name, format_seconds(part), share(part, whole)) for name, part in _time_parts(time)]
    table = Table()
    table.add_column("part")
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    for row in rows:
        table.add_row(*row)
    table.add_section()
    rate = f"{per_second(plan.global_batch / whole)} examples/s" if whole else "–"
    table.add_row("step", format_seconds(whole), rate, style="bold")
    return titled(f"Predicted step time ({plan.prediction.provenance} profile): {plan_title(plan)}", table)


def stage_table(plan: Plan) -> Group:
    """The predicted times of every stage, and the memory of the group of devices that it lies on."""
    assert plan.prediction is not None
    groups = plan.prediction.memory
    table = Table()
    for name in ("stage", "group", "layers"):
        table.add_column(name, justify="right")
    for name in ("forward", "backward", "once a step", "busy", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = plan.prediction.time.step_s
    for number, (stage, time) in enumerate(zip(plan.stages, plan.prediction.stages, strict=True)):
        group = number % len(groups)
        busy = plan.num_microbatches * (time.forward_s + time.backward_s) + time.once_s
        table.add_row(
            str(number),
            str(group),
            _span(stage.groups[0].start, stage.groups[-1].stop),
            *(format_seconds(seconds) for seconds in (time.forward_s, time.backward_s, time.once_s)),
            share(busy, whole),
            format_bytes(groups[group].total_bytes),
        )
    return titled(f"Stages (forward and backward of one micro-batch): {plan_title(plan)}", table)


def memory_table(plan: Plan) -> Group:
    """The predicted peak per device; of a pipeline a row per group of devices."""
    assert plan.prediction is not None
    if len(plan.prediction.memory) > 1:
        return _group_memory_table(plan)
    memory, budget = plan.prediction.largest, plan.prediction.memory_budget_bytes
    table = Table()
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for name, count in _memory_parts(memory):
        table.add_row(name, format_bytes(count))
    table.add_section()
    table.add_row("total", format_bytes(memory.peak_bytes), style="bold")
    if budget is not None:
        table.add_row("budget", f"{format_bytes(budget)}, {share(memory.peak_bytes, budget)} used")
    return titled(f"Predicted memory per device: {plan_title(plan)}", table)


def _group_memory_table(plan: Plan) -> Group:
    assert plan.prediction is not None
    budget = plan.prediction.memory_budget_bytes
    table = Table()
    for name in (
        "group",
        "parameters",
        "optimizer",
        "gradients",
        "copies",
        "activations",
        "workspace",
        "other",
        "room",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("total", justify="right", style="bold", no_wrap=True)
    if budget is not None:
        table.add_column("used", justify="right", no_wrap=True)
    for number, memory in enumerate(plan.prediction.memory):
        counts = (
            memory.parameter_bytes,
            memory.optimizer_bytes,
            memory.gradient_bytes,
            memory.copied_bytes,
            memory.residual_bytes,
            memory.workspace_bytes,
            memory.batch_bytes + memory.state_bytes,
            memory.padded_bytes + memory.reserved_bytes,
            memory.peak_bytes,
        )
        cells = [format_bytes(count) for count in counts]
        table.add_row(str(number), *cells, *([] if budget is None else [share(memory.peak_bytes, budget)]))
    of_budget = "" if budget is None else f" of {format_bytes(budget)}"
    title = f"Predicted memory per device{of_budget}: {plan_title(plan)}"
    return Group(titled(title, table), Text(_ROOM))


def plan_facts(plan: Plan) -> Group:
    """Where a plan comes from."""
    rows = [
        ("model", f"{plan.model} ({plan.model_fingerprint or 'any model with as many layers'})"),
        ("executor", plan.executor),
        *([("gradients summed in", plan.gradient_sum_dtype)] if plan.gradient_sum_dtype else []),
        ("schedule", plan.schedule.value),
        *([("stages lie along", ", ".join(plan.pipeline_axes))] if plan.pipeline_axes else []),
        ("batch split over", ", ".join(plan.batch_axes) or "no axis"),
        *((name, version) for name, version in plan.software.items()),
    ]
    return facts(f"Provenance: {plan_title(plan)}", rows)


def _group_cells(plan: Plan, group: LayerGroup, model: ModelSpec | None) -> list[str]:
    strategy = group.strategy
    layers = _span(group.start, group.stop)
    sequence = "–"
    if strategy.sp_kind is not SequenceParallel.NONE:
        sequence = f"{strategy.sp_kind.value} {_degree(plan, strategy.sp)}"
    return [
        layers,
        _group_name(group, model),
        "repeated" if strategy.short() == "replicated" else _degree(plan, strategy.dp),
        _degree(plan, strategy.tp),
        sequence,
        _ZERO_STAGES[strategy.zero],
        "–" if strategy.remat is Remat.NONE else strategy.remat.value,
    ]


def _span(start: int, stop: int) -> str:
    return str(start) if stop - start == 1 else f"{start}–{stop - 1}"


def _fits_a_line(plan: Plan) -> bool:
    """Whether the timeline of the schedule is readable as text."""
    blocks = plan.num_microbatches * len(plan.stages) // plan.pipeline_degree
    return plan.pipeline_degree <= _MOST_GROUPS and blocks <= _MOST_BLOCKS


def _group_name(group: LayerGroup, model: ModelSpec | None) -> str:
    if model is None or group.stop > len(model.layers):
        return "layer" if group.stop - group.start == 1 else f"{group.stop - group.start} layers"
    names = [model.kinds[layer.kind].name for layer in model.layers[group.start : group.stop]]
    runs = [(name, len(list(run))) for name, run in itertools.groupby(names)]
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in runs)


def _degree(plan: Plan, axes: tuple[str, ...]) -> str:
    sizes = {axis.name: axis.size for axis in plan.mesh}
    degree = 1
    for axis in axes:
        degree *= sizes.get(axis, 1)
    return f"{degree} ({','.join(axes)})" if axes else "–"


def _time_parts(time: TimeBreakdown) -> list[tuple[str, float]]:
    parts = [
        ("computation", time.compute_s),
        ("communication in layers", time.communication_s),
        ("gradient synchronisation", time.synchronisation_s),
        ("optimizer update", time.update_s),
    ]
    return parts + ([("pipeline bubble", time.bubble_s)] if time.bubble_s else [])


def _memory_parts(memory: MemoryBreakdown) -> list[tuple[str, int]]:
    return [
        ("parameters", memory.parameter_bytes),
        ("optimizer state", memory.optimizer_bytes),
        ("gradients", memory.gradient_bytes),
        *([("copies of parameters", memory.copied_bytes)] if memory.copied_bytes else []),
        ("activations kept for backward", memory.residual_bytes),
        ("workspace of the largest layer", memory.workspace_bytes),
        ("batch", memory.batch_bytes),
        ("model state", memory.state_bytes),
    ]
