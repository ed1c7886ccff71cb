"""Brute force over a chain: the independent truth for small problems."""

from __future__ import annotations

import itertools

from galvatron_jax.search.chain import Chain, Solution, evaluate


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
