"""Searches once, on one core and without JAX: `time_search.py SPEC CLUSTER BATCH [--memory BYTES] …`.

Prints one JSON object: CPU seconds of the search, where they went, peak memory of the process, and what was found.
Reading the spec is not part of the time. Where it goes is seen by looking at the stack every ten milliseconds of CPU
time, which itself takes well below a hundredth of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from types import FrameType
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[threads] = "1"

from galvatron_jax.errors import InfeasibleError  # noqa: E402
from galvatron_jax.search import OptimizerMemory, Rule, SearchResult, SearchSpace, search  # noqa: E402
from galvatron_jax.search.explain import describe_groups  # noqa: E402
from galvatron_jax.spec.model import ModelSpec  # noqa: E402
from galvatron_jax.spec.presets import cluster_preset  # noqa: E402

ADAM = OptimizerMemory(("same", "same"), 4)
PERIOD_S = 0.01
PARTS = (
    ("planning", ("galvatron_jax.partition",)),
    ("pricing", ("galvatron_jax.cost", "galvatron_jax.search.tables", "galvatron_jax.search.space")),
    ("solving", ("galvatron_jax.search",)),
)
"""Which modules on the stack mean which part of the work; the first that is there counts."""


class Samples:
    """How often each part of the work was seen."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def start(self) -> None:
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def shares(self) -> dict[str, float]:
        total = sum(self.seen.values()) or 1
        return {name: self.seen[name] / total for name, _ in PARTS}

    def _look(self, _signal: int, frame: FrameType | None) -> None:
        modules = set()
        while frame is not None:
            modules.add(frame.f_globals.get("__name__", ""))
            frame = frame.f_back
        for name, packages in PARTS:
            if any(module == p or module.startswith(p + ".") for module in modules for p in packages):
                self.seen[name] += 1
                return


def main() -> None:
    options = _options()
    model, cluster = ModelSpec.load(options.spec), cluster_preset(options.cluster)
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    gc.collect()
    samples, start = Samples(), time.process_time()
    samples.start()
    try:
        found: SearchResult | None = search(
            model,
            cluster,
            global_batch=options.batch,
            memory_bytes=options.memory,
            optimizer=ADAM,
            space=SearchSpace(pipeline_degrees=None, disabled_rules=frozenset(options.without)),
            time_limit_s=options.limit,
            runners_up=False,
        )
    except InfeasibleError:
        found = None
    seconds = time.process_time() - start
    samples.stop()
    assert "jax" not in sys.modules, "the search imported JAX"
    memory_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"cpu_s": seconds, "host_memory_gib": memory_gib, "shares": samples.shares(), **_found(found)}))


def _found(result: SearchResult | None) -> dict[str, Any]:
    if result is None:
        return {"fits": False}
    plan, statistics = result.plan, result.statistics
    return {
        "fits": True,
        "step_s": result.prediction.time.step_s,
        "gap": statistics.gap,
        "pipeline_degree": plan.pipeline_degree,
        "schedule": plan.schedule.value,
        "num_microbatches": plan.num_microbatches,
        "planned_layers": statistics.planned_layers,
        "options": statistics.options,
        "problems": statistics.problems,
        "groups": list(describe_groups(plan)),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec")
    parser.add_argument("cluster")
    parser.add_argument("batch", type=int)
    parser.add_argument("--memory", type=int, help="bytes per device; the device's own by default")
    parser.add_argument("--limit", type=float, help="seconds after which the best so far is taken")
    parser.add_argument("--without", type=Rule, action="append", default=[], help="a rule not to apply")
    return parser.parse_args()


if __name__ == "__main__":
    main()
