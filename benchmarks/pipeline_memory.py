"""Memory of pipelines by XLA's GPU compiler, for 8 H100s that need not be here: does it grow with the micro-batches?

A GPT of 8 layers in 4 stages, each over 2 devices, with 4 and 32 micro-batches of 8 examples. Under 1F1B a stage holds
as many as its place in the pipeline asks for, however many there are; under GPipe it holds all. Beside the compiler's
peak stands the predicted one of the group of devices that needs most. Needs the `verify` extra, and no GPU.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
from harness import Claim, Outcome, run
from parts.trace_zoo import trace_zoo

from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.cost.step import price_plan
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Schedule, Stage
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.strategy import LayerStrategy
from galvatron_jax.trace.model import Traced
from galvatron_jax.verify.targets import target_devices

STAGES, MICROBATCH, COUNTS = 4, 8, (4, 32)
LIMIT = 1.05
GIB = 2**30


def traced() -> Traced:
    """The model."""
    sizes = {"num_layers": 8, "width": 1024, "num_heads": 16, "seq_length": 1024, "dtype": "bfloat16"}
    return trace_zoo("gpt2", "small", microbatch=MICROBATCH, called="gpt-8-layers", **sizes)


def plan_of(model: Traced, schedule: Schedule, count: int) -> Plan:
    """Even stages, data-parallel inside."""
    layers = len(model.spec.layers)
    cuts = [round(stage * layers / STAGES) for stage in range(STAGES + 1)]
    strategy = LayerStrategy(dp=("c",))
    return Plan(
        model=model.spec.name,
        mesh=tuple(MeshAxis(name=name, size=2) for name in "abc"),
        global_batch=MICROBATCH * count,
        num_microbatches=count,
        schedule=schedule,
        stages=tuple(
            Stage(groups=(LayerGroup(start=start, stop=stop, strategy=strategy),))
            for start, stop in itertools.pairwise(cuts)
        ),
        pipeline_axes=("a", "b"),
        batch_axes=("c",),
    )


def compiled(model: Traced, schedule: Schedule, count: int) -> dict[str, Any]:
    """What the compiler says of one plan, and what was predicted."""
    plan, optimizer = plan_of(model, schedule, count), optax.adamw(1e-3)
    begin = time.perf_counter()
    step = build_step(model, plan, optimizer, devices=target_devices("h100", 8))
    found = step.compiled.memory_analysis()
    memory = optimizer_memory(optimizer, model.spec)
    predicted = price_plan(model.spec, plan, cluster=cluster_preset("h100x8"), optimizer=memory)
    return {
        "schedule": str(schedule),
        "microbatches": count,
        "peak_gib": round(found.peak_memory_in_bytes / GIB, 3),
        "argument_gib": round(found.argument_size_in_bytes / GIB, 3),
        "temporary_gib": round(found.temp_size_in_bytes / GIB, 3),
        "predicted_gib": round(predicted.peak_bytes / GIB, 3),
        "compile_s": round(time.perf_counter() - begin, 1),
    }


def measure(full: bool) -> Outcome:
    """1F1B and GPipe; with `--full`, every schedule."""
    model, results = traced(), []
    schedules = [Schedule.ONE_F_ONE_B, Schedule.ONE_F_ONE_B_STASH, Schedule.GPIPE]
    for schedule in schedules if full else [schedules[0], schedules[2]]:
        for count in COUNTS:
            results.append(compiled(model, schedule, count))
            row = results[-1]
            print(
                f"{schedule:12} {count:3} micro-batches: peak {row['peak_gib']:7.2f} GiB, "
                f"predicted {row['predicted_gib']:7.2f} GiB",
                flush=True,
            )
            jax.clear_caches()
    few, many = (r["peak_gib"] for r in results if r["schedule"] == Schedule.ONE_F_ONE_B)
    return Outcome(results, [Claim("peak of 1F1B at 32 micro-batches / at 4", round(many / few, 4), LIMIT)])


if __name__ == "__main__":
    run(measure, devices="compiling for 8 H100")
