"""What each heuristic rule of the search loses, and what it saves: the same searches with one rule switched off.

A rule's loss is how much longer the step is that the search finds with it. Every search is a process of its own, on
one core, as in `search_speed.py`, and takes the best so far when its time is up.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from harness import Claim, Outcome, run
from rich.console import Console
from rich.table import Table
from search_speed import GPT3, T5, Case, find, llama, trace_models

from galvatron_jax.search.space import HEURISTICS, Rule

LIMIT = 1.05
"""Of a step with a rule over one without it."""
WIDTH = 150
SAMPLE = (
    Case(llama(32), "h100x8", 64, memory_gib=24),
    Case(llama(32), "h100x16", 128, memory_gib=40),
    Case("gpt2-xl=gpt2:xl,vocab_size=50304", "titanrtx8", 64),
)
FULL = (
    *SAMPLE,
    Case(llama(32), "h100x8", 64),
    Case(llama(32), "a100x64", 512, memory_gib=40),
    Case("moe-small=moe:small,dtype=bfloat16", "rtx4090x4", 64),
    Case("swin-huge-32=swin:huge-32", "titanrtx8", 128, memory_gib=12),
    Case(T5, "h100x64", 256, memory_gib=16),
    Case(GPT3, "h100x1024", 1536),
)


def measure(full: bool) -> Outcome:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        cases = FULL if full else SAMPLE
        trace_models(Path(folder), dict.fromkeys(case.model for case in cases))
        for case in cases:
            applied = find(case, Path(folder), repeats=1)
            for rule in sorted(HEURISTICS):
                without = find(case, Path(folder), repeats=1, options=["--without", rule])
                results.append(compared(case, rule, applied, without))
                print(line(results[-1]), flush=True)
    Console(width=WIDTH).print(table(results))
    return Outcome(results, claims(results))


def compared(case: Case, rule: Rule, applied: dict[str, Any], without: dict[str, Any]) -> dict[str, Any]:
    """One search with all rules, and without one."""
    return {
        "case": case.title,
        "rule": str(rule),
        "step_ratio": applied["step_s"] / without["step_s"] if applied["fits"] and without["fits"] else None,
        "step_s": applied.get("step_s"),
        "step_without_s": without.get("step_s"),
        "gap": applied.get("gap"),
        "gap_without": without.get("gap"),
        "cpu_s": applied["cpu_s"],
        "cpu_without_s": without["cpu_s"],
    }


def lost(result: dict[str, Any]) -> str:
    """What a rule costs, in words."""
    if result["step_ratio"] is None:
        return "nothing fits" if result["step_without_s"] is None else "all that fits"
    loss = result["step_ratio"] - 1
    return "nothing" if abs(loss) < 1e-6 else f"{loss:.2%}"


def line(result: dict[str, Any]) -> str:
    """One row of the printed table."""
    times = f"{result['cpu_s']:.2f} s CPU, without {result['cpu_without_s']:.2f}"
    return f"{result['case']}: {result['rule']} loses {lost(result)}; {times}"


def table(results: list[dict[str, Any]]) -> Table:
    """Every case, rule after rule."""
    found = Table(title="What heuristic rules lose: step with the rule against step without it")
    for header in ("rule", "search", "loses", "could still be faster by", "CPU seconds", "without"):
        found.add_column(header, justify="left" if header in ("rule", "search", "loses") else "right")
    for rule in sorted(HEURISTICS):
        for one in (one for one in results if one["rule"] == rule):
            gap = "" if one["gap"] is None else f"{one['gap']:.2%}"
            found.add_row(rule, one["case"], lost(one), gap, f"{one['cpu_s']:.2f}", f"{one['cpu_without_s']:.2f}")
        found.add_section()
    return found


def claims(results: list[dict[str, Any]]) -> list[Claim]:
    """The most that each rule loses."""
    made = []
    for rule in sorted(HEURISTICS):
        ratios = [one["step_ratio"] for one in results if one["rule"] == rule and one["step_ratio"] is not None]
        if ratios:
            made.append(Claim(f"{rule}: step with it / without it, the worst of {len(ratios)}", max(ratios), LIMIT))
    return made


if __name__ == "__main__":
    run(measure)
