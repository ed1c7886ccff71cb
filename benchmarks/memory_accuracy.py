"""Predicted memory against what XLA's GPU compiler asks for, plan by plan, for H100s that need not be here.

Beside the predicted bytes of the device that needs most stands `peak_memory_in_bytes` of the compiled step: its
arguments, and one block for all that lives in between; and beside the planned bytes of every collective operation and
group of devices, those of the compiled program, with the reason where they differ. Models have their published depths:
a run of layers is one loop, whose bytes grow with its length and whose compile time does not. Kernels are compiled
without LLVM's optimisations, which buffers do not depend on. A pair that was compiled is kept in `--found FILE`, where
the next call goes on; `--pair TEXT` runs those whose name contains it. Needs the `verify` extra, and no GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
from harness import Claim, Outcome, run
from parts.collective_notes import explained, unlike
from parts.draw_memory import draw
from parts.memory_pairs import PAIRS, SAMPLE, Pair

from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.api.verification import compare_collectives
from galvatron_jax.cost.step import price_plan
from galvatron_jax.runtime.step import build_step
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.trace.model import Traced
from galvatron_jax.units import format_bytes
from galvatron_jax.verify.targets import target_devices

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""What makes the compiler spend less on kernels; measured to leave memory as it is."""
OPTIONS = {
    "pair": {"help": "only pairs whose name contains this text"},
    "found": {"type": Path, "help": "file of compiled figures to go on with, and to add to"},
}
OPTIMIZER = optax.adamw(1e-3)
DIFFERING = len(PAIRS) - 40
"""Pairs whose collectives may differ from the plan."""


def predicted(pair: Pair, traced: Traced) -> dict[str, int]:
    """Bytes on the device that needs most, and their parts."""
    plan = pair.plan(len(traced.spec.layers), traced.spec.name)
    memory = optimizer_memory(OPTIMIZER, traced.spec)
    cluster = cluster_preset(f"h100x{pair.devices}")
    prediction = price_plan(traced.spec, plan, cluster=cluster, optimizer=memory)
    found = max(prediction.memory, key=lambda group: group.peak_bytes)
    return {"peak_bytes": found.peak_bytes, "argument_bytes": found.argument_bytes, **found.model_dump()}


def compiled(pair: Pair, traced: Traced) -> dict[str, Any]:
    """What the compiler says."""
    plan = pair.plan(len(traced.spec.layers), traced.spec.name)
    begin = time.perf_counter()
    step = build_step(traced, plan, OPTIMIZER, devices=target_devices("h100", pair.devices))
    program = step.lowered.compile(compiler_options=QUICK)
    found = program.memory_analysis()
    return {
        "peak_bytes": found.peak_memory_in_bytes,
        "argument_bytes": found.argument_size_in_bytes,
        "temporary_bytes": found.temp_size_in_bytes,
        "compile_s": round(time.perf_counter() - begin, 1),
        "collectives": [
            {
                "operation": check.operation,
                "axes": "".join(check.axes),
                "planned_bytes": check.predicted.bytes,
                "bytes": check.compiled.bytes,
            }
            for check in compare_collectives(step, program)
        ],
    }


def row(pair: Pair, known: dict[str, dict[str, Any]], found: Path | None) -> dict[str, Any]:
    """One line of the table."""
    traced = pair.traced()
    figures = known.get(pair.name)
    if figures is None:
        figures = compiled(pair, traced)
        jax.clear_caches()
        if found is not None:
            with found.open("a") as file:
                file.write(json.dumps({"pair": pair.name, **figures}) + "\n")
    parts = predicted(pair, traced)
    error = parts["peak_bytes"] / figures["peak_bytes"] - 1
    why = explained(pair.name, figures["collectives"])
    line = {"pair": pair.name, "devices": pair.devices, "pp": pair.pp, **figures, "predicted": parts, "error": error}
    return line | ({"why_collectives_differ": why} if why else {})


def shown(line: dict[str, Any]) -> str:
    """A line as people read it."""
    parts = line["predicted"]
    named = {
        "gradients": "gradient", "kept for backward": "residual", "workspace": "workspace", "copies": "copied",
        "for other stages": "reserved",
    }  # fmt: skip
    pieces = ", ".join(f"{name} {format_bytes(parts[f'{part}_bytes'])}" for name, part in named.items())
    exact = "" if parts["argument_bytes"] == line["argument_bytes"] else "  ARGUMENTS DIFFER"
    others = ", ".join(
        f"{each['operation']} over {each['axes']} {each['bytes'] / each['planned_bytes'] - 1:+.1%}"
        if each["planned_bytes"]
        else f"{each['operation']} over {each['axes']} not planned"
        for each in unlike(line["collectives"])
    )
    moved = f"\n  bytes compiled over planned: {others} ({line.get('why_collectives_differ', 'NOT EXPLAINED')})"
    return (
        f"{line['pair']}: peak {format_bytes(line['peak_bytes'])} (arguments {format_bytes(line['argument_bytes'])}, "
        f"temporary {format_bytes(line['temporary_bytes'])}), predicted {format_bytes(parts['peak_bytes'])} "
        f"({pieces}): {line['error']:+.1%}{exact}{moved if others else ''}"
    )


def percentile(values: list[float], share: float) -> float:
    """Linear between ranks."""
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Of all pairs, and of those of one stage."""
    found = []
    for which, some in (("", rows), (", one stage", [line for line in rows if line["pp"] == 1])):
        if not some:
            continue
        errors = [100 * line["error"] for line in some]
        sizes = [abs(error) for error in errors]
        found += [
            Claim(f"mean absolute error of {len(some)} pairs{which}", round(statistics.fmean(sizes), 2), 5.0, "%"),
            Claim(f"95th percentile of the absolute error{which}", round(percentile(sizes, 0.95), 2), 10.0, "%"),
            Claim(f"worst under-prediction{which}", round(max(0.0, -min(errors)), 2), 3.0, "%"),
            Claim(
                f"pairs whose arguments differ{which}",
                sum(line["predicted"]["argument_bytes"] != line["argument_bytes"] for line in some),
                0,
            ),
        ]
    differing = [line for line in rows if unlike(line["collectives"])]
    unexplained = sum("why_collectives_differ" not in line for line in differing)
    return [
        *found,
        Claim(f"pairs of {len(rows)} whose collectives move other bytes than planned", len(differing), DIFFERING),
        Claim("those of them without an explanation", unexplained, 0),
    ]


def measure(full: bool, *, pair: str | None, found: Path | None) -> Outcome:
    """A sample of the pairs; with `--full`, all."""
    known: dict[str, dict[str, Any]] = {}
    if found is not None and found.exists():
        records = [json.loads(line) for line in found.read_text().splitlines()]
        known = {record.pop("pair"): record for record in records}
    chosen = [each for index, each in enumerate(PAIRS) if full or pair is not None or index in SAMPLE]
    rows = []
    for each in chosen:
        if pair is None or pair in each.name:
            rows.append(row(each, known, found))
            print(shown(rows[-1]), flush=True)
    return Outcome(rows, claims(rows))


if __name__ == "__main__":
    run(measure, devices="compiling for H100s", options=OPTIONS, saved=draw)
