"""Llama-2-70B in four stages for 64 H100s, compiled by XLA's GPU compiler on this machine: peak, seconds, host memory.

Each stage of 20 blocks and more lies on 16 GPUs: two replicas of eight-way tensor parallelism with Megatron's sequence
parallelism, ZeRO-1, blocks rematerialised, 1F1B with 16 micro-batches. All in bfloat16. Needs the `verify` extra, and
no GPU. With `--full`, also a quarter of the layers, to see what grows with depth.
"""

from __future__ import annotations

import itertools
import os
import resource
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import optax
from flax import nnx
from harness import Claim, Outcome, run

from galvatron_jax.api import auto_shard
from galvatron_jax.api.verification import verify_plan
from galvatron_jax.models import llama, registry
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel

TARGET, STAGES, REPLICAS, MICROBATCHES = "h100x64", 4, 2, 16
CPU_LIMIT_S, HOST_LIMIT_GIB, ERROR_LIMIT = 240.0, 4.0, 0.10
GIB = 2**30

STRATEGY = LayerStrategy(
    dp=("c",),
    tp=("d", "e", "f"),
    sp=("d", "e", "f"),
    sp_kind=SequenceParallel.MEGATRON,
    zero=1,
    remat=Remat.FULL,
)


def plan_of(num_layers: int) -> Plan:
    """Even stages; embedding and head are layers too."""
    layers = num_layers + 2
    cuts = [round(stage * layers / STAGES) for stage in range(STAGES + 1)]
    return Plan(
        model="llama2-70b",
        mesh=tuple(MeshAxis(name=name, size=2, level="inter" if name in "abc" else "intra") for name in "abcdef"),
        global_batch=REPLICAS * MICROBATCHES,
        num_microbatches=MICROBATCHES,
        schedule=Schedule.ONE_F_ONE_B,
        stages=tuple(
            Stage(groups=(LayerGroup(start=start, stop=stop, strategy=STRATEGY),))
            for start, stop in itertools.pairwise(cuts)
        ),
        pipeline_axes=("a", "b"),
        batch_axes=("c",),
    )


def compiled(num_layers: int) -> dict[str, Any]:
    """What the compiler says of one depth."""
    config = registry.model_config(
        "llama", "llama2-70b", num_layers=num_layers, dtype="bfloat16", param_dtype="bfloat16"
    )
    begin, begin_cpu = time.perf_counter(), time.process_time()
    model = auto_shard(llama.Llama)(config, rngs=nnx.Rngs(0))
    plan = plan_of(num_layers)
    batch = llama.example_batch(config, plan.global_batch)
    found = verify_plan(model, llama.loss_fn, optax.adamw(1e-4), batch, plan=plan, target=TARGET)
    span = found.replay
    return {
        "layers": num_layers,
        "target": TARGET,
        "peak_gib": round(found.memory.peak_bytes / GIB, 3),
        "predicted_peak_gib": round(found.prediction.peak_bytes / GIB, 3),
        "argument_gib": round(found.memory.argument_bytes / GIB, 3),
        "predicted_argument_gib": round(max(m.argument_bytes for m in found.prediction.memory) / GIB, 3),
        "memory_error": round(found.memory_error, 4),
        "replayed_s": round(span.seconds, 3),
        "exposed_s": round(span.exposed_s, 3),
        "predicted_s": round(found.prediction.time.step_s, 3),
        "seconds": {name: round(value, 1) for name, value in found.seconds.items()},
        "total_s": round(time.perf_counter() - begin, 1),
        "cpu_s": round(time.process_time() - begin_cpu, 1),
        "host_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def measure(full: bool) -> Outcome:
    """The whole model; with `--full` a shallow one before it."""
    results = []
    for layers in (20, 80) if full else (80,):
        results.append(compiled(layers))
        row = results[-1]
        print(
            f"{layers} layers: peak {row['peak_gib']:.2f} GiB, predicted {row['predicted_peak_gib']:.2f}; replayed "
            f"{row['replayed_s']:.2f} s, predicted {row['predicted_s']:.2f}; {row['total_s']:.0f} s "
            f"({row['cpu_s']:.0f} s of CPU), {row['host_memory_gib']:.2f} GiB",
            flush=True,
        )
    row = results[-1]
    return Outcome(
        results,
        [
            Claim("llama2-70b traced, lowered and compiled for h100x64, CPU seconds", row["cpu_s"], CPU_LIMIT_S, "s"),
            Claim("llama2-70b: peak host memory", row["host_memory_gib"], HOST_LIMIT_GIB, "GiB"),
            Claim("llama2-70b: |predicted / compiled peak - 1|", abs(row["memory_error"]), ERROR_LIMIT),
        ],
    )


if __name__ == "__main__":
    run(measure, devices="compiling for 64 H100")
