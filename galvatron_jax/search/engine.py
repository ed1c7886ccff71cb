"""`search`: the fastest plan of a model on a cluster that fits a memory budget."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from galvatron_jax.cost.memory import OptimizerMemory
from galvatron_jax.cost.model import CostModel
from galvatron_jax.cost.planner import Planner, default_planner
from galvatron_jax.errors import InputError
from galvatron_jax.search.assemble import make_plan
from galvatron_jax.search.explain import RunnerUp, SearchResult, SearchStatistics
from galvatron_jax.search.families import FAMILIES
from galvatron_jax.search.infeasible import nothing_fits
from galvatron_jax.search.problems import Best, Effort, Problem, Progress, build_problems, fastest, least_memory
from galvatron_jax.search.space import Rule, SearchSpace, meshes_for
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import MeshAxis, Plan
from galvatron_jax.spec.profile import Profile

_DEFAULT_SPACE = SearchSpace()
_ROUNDING = 1e-9
"""Relative difference of seconds summed in another order."""


def search(
    model: ModelSpec,
    cluster: ClusterSpec,
    *,
    profile: Profile | None = None,
    global_batch: int,
    memory_bytes: int | None = None,
    optimizer: OptimizerMemory,
    space: SearchSpace = _DEFAULT_SPACE,
    meshes: Iterable[tuple[MeshAxis, ...]] | None = None,
    time_limit_s: float | None = None,
    runners_up: bool = True,
    progress: Progress | None = None,
    planner: Planner | None = None,
) -> SearchResult:
    """Finds the fastest plan, by the cost model, that fits in each device's memory.

    Args:
        model: the model.
        cluster: its devices are all used.
        profile: measurements on that cluster; None derives times from the cluster's figures.
        global_batch: examples of a step.
        memory_bytes: budget per device; None takes the device's memory.
        optimizer: its state per parameter.
        space: which plans count.
        meshes: meshes to try; None tries every order of the cluster's prime factors.
        time_limit_s: after which the best plan so far is returned, marked as not proven.
        runners_up: whether to look for the best plans of other families too.
        progress: told what is done.
        planner: for tests; the partitioner otherwise.

    Raises:
        InputError: when the batch or the number of micro-batches is wrong.
        InfeasibleError: when no plan fits; it names the nearest one and what would fit.
    """
    request = _Request(
        model=model,
        cluster=cluster,
        profile=profile,
        global_batch=global_batch,
        budget_bytes=cluster.device.memory_bytes if memory_bytes is None else memory_bytes,
        optimizer=optimizer,
        space=space,
        meshes=tuple(meshes_for(cluster) if meshes is None else meshes),
        deadline=None if time_limit_s is None else time.monotonic() + time_limit_s,
        progress=progress,
        planner=planner or default_planner(),
    )
    started = time.monotonic()
    found = _attempt(request)
    if not found.agrees:
        # The line through planned micro-batches misled: plan every one.
        exact = replace(space, disabled_rules=space.disabled_rules | {Rule.AFFINE_IN_MICROBATCH})
        found = _attempt(replace(request, space=exact))
    if not found.fits:
        raise nothing_fits(found.best, found.plan, memory_bytes=request.budget_bytes, space=space)
    statistics = _statistics(found.effort, found.problems, time.monotonic() - started)
    others = _runners_up(found.problems, found.plan, memory_bytes=request.budget_bytes) if runners_up else ()
    return SearchResult(found.plan, cluster.name, others, statistics)


@dataclass(frozen=True)
class _Request:
    model: ModelSpec
    cluster: ClusterSpec
    profile: Profile | None
    global_batch: int
    budget_bytes: int
    optimizer: OptimizerMemory
    space: SearchSpace
    meshes: tuple[tuple[MeshAxis, ...], ...]
    deadline: float | None
    progress: Progress | None
    planner: Planner


@dataclass(frozen=True, eq=False)
class _Attempt:
    problems: list[Problem]
    best: Best
    fits: bool
    """Whether `best` fits the budget; otherwise it needs least memory."""
    plan: Plan
    effort: Effort

    @property
    def agrees(self) -> bool:
        """Whether the plan, planned anew and priced as a whole, costs what the search thought."""
        assert self.plan.prediction is not None
        step, memory = self.plan.prediction.time.step_s, self.plan.prediction.memory[0].total_bytes
        thought = self.best.solution.bytes + self.best.problem.fixed_bytes
        return memory == thought and abs(step - self.best.solution.seconds) <= _ROUNDING * step


def _attempt(request: _Request) -> _Attempt:
    """Builds and solves all problems."""
    counts = request.space.microbatch_counts(request.global_batch)
    affine = request.space.applies(Rule.AFFINE_IN_MICROBATCH)
    microbatches = tuple(sorted(request.global_batch // count for count in counts)) if affine else ()
    models = [
        CostModel.build(
            request.model,
            cluster=request.cluster,
            mesh=mesh,
            profile=request.profile,
            optimizer=request.optimizer,
            planner=request.planner,
            microbatches=microbatches,
        )
        for mesh in request.meshes
    ]
    effort = Effort()
    problems = build_problems(
        models,
        global_batch=request.global_batch,
        memory_bytes=request.budget_bytes,
        space=request.space,
        effort=effort,
        progress=request.progress,
    )
    if not problems:
        raise InputError(
            f"No strategies of {request.model.name!r} agree on the layout of its shared parameters "
            f"({', '.join(models[0].wiring.tied) or 'none'}). Allow more strategies in the search space."
        )
    best = fastest(problems, memory_bytes=request.budget_bytes, effort=effort, deadline=request.deadline)
    nearest = best or least_memory(problems)
    plan = make_plan(nearest, memory_bytes=request.budget_bytes)
    return _Attempt(problems, nearest, best is not None, plan, effort)


def _statistics(effort: Effort, problems: list[Problem], seconds: float) -> SearchStatistics:
    return SearchStatistics(
        seconds=seconds,
        problems=effort.problems,
        solved=effort.solved,
        planned_layers=effort.planned,
        options=effort.priced,
        estimated_options=effort.estimated,
        labels=effort.labels,
        pruned=tuple(sorted((str(rule), count) for rule, count in effort.pruned.items())),
        proven=effort.proven,
        unlimited_s=problems[0].bound_s,
    )


def _runners_up(problems: list[Problem], winner: Plan, *, memory_bytes: int) -> tuple[RunnerUp, ...]:
    """The best plan of every family but the winner's own; where none fits, the family's smallest."""
    found: list[RunnerUp] = []
    for family in FAMILIES:
        if all(family.allows(strategy) for strategy in winner.strategies):
            continue
        if not any(problem.builder.tables.offers(family.allows) for problem in problems):
            continue
        chains = [problem.restricted(family.allows) for problem in problems]
        restricted = sorted((chain for chain in chains if chain is not None), key=lambda problem: problem.bound_s)
        if not restricted:
            continue
        best = fastest(restricted, memory_bytes=memory_bytes, exact=False)
        plan = make_plan(best or least_memory(restricted), memory_bytes=memory_bytes)
        if plan.strategies != winner.strategies and all(plan.strategies != other.plan.strategies for other in found):
            found.append(RunnerUp(family.name, plan, fits=best is not None))
    return tuple(sorted(found, key=_rank))


def _rank(runner_up: RunnerUp) -> tuple[bool, float]:
    return not runner_up.fits, runner_up.prediction.time.step_s
