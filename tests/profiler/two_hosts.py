"""Profiles on one of two hosts, each with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from galvatron_jax.profiler import LayerTimingRequest, live_cluster, live_mesh, profile
from galvatron_jax.profiler.cache import TimingCache, environment
from galvatron_jax.profiler.layers import _key
from galvatron_jax.spec.profile import Timing
from tests.profiler.test_measure import MODEL, QUICK, Chain, request


def run(caches: list[str], known: list[list[int]], batches: list[int]) -> dict[str, Any]:
    """A profile, and the live cluster.

    Args:
        caches: folder per host.
        known: batches per host that its cache holds beforehand, in times that no measurement gives.
        batches: of the layers to time.
    """
    host = jax.process_index()
    cache = TimingCache(Path(caches[host]), environment(live_mesh()))
    for batch, phase in ((batch, phase) for batch in known[host] for phase in ("forward", "backward")):
        cache.put({**_key(request(batch)), "phase": phase}, Timing(median_s=100.0 + host))
    built: list[int] = []

    def program(batch: int) -> tuple[LayerTimingRequest, Callable[[], Chain]]:
        def build() -> Chain:
            built.append(batch)
            return Chain(batch)

        return request(batch), build

    options = {"cache_dir": caches[host], "progress": False, "sampling": QUICK}
    found = profile(MODEL, [program(batch) for batch in batches], message_bytes=(1024,), **options)
    return {
        "profile": found.model_dump(mode="json"),
        "cluster": live_cluster(**options).model_dump(mode="json"),
        "built": built,
        "files": len(list(cache.directory.glob("*.json"))),
    }
