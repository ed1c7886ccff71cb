"""Throughput of ways to parallelise four models of 32 and 48 layers under small memories, all by one cost model.

The question of Miao et al., "Galvatron: Efficient Transformer Training over Multiple GPUs Using Automatic Parallelism"
(VLDB 2023, https://arxiv.org/abs/2211.13878): float32 training with Adam on TITAN RTX GPUs with 8 to 20 GB each. Each
cell has the batch, up to 64 examples per device, with the most examples per second, and the best number of
micro-batches for each way, which the paper's pure DP, ZeRO-3 and TP did not have. As in the paper, the other ways
replicate all state but for ZeRO-3 and keep all activations; a second column per way lets it rematerialise any layer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

from harness import Claim, Outcome, run  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from galvatron_jax import partition  # noqa: E402
from galvatron_jax.errors import InfeasibleError  # noqa: E402
from galvatron_jax.partition.series import LayerSeries  # noqa: E402
from galvatron_jax.search import OptimizerMemory, Rule, SearchResult, SearchSpace, search  # noqa: E402
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
"""Presets of the zoo, with the paper's sizes: table 1, 502 to 1016 million parameters."""
PADDED = {"bert": ",vocab_size=30592"}
"""30522 pieces rounded up to a multiple of 128, as Megatron-LM does, so that pure TP can share out the embedding."""
MEMORIES_GB, DEVICES = (8, 12, 16, 20), (8, 16, 64)
SAMPLE_MODELS, SAMPLE_MEMORIES_GB, SAMPLE_DEVICES = ("bert:huge-32", "t5:large-32"), (8, 16), (8,)
EXAMPLES_PER_DEVICE = (64, 16, 4, 1)
"""Batches to try; a smaller one only where nothing fits. Micro-batches of the same size, more of them in a step, leave
a larger share of the time to them: the update, the synchronisation and the pipeline's bubble come once."""
LIMIT_S = 120.0
"""For each search; then the best so far."""
OURS, REMAT = "ours", "+remat"
ALL_REMAT = (Remat.NONE, Remat.ATTENTION, Remat.DOTS, Remat.FULL)
WIDTH = 200
"""Of the table, in characters."""
ROUNDING = 1e-9
"""Of sums of the same seconds in another order."""


@dataclass(frozen=True)
class Way:
    """Plans that count under one name."""

    space: SearchSpace
    data_parallel: bool = True
    """Whether what pipeline and tensor parallelism leave of the devices is data parallel in every layer: then only
    micro-batches that divide over it count, as no layer may be repeated."""

    def spaces(self, devices: int, global_batch: int) -> list[SearchSpace]:
        """The plans as spaces to search."""
        if not self.data_parallel:
            return [self.space]
        found = []
        for groups in self.space.pipeline_degrees or [count for count in range(1, devices + 1) if devices % count == 0]:
            ways = devices // groups // max(self.space.tensor_degrees or (1,))
            counts = [count for count in range(1, global_batch + 1) if global_batch % (count * ways) == 0]
            found.append(replace(self.space, pipeline_degrees=(groups,), num_microbatches=tuple(counts)))
        return found


def ways(devices: int) -> dict[str, Way]:
    """The paper's baselines, the same with rematerialisation, and the whole space.

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
    spaces = {
        "DP": plain,
        "ZeRO-3": replace(plain, zero=(3,)),
        "TP": replace(plain, tp=True, tensor_degrees=(devices,)),
        "PP": replace(plain, pipeline_degrees=(devices,)),
        "2x2xDP": replace(plain, tp=True, tensor_degrees=(2,), pipeline_degrees=(2,)),
        "DP+TP": replace(plain, tp=True, disabled_rules=frozenset()),
        "DP+PP": replace(plain, pipeline_degrees=None),
    }
    spaces |= {name + REMAT: replace(space, remat=ALL_REMAT) for name, space in spaces.items()}
    made = {name: Way(space, data_parallel=not name.startswith("DP+TP")) for name, space in spaces.items()}
    return made | {OURS: Way(SearchSpace(pipeline_degrees=None), data_parallel=False)}


@dataclass
class Remembering:
    """The partitioner, asked once for each layer and strategy: memories and ways share plans."""

    plan_layer = staticmethod(partition.plan_layer)
    boundary_collectives = staticmethod(partition.boundary_collectives)
    distinct_remats = staticmethod(partition.distinct_remats)
    looks_up_parameters = staticmethod(partition.looks_up_parameters)
    found: dict[tuple, tuple[LayerSeries, ...]] = field(default_factory=dict)

    def plan_series(
        self,
        kind: LayerKind,
        strategy: LayerStrategy,
        *,
        mesh: dict[str, int],
        microbatches: tuple[int, ...],
        model_microbatch: int,
    ) -> tuple[LayerSeries, ...]:
        key = (id(kind), strategy, tuple(mesh.items()), microbatches, model_microbatch)
        if key not in self.found:
            self.found[key] = partition.plan_series(
                kind, strategy, mesh=mesh, microbatches=microbatches, model_microbatch=model_microbatch
            )
        return self.found[key]


@dataclass(frozen=True)
class Setting:
    """A model on so many devices."""

    spec: Path
    devices: int
    memories_gb: tuple[int, ...]
    limit_s: float = LIMIT_S


def measure(full: bool) -> Outcome:
    models, memories, devices = (
        (MODELS, MEMORIES_GB, DEVICES) if full else (SAMPLE_MODELS, SAMPLE_MEMORIES_GB, SAMPLE_DEVICES)
    )
    with tempfile.TemporaryDirectory() as folder:
        trace(Path(folder), models)
        settings = [
            Setting(Path(folder) / f"{_name(model)}.json", count, memories) for count in devices for model in models
        ]
        results = measured(settings)
    Console(width=WIDTH).print(table(results))
    return Outcome(results, claims(results))


def measured(settings: list[Setting]) -> list[dict[str, Any]]:
    """Every cell, in the order of the settings; the largest clusters are begun first, for they take longest."""
    rows: dict[int, list[dict[str, Any]]] = {}
    order = sorted(range(len(settings)), key=lambda index: -settings[index].devices)
    with ProcessPoolExecutor(min(len(settings), len(os.sched_getaffinity(0)))) as pool:
        begun = {pool.submit(grid, settings[index]): index for index in order}
        for done in as_completed(begun):
            rows[begun[done]] = done.result()
            print(f"{len(rows)} of {len(settings)} models and clusters done", file=sys.stderr, flush=True)
    return [row for index in range(len(settings)) for row in rows[index]]


def trace(folder: Path, models: tuple[str, ...]) -> None:
    """Writes the specs."""
    described = [f"{_name(model)}={model}{PADDED.get(model.split(':')[0], '')}" for model in models]
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    command = [sys.executable, str(TRACE), str(folder), *described]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def _name(model: str) -> str:
    return model.replace(":", "-")


def grid(setting: Setting) -> list[dict[str, Any]]:
    """All memories of one setting, the smallest first, each printed when it is found."""
    model, planner = ModelSpec.load(setting.spec), Remembering()
    found: dict[str, SearchResult | str] = {}
    rows = []
    for memory_gb in sorted(setting.memories_gb, reverse=True):
        start = time.process_time()
        for name, way in ways(setting.devices).items():
            found[name] = best(model, way, setting, memory_gb * 10**9, planner, known=found.get(name))
        rows.append(row(model, setting.devices, memory_gb, found) | {"cpu_s": round(time.process_time() - start, 1)})
        print(line(rows[-1]), flush=True)
    return rows[::-1]


def best(
    model: ModelSpec,
    way: Way,
    setting: Setting,
    memory_bytes: int,
    planner: Remembering,
    *,
    known: SearchResult | str | None = None,
) -> SearchResult | str:
    """The plan with the most examples per second, or why there is none.

    Args:
        model: the model.
        way: which plans count.
        setting: the devices and the time limit.
        memory_bytes: of each device.
        planner: the partitioner.
        known: what was found with more memory: where that fits, or nothing did, there is no more to find.
    """
    if isinstance(known, str) or (known is not None and known.prediction.peak_bytes <= memory_bytes):
        return known
    if way.space.pipeline_degrees is not None and min(way.space.pipeline_degrees) > len(model.layers):
        return "too few layers"
    for examples in EXAMPLES_PER_DEVICE:
        batch = setting.devices * examples
        found = [
            one
            for space in way.spaces(setting.devices, batch)
            if (one := _search(model, space, setting, memory_bytes, batch, planner)) is not None
        ]
        if found:
            return max(found, key=lambda one: one.examples_per_s)
    return "OOM"


def _search(
    model: ModelSpec, space: SearchSpace, setting: Setting, memory_bytes: int, batch: int, planner: Remembering
) -> SearchResult | None:
    """The fastest plan that fits."""
    if space.pipeline_degrees is not None and min(space.pipeline_degrees) > len(model.layers):
        return None
    try:
        return search(
            model,
            cluster_preset(f"titanrtx{setting.devices}"),
            global_batch=batch,
            memory_bytes=memory_bytes,
            optimizer=ADAM,
            space=space,
            runners_up=False,
            time_limit_s=setting.limit_s,
            planner=planner,
        )
    except InfeasibleError:
        return None


def row(model: ModelSpec, devices: int, memory_gb: int, found: dict[str, SearchResult | str]) -> dict[str, Any]:
    """One cell: throughput of every way."""
    results = {name: result for name, result in found.items() if isinstance(result, SearchResult)}
    rates = {name: result.examples_per_s for name, result in results.items()}
    ours = results.get(OURS)
    rival = max((name for name in rates if name != OURS), key=lambda name: rates[name], default=None)
    plain = [rate for name, rate in rates.items() if name != OURS and not name.endswith(REMAT)]
    with_remat = [rate for name, rate in rates.items() if name.endswith(REMAT)]
    mine = rates.get(OURS, 0.0)
    return {
        "model": model.name,
        "devices": devices,
        "memory_gb": memory_gb,
        "examples_per_s": {name: round(rate, 3) for name, rate in rates.items()},
        "without": {name: result for name, result in found.items() if isinstance(result, str)},
        "global_batch": {name: result.plan.global_batch for name, result in results.items()},
        "ours_to_best": mine / max(plain) if plain else None,
        "ours_to_worst": mine / min(plain) if plain else None,
        "ours_to_best_with_remat": mine / max(with_remat) if with_remat else None,
        "ours_gap": None if ours is None else ours.statistics.gap,
        "plans": {name: _describe(result) for name, result in results.items() if name in (OURS, rival)},
    }


def _describe(result: SearchResult) -> str:
    plan = result.plan
    pipeline = "" if len(plan.stages) == 1 else f"{plan.schedule} over {plan.pipeline_degree} groups; "
    return f"{plan.num_microbatches} micro-batches; {pipeline}" + "; ".join(describe_groups(plan))


def _shown(found: dict[str, Any], name: str) -> str:
    if name in found["examples_per_s"]:
        return f"{found['examples_per_s'][name]:.1f}"
    return {"too few layers": "-"}.get(found["without"][name], found["without"][name])


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def line(found: dict[str, Any]) -> str:
    """One cell as it is found, without and with rematerialisation."""
    rates = ", ".join(
        f"{name} {_shown(found, name)}" + ("" if name == OURS else f" ({_shown(found, name + REMAT)})")
        for name in ways(found["devices"])
        if not name.endswith(REMAT)
    )
    return (
        f"{found['model']}, {found['devices']} x TITAN RTX, {found['memory_gb']} GB, examples/s (with remat): {rates}; "
        f"{found['cpu_s']:.0f} s CPU"
    )


def table(results: list[dict[str, Any]]) -> Table:
    """All cells: each way without / with rematerialisation, and ours against them."""
    names = [name for name in ways(8) if name != OURS and not name.endswith(REMAT)]
    shown = Table(title="Examples per second on TITAN RTX by the cost model, without / with rematerialisation")
    for header in ("model", "devices", "GB"):
        shown.add_column(header)
    for header in (*names, OURS, "/ best", "/ worst", "/ best with remat", "could be faster by"):
        shown.add_column(header, justify="right")
    for found in results:
        gap = found["ours_gap"]
        shown.add_row(
            *(str(found[key]) for key in ("model", "devices", "memory_gb")),
            *(f"{_shown(found, name)} / {_shown(found, name + REMAT)}" for name in names),
            _shown(found, OURS),
            *(_ratio(found[key]) for key in ("ours_to_best", "ours_to_worst", "ours_to_best_with_remat")),
            "-" if gap is None else "proven" if gap <= ROUNDING else f"{gap:.1%}",
        )
    return shown


def claims(results: list[dict[str, Any]]) -> list[Claim]:
    """No other way beats the whole space."""
    made = []
    for key, what in (("ours_to_best", "the others"), ("ours_to_best_with_remat", "the others with remat")):
        compared = [found for found in results if found[key] is not None]
        if not compared:
            continue
        worst = min(compared, key=lambda found: found[key])
        where = f"{worst['model']}, {worst['devices']} devices, {worst['memory_gb']} GB"
        slower = 1 / worst[key] if worst[key] else float("inf")
        text = f"best of {what} / ours over {len(compared)} cells, the largest ({where})"
        made.append(Claim(text, slower, 1.0 + ROUNDING))
    return made


if __name__ == "__main__":
    run(measure)
