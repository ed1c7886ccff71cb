"""How fast layers are planned without JAX: a Llama block under one strategy, under a table of 32, and under all that a
search tries on eight devices."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from harness import Claim, Outcome, run

PARTS = Path(__file__).parent / "parts"
CLAIMED = "llama:llama2-7b"
MORE = ("gpt2:small", "bert:tiny", "t5:tiny", "swin:tiny", "moe:tiny")
REPEATS = 5
ONE_LIMIT_S, TABLE_LIMIT_S = 0.050, 1.0
TEXT = (
    "{model}: {operations} operations, one {one_s:.4f} s, 32 {table_s:.4f} s; of {searched} strategies each "
    "{search_cpu_ms:.2f} ms, at another micro-batch {search_again_cpu_ms:.2f} ms"
)
SEARCH_LIMIT_MS = 3.0
"""CPU time per strategy."""


def measure(full: bool) -> Outcome:
    names = (CLAIMED, *MORE) if full else (CLAIMED,)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, PARTS / "write_specs.py", folder, *names], check=True)
        for name in names:
            results.append({"model": name} | plan(Path(folder) / f"{name.split(':')[0]}.json"))
            print(TEXT.format(**results[-1]))
    claimed = results[0]
    return Outcome(
        results,
        [
            Claim(f"{CLAIMED}: a block planned under one strategy, no JAX", claimed["one_s"], ONE_LIMIT_S, "s"),
            Claim(f"{CLAIMED}: a block planned under 32 strategies", claimed["table_s"], TABLE_LIMIT_S, "s"),
            Claim(
                f"{CLAIMED}: a block planned under the {claimed['searched']} strategies of a search, each",
                claimed["search_cpu_ms"],
                SEARCH_LIMIT_MS,
                "ms CPU",
            ),
        ],
    )


def plan(spec: Path) -> dict[str, Any]:
    """Medians, and all values, over fresh processes in which nothing is cached."""
    command = [sys.executable, str(PARTS / "plan_layers.py"), str(spec)]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(REPEATS)
    ]
    figures = {key: median(run[key] for run in found) for key in ("one_s", "one_cpu_s", "table_s", "table_cpu_s")}
    every = {f"every_{key}": [round(run[key], 4) for run in found] for key in ("one_s", "table_s")}
    searched = found[0]["searched"]
    for key in ("search_cpu", "search_again_cpu"):
        times = [run[f"{key}_s"] * 1e3 / searched for run in found]
        figures[f"{key}_ms"], every[f"every_{key}_ms"] = median(times), [round(t, 3) for t in times]
    return {"operations": found[0]["operations"], "searched": searched, **figures, **every}


if __name__ == "__main__":
    run(measure)
