"""Searches of one model under budgets from ample to too small."""

from __future__ import annotations

import functools

import optax

from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.search import SearchResult, SearchSpace, search
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.units import KIB, MIB
from tests.runtime.matrix import traced

MODEL = "gpt2"
CLUSTER = cluster_preset("titanrtx8")
GLOBAL_BATCH = 256
OPTIMIZER = optax.adamw(1e-3)
MICROBATCHES = SearchSpace(num_microbatches=(1, 4, 16, 64))
AMPLE = CLUSTER.device.memory_bytes
BUDGETS = (AMPLE, 40 * MIB, 12 * MIB, 5 * MIB, 2 * MIB, 1 * MIB)
TOO_SMALL = 380 * KIB


@functools.cache
def chosen(memory_bytes: int) -> SearchResult:
    """What the search chooses under a budget per device."""
    model = traced(MODEL).spec
    return search(
        model,
        CLUSTER,
        global_batch=GLOBAL_BATCH,
        memory_bytes=memory_bytes,
        optimizer=optimizer_memory(OPTIMIZER, model),
        space=MICROBATCHES,
    )
