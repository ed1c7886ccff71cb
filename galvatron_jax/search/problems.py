"""All the chains of one search: every mesh, number of micro-batches and layout of the batch; and the best of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.step import fixed_bytes
from galvatron_jax.search.chain import Chain, Solution
from galvatron_jax.search.layers import TOLERANCE, Relaxed, close, fastest_seconds, relax, smallest
from galvatron_jax.search.options import ChainBuilder
from galvatron_jax.search.space import Rule, SearchSpace, batch_axes_for
from galvatron_jax.search.tables import TableBuilder
from galvatron_jax.spec.profile import Provenance
from galvatron_jax.spec.strategy import LayerStrategy

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is being done."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One chain, with what it was made from."""

    builder: ChainBuilder
    batching: Batching
    chain: Chain
    fixed_bytes: int
    """What no strategy changes."""
    bound_s: float
    """Seconds of its fastest plan with unlimited memory."""

    @property
    def costs(self) -> CostModel:
        """Prices of its options."""
        return self.builder.tables.costs

    def strategies(self, solution: Solution) -> tuple[LayerStrategy, ...]:
        """One strategy per layer."""
        pairs = zip(self.chain.layers, solution.options, strict=True)
        return tuple(layer.strategies[option] for layer, option in pairs)

    def restricted(self, allowed: Callable[[LayerStrategy], bool]) -> Problem | None:
        """The same problem with some strategies only; a layer that offers none of them keeps all."""
        return make_problem(self.builder, self.batching, allowed)


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
    open_s: float = math.inf
    """Least bound of a problem that was not solved to the end: no plan is faster than this or the best found."""

    def count(self, tables: TableBuilder, beside: TableBuilder | None = None) -> None:
        """Adds what was priced, but for what was so in other tables too."""
        priced, estimated = tables.priced(beside)
        self.priced += priced
        self.estimated += estimated

    def add(self, other: Effort) -> None:
        """Adds what was done elsewhere."""
        for name in ("problems", "solved", "labels", "planned", "priced", "estimated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.pruned.update(other.pruned)
        self.leave_open(other.open_s)

    def leave_open(self, bound_s: float) -> None:
        """Notes that a problem with this bound was not solved to the end."""
        self.open_s = min(self.open_s, bound_s)


def build_problems(
    costs: Iterable[CostModel],
    *,
    global_batch: int,
    memory_bytes: int,
    space: SearchSpace,
    effort: Effort,
    progress: Progress | None,
) -> list[Problem]:
    """Every problem of a search, the one with the lowest bound first."""
    counts = space.microbatch_counts(global_batch)
    models = list(costs)
    found: list[Problem] = []
    for index, model in enumerate(models):
        tables = TableBuilder(model, space, effort.pruned)
        builder = ChainBuilder(tables)
        for step, count in enumerate(counts):
            if progress is not None:
                message = f"planning layers for {count} micro-batch{'es' if count > 1 else ''}"
                progress(index * len(counts) + step, len(models) * len(counts), message)
            problems = list(problems_of(builder, global_batch, count))
            found += problems
            if _enough(problems, builder, memory_bytes):
                effort.pruned[Rule.MICROBATCHES_ON_DEMAND] += len(counts) - step - 1
                break
        effort.planned += model.table.planned
        effort.count(tables)
    effort.problems += len(found)
    return sorted(found, key=lambda problem: problem.bound_s)


def _enough(problems: list[Problem], builder: ChainBuilder, memory_bytes: int) -> bool:
    """Whether more micro-batches would gain nothing: the fastest plan of these fits already."""
    derived = builder.tables.costs.provenance == Provenance.DERIVED
    if not (problems and derived and builder.tables.space.applies(Rule.MICROBATCHES_ON_DEMAND)):
        return False
    best = min(problems, key=lambda problem: problem.bound_s)
    budget, below = memory_bytes - best.fixed_bytes, best.bound_s * (1 + TOLERANCE)
    return relax(best.chain, budget_bytes=budget, upper_s=math.nextafter(below, math.inf)).solution is not None


def problems_of(builder: ChainBuilder, global_batch: int, count: int) -> Iterator[Problem]:
    """The problems of one mesh and one number of micro-batches."""
    for axes in batch_axes_for(builder.tables.costs.table.mesh, global_batch // count):
        problem = make_problem(builder, Batching(global_batch, count, axes))
        if problem is not None:
            yield problem


def make_problem(
    builder: ChainBuilder, batching: Batching, allowed: Callable[[LayerStrategy], bool] | None = None
) -> Problem | None:
    """The problem of one way to feed the batch; None when it has no solution for any budget."""
    chain = builder.build(batching, allowed)
    bound = fastest_seconds(chain) if chain is not None else math.inf
    if chain is None or not math.isfinite(bound):
        return None
    return Problem(builder, batching, chain, fixed_bytes(builder.tables.costs, batching), bound)


@dataclass
class Chains:
    """Chains of a search, first relaxed, then closed: the best solution known by then leaves little to close."""

    problems: list[Problem]
    """The one with the lowest bound first."""
    memory_bytes: int
    effort: Effort
    deadline: float | None = None
    """Of `time.monotonic()`: from then on only what nothing is known for is looked at."""
    best: Best | None = None
    """The fastest that fits, so far."""
    _relaxed: list[tuple[Problem, Relaxed]] = field(default_factory=list, repr=False)
    _waiting: list[Problem] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._waiting = self.problems

    @property
    def upper_s(self) -> float:
        """Seconds of the best."""
        return self.best.solution.seconds if self.best is not None else math.inf

    def relax(self, *, upper_s: float = math.inf, leaders: int | None = None) -> None:
        """Finds a good solution; asked again, it goes on with the problems that are left.

        Args:
            upper_s: only faster solutions count.
            leaders: how many problems to look at, no two of which differ in the layouts of the batch and of tied
                parameters alone; None looks at all.
        """
        waiting, seen = [], set()
        for problem in self._waiting:
            upper = min(upper_s, self.upper_s)
            key = id(problem.builder), problem.batching.num_microbatches
            enough = leaders is not None and (key in seen or len(seen) == leaders)
            if problem.bound_s >= upper or enough or (self._late() and math.isfinite(upper)):
                waiting.append(problem)
                continue
            seen.add(key)
            found = relax(problem.chain, budget_bytes=self.memory_bytes - problem.fixed_bytes, upper_s=upper)
            self._relaxed.append((problem, found))
            self.effort.solved += 1
            if found.solution is not None:
                self.best = Best(problem, found.solution)
        self._waiting = waiting

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def close(self, *, upper_s: float = math.inf) -> None:
        """Finds the best solution, if it is faster than `upper_s`."""
        for problem in self._waiting:
            self.effort.leave_open(problem.bound_s)
        for problem, found in sorted(self._relaxed, key=lambda pair: pair[1].least_s):
            closed = close(found, upper_s=min(upper_s, self.upper_s), deadline=self.deadline)
            self.effort.labels += closed.labels
            if not closed.proven:
                self.effort.leave_open(found.least_s)
            if closed.solution is not None:
                self.best = Best(problem, closed.solution)


def fastest(problems: list[Problem], *, memory_bytes: int) -> Best | None:
    """A fast solution that fits, over problems sorted by bound; not in general the optimum. None when nothing fits."""
    chains = Chains(problems, memory_bytes, Effort())
    chains.relax()
    return chains.best


def least_memory(problems: list[Problem]) -> Best:
    """The solution that needs least memory, over all problems; of equals the one with the lowest bound."""
    found = [Best(problem, smallest(problem.chain)) for problem in problems]
    return min(found, key=lambda best: best.solution.bytes + best.problem.fixed_bytes)
