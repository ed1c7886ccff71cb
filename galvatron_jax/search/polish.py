"""Better options for the stages of one cut, by column generation.

The step time of a cut is a sum of maxima over stages. Over mixtures of the choices known for each stage it is a small
linear program; its prices say what a second forward, backward and once a step of every stage is worth, and the layer
search finds each stage's best choice at those prices (Dantzig & Wolfe, "Decomposition principle for linear programs",
1960). When no stage has a better one, the program's value bounds the cut from below; the best pure choice of what was
found is taken.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy

from galvatron_jax.cost.schedules import makespan
from galvatron_jax.search.chain import evaluate as evaluate_chain
from galvatron_jax.search.layers import relax, solve
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, StageSum, evaluate, sum_stage
from galvatron_jax.search.sketch import chain_of

_ROUNDS = 12
_TILTS = tuple(
    np.array(tilt)
    for tilt in ((1, 1, 0), (1, 1, 0.3), (1, 1, 3), (0.3, 1, 1), (3, 1, 1), (1, 0.3, 1), (0, 1, 0), (1, 0, 0))
)
"""Factors on the prices of seconds forward, backward and once a step."""
_TIE_BREAK = 1e-6
"""Weight of seconds that cost nothing, so that a stage which waits is not slowed down for nothing."""
_COMBINATIONS = 8_000
"""Pure choices tried at most; the stages' least useful ones are dropped before."""


@dataclass
class StageChoices:
    """One stage of the cut, with the choices known for it."""

    number: int
    start: int
    stop: int
    sums: list[StageSum] = field(default_factory=list)
    options: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, problem: Pipeline, options: tuple[int, ...], budget_bytes: float) -> bool:
        """Takes a choice that fits; whether it is new."""
        total = sum_stage(problem, self.number, self.start, self.stop, options)
        if options in self.options or total.resident_bytes + total.passing_bytes > budget_bytes:
            return False
        self.options.append(options)
        self.sums.append(total)
        return True


def polish(
    problem: Pipeline,
    found: PipelineSolution,
    *,
    budget_bytes: float,
    deadline: float | None = None,
    exact: bool = True,
) -> PipelineSolution:
    """A solution with the same cuts that is at least as good.

    Args:
        problem: with one virtual stage per group.
        found: the solution.
        budget_bytes: per device, without `Pipeline.fixed_bytes`.
        deadline: of `time.monotonic()`.
        exact: whether each stage's choice is the best at its prices, or only a good one, in a fifth of the time.
    """
    stops = (*found.starts[1:], len(problem.layers))
    stages = [StageChoices(number, *ends) for number, ends in enumerate(zip(found.starts, stops, strict=True))]
    for stage in stages:
        stage.add(problem, found.options[stage.start : stage.stop], budget_bytes)
    weights = np.tile([problem.num_microbatches, problem.num_microbatches, 1.0], (len(stages), 1))
    for _ in range(_ROUNDS):
        if deadline is not None and time.monotonic() > deadline:
            break
        new = [_price(problem, stage, weights[stage.number], budget_bytes, exact) for stage in stages]
        if not any(new):
            break
        weights = stage_weights(problem, stages)
    # Mixtures of choices beat pure ones: choices that are the best at other prices may do better together.
    for stage, tilt in itertools.product(stages, _TILTS):
        if deadline is not None and time.monotonic() > deadline:
            break
        _price(problem, stage, weights[stage.number] * tilt, budget_bytes, exact)
    better = best_pure(problem, stages, found.starts)
    return better if better.seconds < found.seconds else found


def _price(problem: Pipeline, stage: StageChoices, weight: np.ndarray, budget_bytes: float, exact: bool) -> bool:
    """Adds a stage's best choice when its seconds have these prices; whether that is new."""
    if any(
        problem.options(layer, stage.start) is not problem.layers[layer] for layer in range(stage.start, stage.stop)
    ):
        return False
    count = problem.num_microbatches
    forward, backward, once = weight + _TIE_BREAK * np.array([count, count, 1.0])
    if problem.recomputes:
        # The stage's forward is repeated in its backward; the last stage has no other.
        forward = backward + (forward if stage.number < problem.num_stages - 1 else 0.0)
    kept = problem.residuals_kept(stage.number)
    chain = chain_of(problem, kept, np.array([forward, backward, once]), stage.start, stage.stop)
    limit = int(budget_bytes) - problem.kept_bytes(stage.number, stage.start, stage.stop)
    known = min(evaluate_chain(chain, options).seconds for options in stage.options)
    solution = (solve if exact else relax)(chain, budget_bytes=limit, upper_s=known).solution
    return solution is not None and stage.add(problem, solution.options, budget_bytes)


def stage_weights(problem: Pipeline, stages: Sequence[StageChoices]) -> np.ndarray:
    """What a second forward, backward and once a step of each stage is worth. float64[stages, 3]."""
    kinds = problem.kinds
    ticks, size = len(kinds.count), sum(len(stage.sums) for stage in stages)
    # Variables: seconds of each kind of tick, seconds once a step, then the share of every choice.
    objective = np.concatenate([kinds.count, [1.0], np.zeros(size)])
    rows = np.zeros((len(stages) * (ticks + 1), len(objective)))
    whole = np.zeros((len(stages), len(objective)))
    column = ticks + 1
    for place, stage in enumerate(stages):
        first = place * (ticks + 1)
        rows[first : first + ticks + 1, : ticks + 1] = -np.eye(ticks + 1)
        for total in stage.sums:
            tick = kinds.forward[:, place] * total.forward_s + kinds.backward[:, place] * total.backward_s
            rows[first : first + ticks + 1, column] = [*tick, total.once_s]
            whole[place, column] = 1.0
            column += 1
    solved = scipy.optimize.linprog(
        objective, A_ub=rows, b_ub=np.zeros(len(rows)), A_eq=whole, b_eq=np.ones(len(stages))
    )
    if solved.status != 0:
        return np.tile([problem.num_microbatches, problem.num_microbatches, 1.0], (len(stages), 1)) / len(stages)
    price = np.maximum(-solved.ineqlin.marginals.reshape(len(stages), ticks + 1), 0.0)
    # Weights of one tick add up to no more than its own, whatever the solver's tolerance.
    price *= np.minimum(1.0, objective[: ticks + 1] / np.maximum(price.sum(0), 1e-300))
    forward = (price[:, :ticks] * kinds.forward.T).sum(1)
    backward = (price[:, :ticks] * kinds.backward.T).sum(1)
    return np.stack([forward, backward, price[:, ticks]], axis=1)


def best_pure(problem: Pipeline, stages: Sequence[StageChoices], starts: tuple[int, ...]) -> PipelineSolution:
    """The best combination of one choice per stage."""
    kept = [list(range(len(stage.sums))) for stage in stages]
    while math.prod(len(choices) for choices in kept) > _COMBINATIONS:
        longest = max(range(len(kept)), key=lambda place: len(kept[place]))
        sums = stages[longest].sums
        slowest = max(kept[longest], key=lambda choice: sums[choice].forward_s + sums[choice].backward_s)
        kept[longest].remove(slowest)
    choices = np.array(list(itertools.product(*kept)))
    columns = [
        np.array([[s.forward_s, s.backward_s, s.once_s] for s in stage.sums])[choices[:, place]]
        for place, stage in enumerate(stages)
    ]
    table = np.stack(columns, axis=1)
    seconds = makespan(problem.kinds, table[..., 0], table[..., 1]) + table[..., 2].max(1)
    best = choices[int(np.argmin(seconds))]
    options = tuple(o for stage, choice in zip(stages, best, strict=True) for o in stage.options[choice])
    return evaluate(problem, starts, options)
