"""Llama-2-70B decorated, traced and searched for 64 H100s on this machine: seconds, and peak memory of the process."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

from harness import Claim, Outcome, run, virtual_cpus

virtual_cpus(1)

import optax  # noqa: E402
from flax import nnx  # noqa: E402

from galvatron_jax.api import auto_shard, find_plan  # noqa: E402
from galvatron_jax.models import llama, registry  # noqa: E402
from galvatron_jax.units import format_bytes  # noqa: E402

CLUSTER, GLOBAL_BATCH = "h100x64", 256
TIME_LIMIT_S, MEMORY_LIMIT_GIB = 60.0, 4.0


def measure(full: bool) -> Outcome:
    names = ["llama2-70b", "llama3-70b"] if full else ["llama2-70b"]
    results = [plan(name) for name in names]
    claimed = results[0]
    return Outcome(
        results,
        [
            Claim("llama2-70b decorated, traced and searched for h100x64", claimed["total_s"], TIME_LIMIT_S, "s"),
            Claim("llama2-70b: peak host memory", claimed["host_memory_gib"], MEMORY_LIMIT_GIB, "GiB"),
        ],
    )


def plan(preset: str) -> dict[str, Any]:
    """Times of one model; memory is the process's peak so far."""
    config = registry.model_config("llama", preset, dtype="bfloat16", param_dtype="bfloat16")
    start = time.perf_counter()
    model = auto_shard(llama.Llama)(config, rngs=nnx.Rngs(0))
    built = time.perf_counter()
    batch = llama.example_batch(config, GLOBAL_BATCH)
    planned = find_plan(model, llama.loss_fn, optax.adamw(1e-4), batch, cluster=CLUSTER, profile="derive")
    done = time.perf_counter()
    parameters = sum(math.prod(p.shape) for p in planned.model.parameters)
    prediction = planned.plan.prediction
    assert prediction is not None
    groups = {group.strategy.short() for stage in planned.plan.stages for group in stage.groups}
    memory_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{preset}: {parameters / 1e9:.1f} B parameters, {done - start:.1f} s, {memory_gib:.2f} GiB")
    print(f"  {', '.join(sorted(groups))}; {planned.plan.num_microbatches} micro-batches")
    print(
        f"  predicted {prediction.time.step_s:.2f} s a step, {format_bytes(prediction.memory[0].total_bytes)} a device"
    )
    return {
        "model": preset,
        "parameters": parameters,
        "cluster": CLUSTER,
        "global_batch": GLOBAL_BATCH,
        "decorated_s": built - start,
        "planned_s": done - built,
        "total_s": done - start,
        "host_memory_gib": memory_gib,
        "strategies": sorted(groups),
        "num_microbatches": planned.plan.num_microbatches,
        "predicted_step_s": prediction.time.step_s,
        "predicted_memory_bytes": prediction.memory[0].total_bytes,
    }


if __name__ == "__main__":
    run(measure)
