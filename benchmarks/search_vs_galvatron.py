"""This package's search against Hetu-Galvatron's, on the profiles that it publishes and the plans it finds from them.

Both plans of a cell, one memory per device, are priced by one cost model and live under one memory rule
(`parts/galvatron_plans.py`): Hetu-Galvatron's own formulas for layers, embedding and head, its own rule of what fits,
and a simulated schedule in place of its formula for pipelines, which prices the middle stages next to nothing.
The schedule is simulated twice, in lockstep as this package runs it (which is what its search minimises) and with
stages that wait for one another's values only. Devices, batch and memory are those of each plan's file.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

from harness import Claim, Outcome, run  # noqa: E402
from parts.galvatron_plans import DegreesPlan, Priced, price  # noqa: E402
from parts.galvatron_search import Found, search  # noqa: E402

from galvatron_jax.cost.galvatron import GalvatronProfile, usable_bytes  # noqa: E402
from galvatron_jax.errors import GalvatronError, InputError  # noqa: E402
from galvatron_jax.spec.files import read_data  # noqa: E402
from galvatron_jax.spec.plan import Plan  # noqa: E402
from galvatron_jax.units import GIB  # noqa: E402

REPEATS, FULL_REPEATS = 3, 11
"""Searches of each cell; their median is the CPU time."""
_DIGITS = 9
"""Of ratios: sums of the same times in another order differ in the sixteenth."""


def folder(text: str) -> Path:
    """An argument that names a folder."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: no such folder")
    return path


OPTIONS = {
    "profiles": {
        "type": folder,
        "required": True,
        "metavar": "DIR",
        "help": "holds a folder per model (computation_profiling_*.json, memory_profiling_*.json) and one named "
        "hardware (allreduce_bandwidth_*, p2p_bandwidth_*, sp_time_*, overlap_coefficient.json)",
    },
    "plans": {
        "type": folder,
        "required": True,
        "metavar": "DIR",
        "help": "holds its plans, a file per memory that has it in its name: MODEL_8gpu_16GB_batch64.json, or "
        "galvatron_config_*_16GB_*.json",
    },
    "model": {"default": "llama2-7b", "help": "name of the model's folder, and of its plans where any has it"},
    "memory": {"type": int, "nargs": "+", "metavar": "GB", "help": "only these memories per device"},
}  # fmt: skip


def measure(full: bool, *, profiles: Path, plans: Path, model: str, memory: list[int] | None) -> Outcome:
    try:
        rows = [
            cell(profiles, path, model, memory_gb, repeats=FULL_REPEATS if full else REPEATS)
            for memory_gb, path in find_plans(plans, model, memory)
        ]
    except GalvatronError as error:
        sys.exit(f"search_vs_galvatron: {error}")
    print(table(rows))
    return Outcome(rows, claims(rows))


def find_plans(plans: Path, model: str, memories_gb: list[int] | None) -> list[tuple[int, Path]]:
    """Files of plans, by memory.

    Raises:
        InputError: there are none, or none of a memory asked for.
    """
    sized = [(int(match[1]), path) for path in plans.glob("*.json") if (match := re.search(r"_(\d+)GB", path.name))]
    named = sorted(pair for pair in sized if model in pair[1].name) or sorted(sized)
    if not named:
        raise InputError(
            f"{plans}: holds no plans. Expected files that name their memory, such as {model}_8gpu_16GB_batch64.json."
        )
    missing = set(memories_gb or ()) - {memory_gb for memory_gb, _ in named}
    if missing:
        have = ", ".join(f"{memory_gb} GB" for memory_gb, _ in named)
        raise InputError(f"{plans}: holds no plan for {min(missing)} GB; it has {have}.")
    return [pair for pair in named if not memories_gb or pair[0] in memories_gb]


def cell(profiles: Path, path: Path, model: str, memory_gb: int, *, repeats: int) -> dict[str, Any]:
    """Both plans under one memory."""
    plan, figures = Plan.from_galvatron(path), read_data(path)
    machine = {
        "num_nodes": math.prod(axis.size for axis in plan.mesh if axis.level == "inter"),
        "devices_per_node": math.prod(axis.size for axis in plan.mesh if axis.level == "intra"),
    }
    theirs = DegreesPlan.of(plan)
    usable, seconds = usable_bytes(memory_gb * GIB), []
    for _ in range(repeats):
        start = time.process_time()
        profile = GalvatronProfile.load(profiles, model=model, **machine)
        ours = search(
            profile,
            num_devices=math.prod(machine.values()),
            global_batch=theirs.global_batch,
            usable_bytes=usable,
        )
        seconds.append(time.process_time() - start)
    blocks = sum(map(len, theirs.stages))
    if blocks != profile.num_layers:
        raise InputError(f"{path}: a plan for {blocks} layers, but {profiles / model} is of {profile.num_layers}.")
    return _row(memory_gb, usable, theirs, ours, profile) | {
        "theirs_reported_examples_per_s": figures.get("throughput"),
        "theirs_cpu_s": figures.get("cpu_s"),
        "ours_cpu_s": round(statistics.median(seconds), 3),
    }


def _row(memory_gb: int, usable: int, theirs: DegreesPlan, ours: Found, profile: GalvatronProfile) -> dict[str, Any]:
    by_name = {"theirs": (theirs, price(profile, theirs)), "ours": (ours.plan, price(profile, ours.plan))}
    row: dict[str, Any] = {"memory_gb": memory_gb, "usable_bytes": usable, "global_batch": theirs.global_batch}
    for name, (plan, priced) in by_name.items():
        row |= {f"{name}_{key}": value for key, value in _figures(plan, priced).items()}
    first, second = by_name["theirs"][1], by_name["ours"][1]
    return row | {
        "ours_gap": round(1 - ours.bound_s / ours.seconds, _DIGITS),
        "theirs_fits": max(first.stage_bytes) <= usable,
        "faster_lockstep": round(first.lockstep_s / second.lockstep_s, _DIGITS),
        "faster_asynchronous": round(first.asynchronous_s / second.asynchronous_s, _DIGITS),
    }


def _figures(plan: DegreesPlan, priced: Priced) -> dict[str, Any]:
    return {
        "lockstep_s": priced.lockstep_s,
        "asynchronous_s": priced.asynchronous_s,
        "published_formula_s": priced.published_s,
        "lockstep_examples_per_s": plan.global_batch / priced.lockstep_s,
        "asynchronous_examples_per_s": plan.global_batch / priced.asynchronous_s,
        "most_bytes": round(max(priced.stage_bytes)),
        "plan": plan.describe(),
    }


COLUMNS = (
    ("GB", "memory_gb", "{}"),
    ("theirs, said ex/s", "theirs_reported_examples_per_s", "{:.3f}"),
    ("lockstep s", "theirs_lockstep_s", "{:.4f}"),
    ("ex/s", "theirs_lockstep_examples_per_s", "{:.3f}"),
    ("async ex/s", "theirs_asynchronous_examples_per_s", "{:.3f}"),
    ("CPU s", "theirs_cpu_s", "{:.0f}"),
    ("ours, lockstep s", "ours_lockstep_s", "{:.4f}"),
    ("ex/s", "ours_lockstep_examples_per_s", "{:.3f}"),
    ("async ex/s", "ours_asynchronous_examples_per_s", "{:.3f}"),
    ("CPU s", "ours_cpu_s", "{:.2f}"),
    ("ours / theirs, lockstep", "faster_lockstep", "{:.4f}"),
    ("async", "faster_asynchronous", "{:.4f}"),
)
"""Headings, keys of rows, and formats."""


def table(rows: list[dict[str, Any]]) -> str:
    """What is printed: a line per memory, then the plans."""
    lines = [[title for title, _, _ in COLUMNS]]
    lines += [["-" if row[key] is None else form.format(row[key]) for _, key, form in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    for row in rows:
        proven = "the optimum" if not row["ours_gap"] else f"within {row['ours_gap']:.2%} of the optimum"
        shown += [
            f"{row['memory_gb']} GB, theirs: {row['theirs_plan']}",
            f"{row['memory_gb']} GB, ours ({proven}): {row['ours_plan']}",
        ]
    return "\n".join(shown)


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Ours is at least as fast in every cell, faster in most, and found in less CPU time."""
    found = []
    for schedule in ("lockstep", "asynchronous"):
        ratio, worst = max((1 / row[f"faster_{schedule}"], row["memory_gb"]) for row in rows)
        found.append(Claim(f"step of ours / theirs, {schedule}, the largest ({worst} GB)", ratio, 1.0))
        level = sum(row[f"faster_{schedule}"] <= 1.0 for row in rows)
        claim = f"cells of {len(rows)} in which ours is no faster, {schedule}"
        found.append(Claim(claim, level, (len(rows) - 1) // 2))
    known = [row for row in rows if row["theirs_cpu_s"]]
    if known:
        ratio, worst = max((row["ours_cpu_s"] / row["theirs_cpu_s"], row["memory_gb"]) for row in known)
        found.append(Claim(f"CPU seconds of ours / theirs, the largest ({worst} GB)", ratio, 1.0))
    return found


if __name__ == "__main__":
    run(measure, options=OPTIONS)
