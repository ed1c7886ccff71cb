"""Holding a search's winner against an oracle that solves the same problem another way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.pipeline import Pipelining
from galvatron_jax.cost.planner import default_planner
from galvatron_jax.cost.step import fixed_bytes
from galvatron_jax.search.chain import Chain
from galvatron_jax.search.milp import Bracket, bracket, bracket_chain
from galvatron_jax.search.options import ChainBuilder
from galvatron_jax.search.oracle import brute_force, brute_force_pipeline
from galvatron_jax.search.pipeline import Pipeline
from galvatron_jax.search.question import Question
from galvatron_jax.search.stages import PipelineBuilder
from galvatron_jax.search.tables import TableBuilder
from galvatron_jax.spec.plan import Plan
from galvatron_jax.units import format_seconds

BRUTE_FORCE, MILP = "brute force", "the mixed-integer program"
_MOST_CHOICES = 20_000
"""That brute force tries."""
_GAP = 1e-4
"""Relative difference to the optimum at which HiGHS stops."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Checked:
    """What an oracle says of a plan's problem: its mesh, micro-batches, batch layout, stages and schedule."""

    oracle: str
    search_s: float
    """Step of the search's plan."""
    oracle_s: float
    """Step of the oracle's best plan; infinite where it found none in time."""
    bound_s: float
    """By the oracle, no plan takes less."""

    @property
    def refuted(self) -> bool:
        """Whether the oracle found something faster."""
        return self.oracle_s < self.search_s * (1 - _ROUNDING)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        mine = format_seconds(self.search_s)
        if self.refuted:
            faster = 1 - self.oracle_s / self.search_s
            return f"{self.oracle} found a step of {format_seconds(self.oracle_s)}, {faster:.3%} less than {mine}."
        open_share = 1 - self.bound_s / self.search_s if self.search_s else 0.0
        if open_share <= _GAP + _ROUNDING:
            return f"{self.oracle} finds nothing faster than {mine} with the same mesh, micro-batches and stages."
        return (
            f"{self.oracle} found nothing faster than {mine} in the time given; it has not ruled out that "
            f"{open_share:.1%} less is possible. Give it more time with --time-limit."
        )


def check_winner(question: Question, plan: Plan, *, time_limit_s: float, spare_bytes: int = 0) -> Checked:
    """Solves the winner's own problem anew, by trying all where that is little, else by HiGHS.

    Args:
        question: what was asked.
        plan: the search's answer.
        time_limit_s: for HiGHS.
        spare_bytes: of the budget, what its groups were not given for their own stages.
    """
    assert plan.prediction is not None
    search_s, budget = plan.prediction.time.step_s, question.budget_bytes - spare_bytes
    brackets, oracles = [], set()
    for problem, fixed in _problems(question, plan):
        small = _choices(problem) <= _MOST_CHOICES
        oracles.add(BRUTE_FORCE if small else MILP)
        brackets.append((_tried if small else _programmed)(problem, budget, fixed, time_limit_s))
    oracle_s = min((found.solution.seconds for found in brackets if found.solution is not None), default=math.inf)
    bound_s = min((found.bound_s for found in brackets), default=math.inf)
    return Checked(" and ".join(sorted(oracles)), search_s, oracle_s, min(bound_s, oracle_s))


def _problems(question: Question, plan: Plan) -> Iterator[tuple[Chain | Pipeline, int]]:
    """The problems that the plan solves, with the bytes that no strategy changes and the problem leaves out."""
    axes = tuple(axis for axis in plan.mesh if axis.name in plan.pipeline_axes)
    costs = CostModel.build(
        question.model,
        cluster=question.cluster,
        mesh=plan.stage_mesh,
        profile=question.profile,
        optimizer=question.optimizer,
        planner=question.planner or default_planner(),
        pipeline_axes=axes,
        gradient_sum_dtype=plan.gradient_sum_dtype,
    )
    tables = TableBuilder(costs, question.space, Counter())
    batching = Batching(plan.global_batch, plan.num_microbatches, plan.batch_axes)
    if len(plan.stages) == 1:
        chain = ChainBuilder(tables).build(batching)
        assert chain is not None
        yield chain, fixed_bytes(costs, batching)
        return
    pipelining = Pipelining(plan.schedule, axes, len(plan.stages) // plan.pipeline_degree)
    yield from ((problem, 0) for problem in PipelineBuilder(tables).build(pipelining, batching))


def _choices(problem: Chain | Pipeline) -> float:
    """How many plans there are."""
    if isinstance(problem, Chain):
        return problem.num_variants * math.prod(len(layer.strategies) for layer in problem.layers)
    cuts = math.comb(len(problem.layers) - 1, problem.num_stages - 1)
    return cuts * math.prod(len(layer) for layer in problem.layers)


def _tried(problem: Chain | Pipeline, budget: int, fixed: int, time_limit_s: float) -> Bracket:
    """Brute force, which takes no time worth limiting."""
    if isinstance(problem, Chain):
        found = brute_force(problem, budget_bytes=budget - fixed)
    else:
        found = brute_force_pipeline(problem, budget_bytes=budget)
    return Bracket(found, math.inf if found is None else found.seconds)


def _programmed(problem: Chain | Pipeline, budget: int, fixed: int, time_limit_s: float) -> Bracket:
    if isinstance(problem, Chain):
        return bracket_chain(problem, budget_bytes=budget - fixed, time_limit_s=time_limit_s, gap=_GAP)
    return bracket(problem, budget_bytes=budget, time_limit_s=time_limit_s, gap=_GAP)
