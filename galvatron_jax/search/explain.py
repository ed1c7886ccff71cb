"""What a search found, and why, as data and as plain text."""

from __future__ import annotations

from dataclasses import dataclass

from galvatron_jax.spec.plan import MemoryBreakdown, Plan, Prediction, TimeBreakdown
from galvatron_jax.units import format_bytes, format_seconds

_TIME_PARTS = {
    "compute_s": "computation",
    "communication_s": "communication",
    "synchronisation_s": "gradient synchronisation",
    "update_s": "optimizer update",
    "bubble_s": "pipeline bubble",
}
_PROVEN = 1e-9
"""Relative gap that counts as none: rounding of sums in another order."""
_MEMORY_PARTS = {
    "parameter_bytes": "parameters",
    "optimizer_bytes": "optimizer state",
    "gradient_bytes": "gradients",
    "copied_bytes": "copies of parameters",
    "residual_bytes": "activations",
    "workspace_bytes": "workspace",
    "batch_bytes": "batch",
    "state_bytes": "model state",
    "padded_bytes": "room for longer groups' state",
    "reserved_bytes": "room for other groups' work",
}


@dataclass(frozen=True)
class Row:
    """One line of a breakdown."""

    name: str
    value: float
    """Seconds or bytes."""
    share: float
    """Of the whole, 0 to 1."""


@dataclass(frozen=True)
class RunnerUp:
    """The best plan of another family."""

    family: str
    plan: Plan
    fits: bool
    """Whether it fits the budget; otherwise it is the family's plan with the least memory."""

    @property
    def prediction(self) -> Prediction:
        """What it is expected to cost."""
        assert self.plan.prediction is not None
        return self.plan.prediction

    def reason(self, winner: Prediction) -> str:
        """Why it lost."""
        mine = self.prediction
        if not self.fits:
            budget = mine.memory_budget_bytes or 0
            need = mine.peak_bytes
            return f"needs {format_bytes(need)}, {format_bytes(need - budget)} more than there is"
        slower = mine.time.step_s / winner.time.step_s - 1
        differences = {
            name: getattr(mine.time, part) - getattr(winner.time, part) for part, name in _TIME_PARTS.items()
        }
        part = max(differences, key=lambda name: differences[name])
        if differences[part] <= 0:
            return "as fast"
        return f"{slower:.1%} slower: {part} takes {format_seconds(differences[part])} more"


@dataclass(frozen=True)
class SearchStatistics:
    """What the search did."""

    seconds: float
    problems: int
    """Combinations of mesh, micro-batches and batch layout."""
    solved: int
    """Those that their lower bound did not settle."""
    planned_layers: int
    """(layer kind, strategy, micro-batch) planned."""
    options: int
    """Options priced."""
    estimated_options: int
    """Options whose computation time was derived or scaled, not measured."""
    labels: int
    pruned: tuple[tuple[str, int], ...]
    """How often each rule removed something."""
    bound_s: float
    """No plan of the space takes less; the winner's own seconds where that is proven."""
    step_s: float
    """Seconds of the winner's step."""
    unlimited_s: float
    """Seconds of a step of one stage with unlimited memory."""
    spare_bytes: int = 0
    """Of the budget, what the winner's groups were not given for their own stages; see `PipelineProblem`."""

    @property
    def gap(self) -> float:
        """How much faster a plan could be at most, relative to the winner; 0 where it is the proven optimum."""
        return 1 - self.bound_s / self.step_s if self.step_s else 0.0

    @property
    def proven(self) -> bool:
        """Whether nothing better exists in the search space."""
        return self.gap <= _PROVEN


@dataclass(frozen=True)
class SearchResult:
    """The winner, the runners-up and how they were found."""

    plan: Plan
    cluster: str
    runners_up: tuple[RunnerUp, ...]
    statistics: SearchStatistics

    @property
    def prediction(self) -> Prediction:
        """What the plan is expected to cost."""
        assert self.plan.prediction is not None
        return self.plan.prediction

    @property
    def examples_per_s(self) -> float:
        """Examples of the global batch per second."""
        return self.plan.global_batch / self.prediction.time.step_s

    @property
    def bound_by(self) -> str:
        """The largest part of a step's time."""
        return time_rows(self.prediction.time)[0].name

    def explain(self) -> str:
        """The plan and why, as plain text."""
        return "\n".join(_lines(self))


def time_rows(time: TimeBreakdown) -> tuple[Row, ...]:
    """Where a step's time goes, the largest part first; what takes none is left out."""
    return _rows({name: getattr(time, part) for part, name in _TIME_PARTS.items()}, time.step_s)


def memory_rows(memory: MemoryBreakdown) -> tuple[Row, ...]:
    """Where a device's memory goes, the largest part first; what takes none is left out."""
    return _rows({name: getattr(memory, part) for part, name in _MEMORY_PARTS.items()}, memory.peak_bytes)


def _rows(parts: dict[str, float], total: float) -> tuple[Row, ...]:
    rows = [Row(name, value, value / total if total else 0.0) for name, value in parts.items() if value]
    return tuple(sorted(rows, key=lambda row: -row.value)) or (Row("nothing", 0.0, 0.0),)


def describe_groups(plan: Plan) -> tuple[str, ...]:
    """One line per group of layers: its stage where there are several, which layers, and their strategy."""
    last, several = len(plan.strategies) - 1, len(plan.stages) > 1
    return tuple(
        (f"stage {number}, " if several else "")
        + f"layers {_span(group.start, group.stop - 1, last)}: {group.strategy.short()}"
        for number, stage in enumerate(plan.stages)
        for group in stage.groups
    )


def _stage_lines(plan: Plan, prediction: Prediction) -> list[str]:
    """Time and memory of every stage."""
    if len(plan.stages) == 1:
        return []
    lines = ["Stages: forward and backward of a micro-batch, once a step; memory of the stage's group"]
    for number, stage in enumerate(prediction.stages):
        memory = prediction.memory[number % len(prediction.memory)]
        lines.append(
            f"  {number:>3}  {format_seconds(stage.forward_s):>10}  {format_seconds(stage.backward_s):>10}  "
            f"{format_seconds(stage.once_s):>10}  {format_bytes(memory.total_bytes):>10}"
        )
    return lines


def _span(start: int, stop: int, last: int) -> str:
    ends = {0: "0 (embedding)", last: f"{last} (head)"} if last else {}
    names = [ends.get(index, str(index)) for index in (start, stop)]
    return names[0] if start == stop else f"{names[0]} to {names[1]}"


def _lines(result: SearchResult) -> list[str]:
    plan, prediction, statistics = result.plan, result.prediction, result.statistics
    mesh = " × ".join(f"{axis.name}={axis.size} ({axis.level})" for axis in plan.mesh) or "one device"
    lines = [
        f"Plan of {plan.model} for {plan.num_devices} devices of {result.cluster}, mesh {mesh}",
        f"  global batch {plan.global_batch} in {plan.num_microbatches} micro-batch(es), "
        f"batch split over {', '.join(plan.batch_axes) or 'no axis'}",
    ]
    if len(plan.stages) > 1:
        lines.append(
            f"  {len(plan.stages)} stages over {plan.pipeline_degree} groups of devices "
            f"({', '.join(plan.pipeline_axes)}), schedule {plan.schedule}"
        )
    lines += [f"  {line}" for line in describe_groups(plan)]
    per_second = plan.global_batch / prediction.time.step_s if prediction.time.step_s else float("inf")
    lines.append(
        f"Predicted step: {format_seconds(prediction.time.step_s)} ({per_second:.1f} examples/s, "
        f"{prediction.provenance} times), bound by {result.bound_by}"
    )
    lines += [f"  {row.share:6.1%}  {format_seconds(row.value):>10}  {row.name}" for row in time_rows(prediction.time)]
    lines += _stage_lines(plan, prediction)
    lines += _memory_lines(prediction, statistics)
    if result.runners_up:
        lines.append("Runners-up")
    lines += [
        f"  {other.family}: {format_seconds(other.prediction.time.step_s)}, "
        f"{format_bytes(other.prediction.peak_bytes)}; {other.reason(prediction)}"
        for other in result.runners_up
    ]
    proof = "the optimum of the cost model"
    if not statistics.proven:
        proof = f"the best found, not proven; no plan is more than {statistics.gap:.1%} faster"
    lines.append(
        f"Searched {statistics.problems} combinations, {statistics.options} options in "
        f"{format_seconds(statistics.seconds)}: {proof}"
    )
    if statistics.pruned:
        lines.append("  pruned: " + ", ".join(f"{rule} {count}" for rule, count in statistics.pruned))
    return lines


def _memory_lines(prediction: Prediction, statistics: SearchStatistics) -> list[str]:
    memory, budget = prediction.largest, prediction.memory_budget_bytes
    lines = [f"Predicted memory: {format_bytes(memory.peak_bytes)} per device"]
    if budget is not None:
        lines[0] += f" of {format_bytes(budget)}"
    lines += [f"  {row.share:6.1%}  {format_bytes(row.value):>10}  {row.name}" for row in memory_rows(memory)]
    gain = 1 - statistics.unlimited_s / prediction.time.step_s if prediction.time.step_s else 0.0
    if gain > 1e-9:
        lines.append(
            f"  Memory binds: with more of it a step could take {format_seconds(statistics.unlimited_s)} "
            f"({gain:.1%} less)"
        )
    else:
        lines.append("  Memory does not bind: more of it would not make the step faster")
    return lines
