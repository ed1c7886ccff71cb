"""`search`: the fastest plan of a model on a cluster that fits a memory budget."""

from __future__ import annotations

import time
from collections.abc import Iterable

from galvatron_jax.cost.memory import OptimizerMemory
from galvatron_jax.cost.model import CostModel
from galvatron_jax.cost.planner import Planner, default_planner
from galvatron_jax.errors import InputError
from galvatron_jax.search.assemble import make_plan
from galvatron_jax.search.explain import RunnerUp, SearchResult, SearchStatistics
from galvatron_jax.search.families import FAMILIES
from galvatron_jax.search.infeasible import nothing_fits
from galvatron_jax.search.problems import Effort, Problem, Progress, build_problems, fastest, least_memory
from galvatron_jax.search.space import SearchSpace, meshes_for
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import MeshAxis, Plan
from galvatron_jax.spec.profile import Profile

_DEFAULT_SPACE = SearchSpace()


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
    started = time.monotonic()
    deadline = None if time_limit_s is None else started + time_limit_s
    budget = cluster.device.memory_bytes if memory_bytes is None else memory_bytes
    effort = Effort()
    models = [
        CostModel.build(
            model,
            cluster=cluster,
            mesh=mesh,
            profile=profile,
            optimizer=optimizer,
            planner=planner or default_planner(),
        )
        for mesh in (meshes_for(cluster) if meshes is None else meshes)
    ]
    problems = build_problems(models, global_batch=global_batch, space=space, effort=effort, progress=progress)
    if not problems:
        raise InputError(
            f"No strategies of {model.name!r} agree on the layout of its shared parameters "
            f"({', '.join(models[0].wiring.tied) or 'none'}). Allow more strategies in the search space."
        )
    best = fastest(problems, memory_bytes=budget, effort=effort, deadline=deadline)
    if best is None:
        raise nothing_fits(least_memory(problems), memory_bytes=budget, space=space)
    plan = make_plan(best, memory_bytes=budget)
    statistics = _statistics(effort, problems, time.monotonic() - started)
    others = _runners_up(problems, plan, memory_bytes=budget) if runners_up else ()
    return SearchResult(plan, cluster.name, others, statistics)


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
        if not any(family.allows(s) for p in problems for layer in p.chain.layers for s in layer.strategies):
            continue
        restricted = [problem.restricted(family.allows) for problem in problems]
        restricted = [problem for problem in restricted if problem.bound_s < float("inf")]
        if not restricted:
            continue
        restricted.sort(key=lambda problem: problem.bound_s)
        best = fastest(restricted, memory_bytes=memory_bytes, exact=False)
        plan = make_plan(best or least_memory(restricted), memory_bytes=memory_bytes)
        if plan.strategies != winner.strategies and all(plan.strategies != other.plan.strategies for other in found):
            found.append(RunnerUp(family.name, plan, fits=best is not None))
    return tuple(sorted(found, key=_rank))


def _rank(runner_up: RunnerUp) -> tuple[bool, float]:
    return not runner_up.fits, runner_up.prediction.time.step_s
