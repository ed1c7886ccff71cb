"""`search`: the fastest plan of a model on a cluster that fits a memory budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from galvatron_jax.cost.memory import OptimizerMemory
from galvatron_jax.cost.model import CostModel
from galvatron_jax.cost.planner import Planner, default_planner
from galvatron_jax.errors import InfeasibleError, InputError
from galvatron_jax.search import shortlist, stand_ins
from galvatron_jax.search.assemble import make_pipeline_plan, make_plan
from galvatron_jax.search.collection import collection_paused
from galvatron_jax.search.explain import RunnerUp, SearchResult, SearchStatistics
from galvatron_jax.search.families import FAMILIES, Family
from galvatron_jax.search.infeasible import nothing_fits
from galvatron_jax.search.pipeline_problems import Layout, PipelineBest, layouts_of
from galvatron_jax.search.pipelines import PipelineSearch, least_pipeline
from galvatron_jax.search.problems import Best, Chains, Effort, Problem, Progress, build_problems, fastest, least_memory
from galvatron_jax.search.space import Rule, SearchSpace, meshes_for
from galvatron_jax.search.tables import TableBuilder
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import MeshAxis, Plan
from galvatron_jax.spec.plan_checks import check_gradient_sums
from galvatron_jax.spec.profile import Profile

_DEFAULT_SPACE = SearchSpace()
_LEADERS = 6
"""Problems of one stage that are looked at before pipelines are, the most promising."""
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
        InputError: when the batch, the number of micro-batches or the type of sums is wrong.
        InfeasibleError: when no plan fits; it names the nearest one and what would fit.
    """
    check_gradient_sums(space.gradient_sum_dtype, model)
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
    with collection_paused():
        return _search(request, runners_up=runners_up)


def _search(request: _Request, *, runners_up: bool) -> SearchResult:
    space, started = request.space, time.monotonic()
    found = _attempt(request)
    if not found.agrees:
        # Planned together, layers cost something else than each planned alone: plan each alone.
        exact = replace(space, disabled_rules=space.disabled_rules | {Rule.AFFINE_IN_MICROBATCH})
        request = replace(request, space=exact)
        found = _attempt(request)
    if found.best is None:
        raise nothing_fits(found.nearest, found.plan, memory_bytes=request.budget_bytes, space=space)
    statistics = _statistics(found, time.monotonic() - started)
    others: tuple[RunnerUp, ...] = ()
    if runners_up:
        others = _runners_up(found, request.one_stage.problems(Effort()), memory_bytes=request.budget_bytes)
    return SearchResult(found.plan, request.cluster.name, others, statistics)


def search_batches(
    model: ModelSpec,
    cluster: ClusterSpec,
    *,
    global_batches: Iterable[int],
    optimizer: OptimizerMemory,
    **options: Any,
) -> SearchResult:
    """The plan with the most examples per second over several global batches.

    Args:
        model: the model.
        cluster: its devices are all used.
        global_batches: examples of a step, each tried.
        optimizer: its state per parameter.
        options: the other arguments of `search`.

    Raises:
        InputError: when there is no batch, or one is wrong.
        InfeasibleError: when no plan fits at any batch; that of the smallest one.
    """
    batches = sorted(set(global_batches))
    if not batches:
        raise InputError("There is no global batch to try; give at least one.")
    best: SearchResult | None = None
    failure: InfeasibleError | None = None
    for batch in batches:
        try:
            found = search(model, cluster, global_batch=batch, optimizer=optimizer, **options)
        except InfeasibleError as error:
            failure = failure or error
            continue
        if best is None or found.examples_per_s > best.examples_per_s:
            best = found
    if best is None:
        assert failure is not None
        raise failure
    return best


@dataclass(frozen=True, eq=False)
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

    @cached_property
    def one_stage(self) -> _OneStage:
        """Plans of one stage."""
        return _OneStage(self)


@dataclass(eq=False)
class _OneStage:
    """Plans of one stage."""

    request: _Request
    _problems: list[Problem] | None = None

    @cached_property
    def models(self) -> list[CostModel]:
        """One per mesh; none where pipelines alone are asked for."""
        degrees = self.request.space.pipeline_degrees
        if degrees is not None and 1 not in degrees:
            return []
        return [_costs(self.request, mesh, ()) for mesh in self.request.meshes]

    def chains(self, effort: Effort) -> tuple[Chains, float]:
        """What to solve, and seconds of the fastest plan with unlimited memory."""
        request, found = self.request, None
        if self.models and stand_ins.on_demand(request.space, self.models):
            found = shortlist.worthwhile_chains(
                self.models,
                global_batch=request.global_batch,
                memory_bytes=request.budget_bytes,
                space=request.space,
                effort=effort,
                deadline=request.deadline,
                progress=request.progress,
            )
        if found is None:
            problems = self.problems(effort)
            unlimited = min([problem.bound_s for problem in problems], default=0.0)
            found = Chains(problems, request.budget_bytes, effort, request.deadline), unlimited
        return found

    def problems(self, effort: Effort) -> list[Problem]:
        """All of them."""
        if self._problems is None:
            self._problems = self._build(effort) if self.models else []
        return self._problems

    def _build(self, effort: Effort) -> list[Problem]:
        request = self.request
        problems = build_problems(
            self.models,
            global_batch=request.global_batch,
            memory_bytes=request.budget_bytes,
            space=request.space,
            effort=effort,
            progress=request.progress,
        )
        if not problems:
            raise InputError(
                f"No strategies of {request.model.name!r} agree on the layout of its shared parameters "
                f"({', '.join(self.models[0].wiring.tied) or 'none'}). Allow more strategies in the search space."
            )
        return problems


@dataclass(frozen=True, eq=False)
class _Attempt:
    best: Best | PipelineBest | None
    """The fastest that fits."""
    nearest: Best | PipelineBest
    """The same, or where nothing fits what needs least memory."""
    plan: Plan
    others: tuple[PipelineBest, ...]
    """Pipelines that were the best for a while."""
    unlimited_s: float
    """Seconds of a step with unlimited memory, at least."""
    effort: Effort

    @property
    def agrees(self) -> bool:
        """Whether the plan, planned anew and priced as a whole, costs what the search thought."""
        assert self.plan.prediction is not None
        if self.best is None:
            return True
        step, memory = self.plan.prediction.time.step_s, [m.total_bytes for m in self.plan.prediction.memory]
        thought, seconds = _thought_bytes(self.best), self.best.solution.seconds
        return memory == thought and abs(step - seconds) <= _ROUNDING * step


def _thought_bytes(best: Best | PipelineBest) -> list[int]:
    """Per group of devices, what the search counted."""
    if isinstance(best, Best):
        return [best.solution.bytes + best.problem.fixed_bytes]
    return best.problem.own_bytes(best.solution)


def _plan_of(best: Best | PipelineBest, *, memory_bytes: int) -> Plan:
    if isinstance(best, Best):
        return make_plan(best, memory_bytes=memory_bytes)
    return make_pipeline_plan(best, memory_bytes=memory_bytes)


def _attempt(request: _Request) -> _Attempt:
    """Builds and solves all problems.

    Plans of one stage and pipelines bound each other: some of one stage, drafts of pipelines, the rest of both.
    """
    effort, budget = Effort(), request.budget_bytes
    space = request.space
    chains, unlimited = request.one_stage.chains(effort)
    chains.relax(leaders=_LEADERS)
    layouts = layouts_of(request.meshes, space)
    models = [(layout, _costs(request, layout.stage_axes, layout.pipeline_axes)) for layout in layouts]
    pipelines = PipelineSearch(
        request.global_batch, budget, space, effort, deadline=request.deadline, progress=request.progress
    )
    pipelines.draft(models, chains.upper_s)
    chains.relax(upper_s=pipelines.upper_s)
    others = pipelines.close(chains.upper_s)
    upper = others[-1].solution.seconds if others else math.inf
    chains.close(upper_s=upper)
    best: Best | PipelineBest | None = others[-1] if others and upper < chains.upper_s else chains.best
    nearest = best
    if nearest is None:
        nearest = least_memory(chains.problems) if chains.problems else _least_pipeline(request, models)
    plan = _plan_of(nearest, memory_bytes=budget)
    return _Attempt(best, nearest, plan, tuple(one for one in others if one is not best), unlimited, effort)


def _least_pipeline(request: _Request, models: list[tuple[Layout, CostModel]]) -> PipelineBest:
    if not models:
        raise InputError(
            f"No pipeline degree of {request.space.pipeline_degrees} can be made of "
            f"{request.cluster.num_devices} devices; allow others, or 1."
        )
    return least_pipeline(
        models, global_batch=request.global_batch, memory_bytes=request.budget_bytes, space=request.space
    )


def _costs(request: _Request, mesh: tuple[MeshAxis, ...], pipeline_axes: tuple[MeshAxis, ...]) -> CostModel:
    counts = request.space.microbatch_counts(request.global_batch)
    affine = request.space.applies(Rule.AFFINE_IN_MICROBATCH)
    return CostModel.build(
        request.model,
        cluster=request.cluster,
        mesh=mesh,
        profile=request.profile,
        optimizer=request.optimizer,
        planner=request.planner,
        pipeline_axes=pipeline_axes,
        microbatches=tuple(sorted(request.global_batch // count for count in counts)) if affine else (),
        gradient_sum_dtype=request.space.gradient_sum_dtype,
    )


def _statistics(found: _Attempt, seconds: float) -> SearchStatistics:
    effort = found.effort
    assert found.best is not None
    return SearchStatistics(
        seconds=seconds,
        problems=effort.problems,
        solved=effort.solved,
        planned_layers=effort.planned,
        options=effort.priced,
        estimated_options=effort.estimated,
        labels=effort.labels,
        pruned=tuple(sorted((str(rule), count) for rule, count in effort.pruned.items())),
        bound_s=min(effort.open_s, found.best.solution.seconds),
        step_s=found.best.solution.seconds,
        unlimited_s=found.unlimited_s,
        spare_bytes=found.best.problem.spare_bytes if isinstance(found.best, PipelineBest) else 0,
    )


def _runners_up(found: _Attempt, problems: list[Problem], *, memory_bytes: int) -> tuple[RunnerUp, ...]:
    """The best plan of every family but the winner's own; where none fits, the family's smallest."""
    winner, others = found.plan, []
    for family in FAMILIES:
        if len(winner.stages) == 1 and _is_of(family, winner, problems[0].builder.tables):
            continue
        if not any(problem.builder.tables.offers(family.allows) for problem in problems):
            continue
        chains = [problem.restricted(family.allows) for problem in problems]
        restricted = sorted((chain for chain in chains if chain is not None), key=lambda problem: problem.bound_s)
        if not restricted:
            continue
        best = fastest(restricted, memory_bytes=memory_bytes)
        plan = make_plan(best or least_memory(restricted), memory_bytes=memory_bytes)
        if _differs(plan, winner, others):
            others.append(RunnerUp(family.name, plan, fits=best is not None))
    for best in reversed(found.others):
        plan = make_pipeline_plan(best, memory_bytes=memory_bytes)
        name = f"{plan.schedule} over {plan.pipeline_degree} groups"
        if _differs(plan, winner, others) and all(name != other.family for other in others):
            others.append(RunnerUp(name, plan, fits=True))
    return tuple(sorted(others, key=_rank))


def _is_of(family: Family, plan: Plan, tables: TableBuilder) -> bool:
    kinds = [layer.kind for layer in tables.costs.model.layers]
    allows = {kind: tables.with_equals(kind, family.allows) for kind in set(kinds)}
    return all(allows[kind](strategy) for kind, strategy in zip(kinds, plan.strategies, strict=True))


def _differs(plan: Plan, winner: Plan, others: list[RunnerUp]) -> bool:
    known = [winner, *(other.plan for other in others)]
    return all((plan.strategies, plan.stages) != (other.strategies, other.stages) for other in known)


def _rank(runner_up: RunnerUp) -> tuple[bool, float]:
    return not runner_up.fits, runner_up.prediction.time.step_s
