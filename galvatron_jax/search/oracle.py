"""Brute force: the independent truth for small problems."""

from __future__ import annotations

import itertools

from galvatron_jax.search.chain import Chain, Solution, evaluate
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution
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
    count = len(problem.layers)
    for inner in itertools.combinations(range(1, count), problem.num_stages - 1):
        starts = (0, *inner)
        stops = (*inner, count)
        choices = [
            range(len(problem.options(layer, start)))
            for start, stop in zip(starts, stops, strict=True)
            for layer in range(start, stop)
        ]
        for options in itertools.product(*choices):
            found = evaluate_pipeline(problem, starts, options)
            fits = max(found.bytes) + problem.fixed_bytes <= budget_bytes
            if fits and (best is None or found.seconds < best.seconds):
                best = found
    return best
