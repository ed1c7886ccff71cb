"""All the chains of one search: every mesh, number of micro-batches and layout of the batch; and the best of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.step import fixed_bytes
from galvatron_jax.search.chain import Chain, Solution
from galvatron_jax.search.layers import Outcome, fastest_seconds, smallest, solve
from galvatron_jax.search.options import ChainBuilder
from galvatron_jax.search.space import SearchSpace, batch_axes_for
from galvatron_jax.spec.strategy import LayerStrategy

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is being done."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One chain, with what it was made from."""

    costs: CostModel
    batching: Batching
    chain: Chain
    fixed_bytes: int
    """What no strategy changes."""
    bound_s: float
    """Seconds of its fastest plan with unlimited memory."""

    def strategies(self, solution: Solution) -> tuple[LayerStrategy, ...]:
        """One strategy per layer."""
        pairs = zip(self.chain.layers, solution.options, strict=True)
        return tuple(layer.strategies[option] for layer, option in pairs)

    def restricted(self, allowed: Callable[[LayerStrategy], bool]) -> Problem:
        """The same problem with some strategies only; a layer that has none of them keeps all."""
        layers = {}
        for layer in self.chain.layers:
            if id(layer) not in layers:
                mask = np.array([allowed(strategy) for strategy in layer.strategies])
                layers[id(layer)] = layer.keep(mask) if mask.any() else layer
        chain = Chain(tuple(layers[id(layer)] for layer in self.chain.layers), self.chain.moves)
        return Problem(self.costs, self.batching, chain, self.fixed_bytes, fastest_seconds(chain))


@dataclass(frozen=True)
class Best:
    """The fastest solution over some problems."""

    problem: Problem
    solution: Solution


@dataclass
class Effort:
    """What a search did."""

    problems: int = 0
    solved: int = 0
    """Problems that their bound did not settle."""
    labels: int = 0
    planned: int = 0
    """Calls of the planner."""
    priced: int = 0
    """Options priced."""
    estimated: int = 0
    """Options whose computation time is derived or scaled."""
    pruned: Counter[str] = field(default_factory=Counter)
    proven: bool = True


def build_problems(
    costs: Iterable[CostModel], *, global_batch: int, space: SearchSpace, effort: Effort, progress: Progress | None
) -> list[Problem]:
    """Every problem of a search, the one with the lowest bound first."""
    counts = space.microbatch_counts(global_batch)
    models = list(costs)
    found: list[Problem] = []
    for index, model in enumerate(models):
        builder = ChainBuilder(model, space, effort.pruned)
        for step, count in enumerate(counts):
            if progress is not None:
                message = f"planning layers for {count} micro-batch{'es' if count > 1 else ''}"
                progress(index * len(counts) + step, len(models) * len(counts), message)
            found += _problems(builder, global_batch, count)
        effort.planned += model.table.planned
        effort.priced += builder.priced
        effort.estimated += builder.estimated
    effort.problems = len(found)
    return sorted(found, key=lambda problem: problem.bound_s)


def _problems(builder: ChainBuilder, global_batch: int, count: int) -> Iterator[Problem]:
    for axes in batch_axes_for(builder.costs.table.mesh, global_batch // count):
        batching = Batching(global_batch, count, axes)
        chain = builder.build(batching)
        if chain is not None:
            bound = fastest_seconds(chain)
            if math.isfinite(bound):
                yield Problem(builder.costs, batching, chain, fixed_bytes(builder.costs, batching), bound)


def fastest(
    problems: list[Problem],
    *,
    memory_bytes: int,
    effort: Effort | None = None,
    exact: bool = True,
    deadline: float | None = None,
) -> Best | None:
    """The fastest solution that fits, over problems sorted by bound; None when nothing fits."""
    best, effort = None, effort or Effort()
    for problem in problems:
        upper = best.solution.seconds if best is not None else math.inf
        if problem.bound_s >= upper:
            break
        if deadline is not None and best is not None and time.monotonic() > deadline:
            effort.proven = False
            break
        budget = memory_bytes - problem.fixed_bytes
        found: Outcome = solve(problem.chain, budget_bytes=budget, upper_s=upper, exact=exact, deadline=deadline)
        effort.solved += 1
        effort.labels += found.labels
        effort.proven &= found.proven
        if found.solution is not None:
            best = Best(problem, found.solution)
    return best


def least_memory(problems: list[Problem]) -> Best:
    """The solution that needs least memory, over all problems; of equals the one with the lowest bound."""
    found = [Best(problem, smallest(problem.chain)) for problem in problems]
    return min(found, key=lambda best: best.solution.bytes + best.problem.fixed_bytes)
