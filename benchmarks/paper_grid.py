"""Throughput of ways to parallelise four models of 32 and 48 layers under small memories, all by one cost model.

The question of Miao et al., "Galvatron: Efficient Transformer Training over Multiple GPUs Using Automatic Parallelism"
(VLDB 2023, https://arxiv.org/abs/2211.13878): float32 training with Adam on TITAN RTX GPUs with 8 to 20 GB each. Each
cell is the batch, up to 64 examples per device, with the most examples per second; micro-batches are free for all. As
in the paper, the others never rematerialise, and replicate all state but for ZeRO-3.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

from harness import Claim, Outcome, run  # noqa: E402

from galvatron_jax import partition  # noqa: E402
from galvatron_jax.errors import InfeasibleError  # noqa: E402
from galvatron_jax.partition.layer_plan import LayerPlan  # noqa: E402
from galvatron_jax.search import OptimizerMemory, Rule, SearchResult, SearchSpace, search_batches  # noqa: E402
from galvatron_jax.search.explain import describe_groups  # noqa: E402
from galvatron_jax.spec.model import LayerKind, ModelSpec  # noqa: E402
from galvatron_jax.spec.plan import Schedule  # noqa: E402
from galvatron_jax.spec.presets import cluster_preset  # noqa: E402
from galvatron_jax.spec.strategy import LayerStrategy, Remat  # noqa: E402

TRACE = Path(__file__).parent / "parts" / "search_models.py"
ADAM = OptimizerMemory(("same", "same"), 4)
MODELS = tuple(
    f"{family}-{layers}" for family in ("bert:huge", "vit:huge", "t5:large", "swin:huge") for layers in (32, 48)
)
"""Presets of the zoo."""
PADDED = {"bert": ",vocab_size=30592"}
"""30522 pieces rounded up to a multiple of 128, as Megatron-LM does, so that pure TP can share out the embedding."""
MEMORIES_GB, DEVICES = (8, 12, 16, 20), (8, 16, 64)
EXAMPLES_PER_DEVICE = (1, 4, 16, 64)
"""Batches to try; more micro-batches make up for a batch that is not there."""
LIMIT_S = 300.0
"""For one cell of ours; then the best so far."""
OURS = "ours"


def ways(devices: int) -> dict[str, SearchSpace]:
    """The plans that count: those of the paper's baselines, and the whole space.

    Under TP, a layer whose dims the devices do not divide is repeated on each of them.
    """
    plain = SearchSpace(
        tp=False,
        sequence=(),
        zero=(0,),
        remat=(Remat.NONE,),
        schedules=(Schedule.ONE_F_ONE_B_STASH, Schedule.GPIPE),
        disabled_rules=frozenset({Rule.TP_ACROSS_NODES, Rule.TP_WITHOUT_HIDDEN}),
    )
    return {
        "DP": plain,
        "ZeRO-3": replace(plain, zero=(3,)),
        "TP": replace(plain, tp=True, tensor_degrees=(devices,)),
        "PP": replace(plain, pipeline_degrees=(devices,)),
        "2x2xDP": replace(plain, tp=True, tensor_degrees=(2,), pipeline_degrees=(2,)),
        "DP+TP": replace(plain, tp=True, disabled_rules=frozenset()),
        "DP+PP": replace(plain, pipeline_degrees=None),
        OURS: SearchSpace(pipeline_degrees=None),
    }


@dataclass
class Remembering:
    """The partitioner, asked once for each layer, strategy and micro-batch: budgets, batches and ways share plans."""

    plans: dict[tuple, LayerPlan] = field(default_factory=dict)

    def plan_layer(
        self, kind: LayerKind, strategy: LayerStrategy, *, mesh: dict[str, int], microbatch: int, model_microbatch: int
    ) -> LayerPlan:
        key = (id(kind), strategy, tuple(mesh.items()), microbatch, model_microbatch)
        if key not in self.plans:
            self.plans[key] = partition.plan_layer(
                kind, strategy, mesh=mesh, microbatch=microbatch, model_microbatch=model_microbatch
            )
        return self.plans[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(partition, name)


def measure(full: bool) -> Outcome:
    models = MODELS if full else ("bert:huge-32", "swin:huge-32")
    memories, devices = (MEMORIES_GB, DEVICES) if full else ((8, 16), (8,))
    with tempfile.TemporaryDirectory() as folder:
        trace(Path(folder), models)
        tasks = [(Path(folder) / f"{_name(model)}.json", count, memories) for count in devices for model in models]
        results: list[dict[str, Any]] = []
        with ProcessPoolExecutor(min(len(tasks), len(os.sched_getaffinity(0)))) as pool:
            for rows in pool.map(grid, *zip(*tasks, strict=True)):
                results += rows
                for row in rows:
                    print(line(row), flush=True)
    return Outcome(results, claims(results))


def trace(folder: Path, models: tuple[str, ...]) -> None:
    """Writes the specs."""
    described = [f"{_name(model)}={model}{PADDED.get(model.split(':')[0], '')}" for model in models]
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    command = [sys.executable, str(TRACE), str(folder), *described]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def _name(model: str) -> str:
    return model.replace(":", "-")


def grid(spec: Path, devices: int, memories_gb: tuple[int, ...]) -> list[dict[str, Any]]:
    """All memories of one model on one cluster."""
    model, planner = ModelSpec.load(spec), Remembering()
    return [cell(model, devices, memory, planner) for memory in memories_gb]


def cell(model: ModelSpec, devices: int, memory_gb: int, planner: Remembering) -> dict[str, Any]:
    """Throughput of every way."""
    found, seconds = {}, {}
    for name, space in ways(devices).items():
        start = time.process_time()
        found[name] = best(model, space, devices, memory_gb * 10**9, planner)
        seconds[name] = round(time.process_time() - start, 2)
    rates = {name: result.examples_per_s for name, result in found.items() if isinstance(result, SearchResult)}
    others = [rate for name, rate in rates.items() if name != OURS]
    ours = found[OURS]
    rate = rates.get(OURS, 0.0)
    return {
        "model": model.name,
        "devices": devices,
        "memory_gb": memory_gb,
        "examples_per_s": rates,
        "without": {name: result for name, result in found.items() if isinstance(result, str)},
        "global_batch": {name: result.plan.global_batch for name, result in found.items() if name in rates},
        "ours_to_best": rate / max(others) if others else None,
        "ours_to_worst": rate / min(others) if others else None,
        "ours_gap": ours.statistics.gap if isinstance(ours, SearchResult) else None,
        "ours_plan": _describe(ours) if isinstance(ours, SearchResult) else None,
        "search_cpu_s": seconds,
    }


def best(
    model: ModelSpec, space: SearchSpace, devices: int, memory_bytes: int, planner: Remembering
) -> SearchResult | str:
    """The batch with the most examples per second, or why there is none."""
    if space.pipeline_degrees is not None and min(space.pipeline_degrees) > len(model.layers):
        return "too few layers"
    try:
        return search_batches(
            model,
            cluster_preset(f"titanrtx{devices}"),
            global_batches=[devices * examples for examples in EXAMPLES_PER_DEVICE],
            memory_bytes=memory_bytes,
            optimizer=ADAM,
            space=space,
            runners_up=False,
            time_limit_s=LIMIT_S / len(EXAMPLES_PER_DEVICE),
            planner=planner,
        )
    except InfeasibleError:
        return "OOM"


def _describe(result: SearchResult) -> str:
    plan = result.plan
    pipeline = "" if len(plan.stages) == 1 else f"{plan.schedule} over {plan.pipeline_degree} groups; "
    return f"{plan.num_microbatches} micro-batches; {pipeline}" + "; ".join(describe_groups(plan))


def line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    shown = row["without"] | {name: f"{rate:.1f}" for name, rate in row["examples_per_s"].items()}
    rates = ", ".join(f"{name} {shown[name]}" for name in ways(row["devices"]))
    ratios = "nothing else fits"
    if row["ours_to_best"] is not None:
        ratios = f"{row['ours_to_best']:.2f} x the best of the others, {row['ours_to_worst']:.2f} x the worst"
    seconds = sum(row["search_cpu_s"].values())
    return (
        f"{row['model']}, {row['devices']} x TITAN RTX, {row['memory_gb']} GB, examples/s: {rates}; {ratios} "
        f"({seconds:.0f} s CPU)"
    )


def claims(results: list[dict[str, Any]]) -> list[Claim]:
    """No other way beats the whole space."""
    compared = [row for row in results if row["ours_to_best"] is not None]
    if not compared:
        return []
    worst = min(compared, key=lambda row: row["ours_to_best"])
    where = f"{worst['model']}, {worst['devices']} devices, {worst['memory_gb']} GB"
    slower = 1 / worst["ours_to_best"] if worst["ours_to_best"] else float("inf")
    return [Claim(f"best of the others / ours over {len(compared)} cells, the largest ({where})", slower, 1.0)]


if __name__ == "__main__":
    run(measure)
