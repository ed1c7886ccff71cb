"""Planning is fast, and needs no JAX."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import weakref
from pathlib import Path

from galvatron_jax.partition.layer_plan import LayerPlan
from galvatron_jax.partition.layers import plan_layer
from galvatron_jax.partition.static import prepare_kind
from galvatron_jax.spec.model import LayerKind
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel
from tests.runtime.matrix import MICROBATCH, traced

MESH = {"a": 2, "b": 2, "c": 2}

SCRIPT = """
import json, sys, time
from collections import Counter
from galvatron_jax.partition.layers import plan_layer
from galvatron_jax.search.space import SearchSpace
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel

spec = ModelSpec.load(sys.argv[1])
kind = next(kind for kind in spec.kinds if "Block" in kind.name)
mesh = {"a": 2, "b": 2, "c": 2}
splits = [("abc"[:n], "abc"[n:]) for n in range(4)]
strategies = [
    LayerStrategy(dp=tuple(dp), tp=tuple(other) if tensor else (), zero=zero, remat=remat,
                  **({} if tensor or not other else {"sp": tuple(other), "sp_kind": SequenceParallel.ULYSSES}))
    for dp, other in splits for tensor in (True, False) for zero in ((0, 3) if dp else (0,))
    for remat in ("none", "full", "dots")
]
strategies = list(dict.fromkeys(strategies))[:32]
assert len(strategies) == 32

def seconds(strategies):
    fresh = kind.model_copy()  # Plans are kept by the kind's identity: this one has none.
    start = time.process_time()
    for strategy in strategies:
        plan_layer(fresh, strategy, mesh=mesh, microbatch=8, model_microbatch=spec.microbatch)
    return time.process_time() - start

one = [min(seconds([strategy]) for _ in range(3)) for strategy in strategies[:: 4]]
table = min(seconds(strategies) for _ in range(2))
axes = tuple(MeshAxis(name=name, size=size) for name, size in mesh.items())
searched = SearchSpace().strategies(kind, mesh=axes, microbatch=8, pruned=Counter())
each = min(seconds(searched) for _ in range(9)) / len(searched)
print(json.dumps({
    "one_s": max(one), "table_s": table, "searched": len(searched), "each_s": each, "jax": "jax" in sys.modules
}))
"""


def test_planning_a_llama_layer_is_fast_without_jax(tmp_path: Path) -> None:
    """CPU time, some three times what a quiet machine takes; `benchmarks/planning_speed.py` holds it to its limits."""
    path = tmp_path / "llama.json"
    traced("llama").spec.save(path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["jax"]
    print(found)
    assert found["one_s"] <= 0.100
    assert found["table_s"] <= 1.0
    assert found["searched"] > 100
    assert found["each_s"] <= 0.008


def test_plans_do_not_depend_on_what_was_planned_before() -> None:
    """Strategies share passes; each alone, on a kind of its own, gets the same plan."""
    spec = traced("moe").spec
    kind = next(kind for kind in spec.kinds if "Block" in kind.name)
    splits = [
        {"dp": ("a", "b"), "tp": ("c",)},
        {"dp": ("a",), "tp": ("b", "c"), "sp": ("b", "c"), "sp_kind": SequenceParallel.MEGATRON},
        {"dp": ("a",), "sp": ("b", "c"), "sp_kind": SequenceParallel.ULYSSES},
    ]
    strategies = [
        LayerStrategy(**split, zero=zero, remat=remat) for remat in Remat for zero in range(4) for split in splits
    ]
    random.Random(0).shuffle(strategies)
    for strategy in strategies:
        alone = kind.model_copy()
        assert _plan(kind, strategy) == _plan(alone, strategy), strategy.short()


def test_what_was_planned_goes_with_the_layer_kind() -> None:
    kind = traced("llama").spec.kinds[1].model_copy()
    _plan(kind, LayerStrategy(dp=("a", "b"), tp=("c",)))
    prepared = weakref.ref(prepare_kind(kind))
    assert prepared() is not None
    del kind
    gc.collect()
    assert prepared() is None


def _plan(kind: LayerKind, strategy: LayerStrategy) -> LayerPlan:
    return plan_layer(kind, strategy, mesh=MESH, microbatch=MICROBATCH, model_microbatch=MICROBATCH)
