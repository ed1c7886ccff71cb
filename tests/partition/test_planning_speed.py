"""Planning is fast, and needs no JAX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.runtime.matrix import traced

SCRIPT = """
import json, sys, time
from galvatron_jax.partition.layers import plan_layer
from galvatron_jax.spec.model import ModelSpec
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
print(json.dumps({"one_s": max(one), "table_s": table, "jax": "jax" in sys.modules}))
"""


def test_planning_a_llama_layer_is_fast_without_jax(tmp_path: Path) -> None:
    """CPU time, so that other processes do not count: 50 ms for one strategy, 1 s for a table of 32."""
    path = tmp_path / "llama.json"
    traced("llama").spec.save(path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["jax"]
    print(found)
    assert found["one_s"] <= 0.050
    assert found["table_s"] <= 1.0
