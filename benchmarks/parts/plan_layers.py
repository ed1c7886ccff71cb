"""Plans a model's most frequent layer, without JAX: cold, under 32 strategies, and under all that a search tries.

Run as `plan_layers.py SPEC`.

The loaded document, tens of thousands of objects, is put out of the garbage collector's way: a full collection may
happen at any time and says nothing of planning.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter

from galvatron_jax.partition import plan_layer
from galvatron_jax.search.space import SearchSpace
from galvatron_jax.spec.model import LayerKind, ModelSpec
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel

MESH = {"a": 2, "b": 2, "c": 2}


def strategies() -> list[LayerStrategy]:
    """Every kind of strategy over eight devices in three axes of two: 4 layouts x 4 ZeRO stages x 2 remats."""
    layouts: list[dict] = [
        {"dp": ("a",), "tp": ("b", "c")},
        {"dp": ("a", "b", "c")},
        {"dp": ("a", "b"), "tp": ("c",), "sp": ("c",), "sp_kind": SequenceParallel.MEGATRON},
        {"dp": ("a",), "sp": ("b", "c"), "sp_kind": SequenceParallel.ULYSSES},
    ]
    return [
        LayerStrategy(**layout, zero=zero, remat=remat)
        for layout in layouts
        for zero in range(4)
        for remat in ("none", "full")
    ]


def times(kind: LayerKind, microbatch: int) -> dict[str, float]:
    """Seconds, and CPU seconds, for the first strategy alone and for all 32, nothing cached before."""
    clocks = {"s": time.perf_counter, "cpu_s": time.process_time}
    start = {unit: clock() for unit, clock in clocks.items()}
    found = {}
    for count, strategy in enumerate(strategies()):
        plan_layer(kind, strategy, mesh=MESH, microbatch=microbatch, model_microbatch=microbatch)
        for unit, clock in clocks.items():
            found["one_" + unit if count == 0 else "table_" + unit] = clock() - start[unit]
    return found


def searched(kind: LayerKind, microbatch: int) -> dict[str, float]:
    """CPU seconds for every strategy of a search on the mesh, at one micro-batch and then at another."""
    mesh = tuple(MeshAxis(name=name, size=size) for name, size in MESH.items())
    found = SearchSpace().strategies(kind, mesh=mesh, microbatch=microbatch, pruned=Counter())
    times: dict[str, float] = {"searched": len(found)}
    for name, examples in (("search_cpu_s", microbatch), ("search_again_cpu_s", 2 * microbatch)):
        start = time.process_time()
        for strategy in found:
            plan_layer(kind, strategy, mesh=MESH, microbatch=examples, model_microbatch=microbatch)
        times[name] = time.process_time() - start
    return times


def main(path: str) -> None:
    spec = ModelSpec.load(path)
    kinds = [layer.kind for layer in spec.layers]
    kind = spec.kinds[max(set(kinds), key=kinds.count)]
    gc.collect()
    gc.freeze()
    found = times(kind, spec.microbatch) | searched(kind.model_copy(), spec.microbatch)
    assert "jax" not in sys.modules, "planning imported JAX"
    print(json.dumps({"operations": len(kind.program.operations), **found}))


if __name__ == "__main__":
    main(sys.argv[1])
