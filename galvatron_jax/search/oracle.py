"""Brute force: the independent truth for small problems."""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass

import numpy as np

from galvatron_jax.cost.schedules import makespan
from galvatron_jax.search.chain import Chain, Solution, evaluate
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, sum_stage
from galvatron_jax.search.pipeline import evaluate as evaluate_pipeline


def brute_force(chain: Chain, *, budget_bytes: int) -> Solution | None:
    """The fastest choice that fits, by trying all; None when none fits."""
    best = None
    for variant in range(chain.num_variants):
        allowed = [
            [option for option in range(len(layer.strategies)) if layer.admitted[variant, option]]
            for layer in chain.layers
        ]
        for options in itertools.product(*allowed):
            found = evaluate(chain, options)
            if found.bytes <= budget_bytes and (best is None or found.seconds < best.seconds):
                best = found
    return best


def brute_force_pipeline(problem: Pipeline, *, budget_bytes: int) -> PipelineSolution | None:
    """The fastest cuts and options that fit, by trying all; None when none fits."""
    best = None
    count, budget = len(problem.layers), budget_bytes - problem.fixed_bytes
    known: dict[tuple[int, int, int], _Choices] = {}
    for inner in itertools.combinations(range(1, count), problem.num_stages - 1):
        starts, stops = (0, *inner), (*inner, count)
        places = list(zip(range(problem.num_stages), starts, stops, strict=True))
        for place in places:
            if place not in known:
                known[place] = _Choices.of(problem, *place)
        options = _fastest(problem, [known[place] for place in places], budget)
        found = None if options is None else evaluate_pipeline(problem, starts, options)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
    return best


@dataclass(frozen=True, eq=False)
class _Choices:
    """Every choice of options for one virtual stage."""

    options: list[tuple[int, ...]]
    sums: np.ndarray
    """Fields of `StageSum`. float64[fields, choices]"""

    @classmethod
    def of(cls, problem: Pipeline, stage: int, start: int, stop: int) -> _Choices:
        counts = [len(problem.options(layer, start)) for layer in range(start, stop)]
        options = list(itertools.product(*map(range, counts)))
        sums = [astuple(sum_stage(problem, stage, start, stop, choice)) for choice in options]
        return cls(options, np.array(sums, float).T)


def _fastest(problem: Pipeline, stages: list[_Choices], budget_bytes: float) -> tuple[int, ...] | None:
    """The fastest combination of the stages' choices that fits."""
    every = np.indices([len(choices.options) for choices in stages]).reshape(len(stages), -1)
    sums = [choices.sums[:, index] for choices, index in zip(stages, every, strict=True)]
    forward, backward, once, resident, passing = np.stack(sums, axis=-1)
    groups = (-1, problem.num_chunks, problem.degree)
    needed = (resident.reshape(groups).sum(1) + passing.reshape(groups).max(1)).max(1)
    seconds = makespan(problem.kinds, forward, backward) + once.reshape(groups).sum(1).max(1)
    seconds = np.where(needed <= budget_bytes, seconds, np.inf)
    best = int(np.argmin(seconds))
    if not np.isfinite(seconds[best]):
        return None
    chosen = zip(stages, every[:, best], strict=True)
    return tuple(option for choices, index in chosen for option in choices.options[index])
