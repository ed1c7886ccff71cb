"""From a solution to a `Plan`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from galvatron_jax.cost.model import CostModel
from galvatron_jax.cost.pipeline import predict_pipeline
from galvatron_jax.cost.step import predict
from galvatron_jax.search.chain import Chain, Solution, evaluate
from galvatron_jax.search.pipeline_problems import PipelineBest
from galvatron_jax.search.problems import Best
from galvatron_jax.spec.plan import LayerGroup, Plan, Stage
from galvatron_jax.spec.strategy import LayerStrategy


def make_plan(best: Best, *, memory_bytes: int | None) -> Plan:
    """The plan of a solution, with its prediction."""
    problem = best.problem
    strategies = problem.strategies(tidy(problem.chain, best.solution))
    costs, batching = _exact(problem.costs), problem.batching
    return Plan(
        model=costs.model.name,
        model_fingerprint=costs.model.fingerprint,
        mesh=costs.table.mesh,
        global_batch=batching.global_batch,
        num_microbatches=batching.num_microbatches,
        stages=(Stage(groups=group(strategies)),),
        batch_axes=batching.axes,
        gradient_sum_dtype=costs.table.gradient_sum_dtype,
        prediction=predict(costs, strategies, batching, memory_bytes=memory_bytes),
    )


def make_pipeline_plan(best: PipelineBest, *, memory_bytes: int | None) -> Plan:
    """The plan of a pipeline's solution, with its prediction."""
    problem, starts = best.problem, best.solution.starts
    strategies = problem.strategies(best.solution)
    costs, batching, pipelining = _exact(problem.costs), problem.batching, problem.pipelining
    stops = (*starts[1:], len(strategies))
    return Plan(
        model=costs.model.name,
        model_fingerprint=costs.model.fingerprint,
        mesh=(*pipelining.axes, *costs.table.mesh),
        global_batch=batching.global_batch,
        num_microbatches=batching.num_microbatches,
        schedule=pipelining.schedule,
        stages=tuple(
            Stage(groups=group(strategies[start:stop], first=start)) for start, stop in zip(starts, stops, strict=True)
        ),
        pipeline_axes=tuple(axis.name for axis in pipelining.axes),
        batch_axes=batching.axes,
        gradient_sum_dtype=costs.table.gradient_sum_dtype,
        prediction=predict_pipeline(costs, pipelining, starts, strategies, batching, memory_bytes=memory_bytes),
    )


def _exact(costs: CostModel) -> CostModel:
    """The same cost model without interpolation between micro-batches: what `price_plan` uses."""
    return replace(costs, table=costs.table.exact())


def group(strategies: Sequence[LayerStrategy], *, first: int = 0) -> tuple[LayerGroup, ...]:
    """Consecutive layers with one strategy, as groups; the first layer has the number `first`."""
    groups, start = [], first
    for strategy, run in itertools.groupby(strategies):
        stop = start + len(list(run))
        groups.append(LayerGroup(start=start, stop=stop, strategy=strategy))
        start = stop
    return tuple(groups)


def tidy(chain: Chain, solution: Solution) -> Solution:
    """Reorders choices within runs of like layers, where that costs nothing: fewer groups compile faster."""
    options, start = list(solution.options), 0
    for _, run in itertools.groupby(chain.layers, key=id):
        stop = start + len(list(run))
        trial = [*options[:start], *sorted(options[start:stop]), *options[stop:]]
        if evaluate(chain, tuple(trial)).seconds <= solution.seconds * (1 + 1e-12):
            options = trial
        else:
            options[start:stop] = _tidy_classes(chain, options[start:stop], start)
        start = stop
    return evaluate(chain, tuple(options))


def _tidy_classes(chain: Chain, options: list[int], start: int) -> list[int]:
    """Sorts stretches of one boundary class: no move changes."""
    boundary = chain.layers[start].boundary
    return [option for _, run in itertools.groupby(options, key=lambda o: int(boundary[o])) for option in sorted(run)]
