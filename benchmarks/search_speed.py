"""How long searches take on one core: three that people ask for, and how time grows with layers, devices and memory.

CPU seconds of `search` alone in a fresh process: a model is traced and written to a document once, in a process of its
own (`trace_cpu_s`), and what searches never imports JAX. Of several runs the least counts, since what else a machine
does only adds; all are recorded. With matplotlib (the `plot` extra), `--save` draws the growth
too, beside the record: `results/search_speed.*.svg`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import Claim, Outcome, run
from rich.console import Console
from rich.table import Table

PARTS = Path(__file__).parent / "parts"
REPEATS = 5
MEMORY_LIMIT_GIB = 1.0
STOP_S = 60.0
"""A search that takes longer gives the best plan so far; its claim fails anyhow."""
PROVEN = 1e-9
"""Gap that is rounding."""
GIB = 2**30
WIDTH = 100


@dataclass(frozen=True)
class Case:
    """A search: a model as `parts/search_models.py` takes it, a preset, and the batch."""

    model: str
    cluster: str
    global_batch: int
    memory_gib: int | None = None
    """None is the device's own."""
    limit_s: float | None = None
    """What is claimed of its CPU time."""
    grows: str = ""
    """With what, in the table of growth."""
    grown_to: int = 0
    """How many, or how much."""

    @property
    def name(self) -> str:
        return self.model.split("=", 1)[0]

    @property
    def title(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib} GiB"
        return f"{self.name} on {self.cluster}, batch {self.global_batch}{memory}"


def llama(layers: int) -> str:
    """Llama-2-7B's layers, 32 of which are Llama-2-7B."""
    name = "llama2-7b" if layers == 32 else f"llama2-7b-{layers}-layers"
    return f"{name}=llama:llama2-7b,dtype=bfloat16,seq_length=2048,num_layers={layers}"


# GPT-3's sizes (Brown et al., 2020, table 2.1) and batch; the vocabulary rounded as Megatron-LM does.
GPT3 = "gpt3-96-layers=gpt2:xl,dtype=bfloat16,num_layers=96,width=12288,num_heads=96,vocab_size=51200,seq_length=2048"
T5 = "t5-48+48-layers=t5:large-48,dtype=bfloat16,num_encoder_layers=48,num_decoder_layers=48"
CLAIMED = (
    Case(llama(32), "h100x8", 64, limit_s=1.0),
    Case(GPT3, "h100x1024", 1536, limit_s=10.0),
    Case(T5, "h100x64", 256, limit_s=5.0),
)


def growth(full: bool) -> list[Case]:
    """One quantity grown at a time; the batch grows with the devices, eight examples each."""
    layers = (8, 16, 32, 64, 128) if full else (8, 32, 128)
    devices = (8, 16, 32, 64, 128, 256, 512, 1024) if full else (8, 64, 512)
    memories = (20, 24, 32, 40, 48, 56, 64, 72, 79) if full else (20, 40, 79)
    return [
        *(Case(llama(count), "h100x8", 64, grows="layers", grown_to=count) for count in layers),
        *(Case(llama(32), f"h100x{count}", 8 * count, grows="devices", grown_to=count) for count in devices),
        *(Case(llama(32), "h100x8", 64, memory_gib=gib, grows="memory, GiB", grown_to=gib) for gib in memories),
    ]


def measure(full: bool) -> Outcome:
    cases = [*CLAIMED, *growth(full)]
    with tempfile.TemporaryDirectory() as folder:
        traced = trace_models(Path(folder), dict.fromkeys(case.model for case in cases))
        results = []
        for case in cases:
            results.append(find(case, Path(folder), repeats=REPEATS if case.limit_s or full else 1))
            results[-1] |= {"trace_cpu_s": round(traced[case.name]["trace_cpu_s"], 2)}
            print(line(results[-1]), flush=True)
    Console(width=WIDTH).print(growth_table(results))
    return Outcome(results, claims(results))


def trace_models(folder: Path, models: Iterable[str]) -> dict[str, dict[str, float]]:
    """Writes the specs; seconds per name."""
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    command = [sys.executable, str(PARTS / "search_models.py"), str(folder), *models]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def find(case: Case, folder: Path, *, repeats: int, options: Iterable[str] = ()) -> dict[str, Any]:
    """The fastest of fresh processes; `options` as `time_search.py` takes them."""
    command = [sys.executable, str(PARTS / "time_search.py"), str(folder / f"{case.name}.json")]
    command += [case.cluster, str(case.global_batch), "--limit", str(STOP_S)]
    command += [] if case.memory_gib is None else ["--memory", str(case.memory_gib * GIB)]
    command += options
    found = [_run(command)]
    while len(found) < repeats and found[0]["cpu_s"] < STOP_S / 4:
        found.append(_run(command))
    fastest = min(found, key=lambda one: one["cpu_s"])
    return {
        "case": case.title,
        "grows": case.grows,
        "grown_to": case.grown_to,
        **fastest,
        "cpu_s": round(fastest["cpu_s"], 3),
        "every_cpu_s": [round(one["cpu_s"], 3) for one in found],
        "host_memory_gib": round(max(one["host_memory_gib"] for one in found), 3),
        "shares": {part: round(share, 3) for part, share in fastest["shares"].items()},
    }


def _run(command: list[str]) -> dict[str, Any]:
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def line(result: dict[str, Any]) -> str:
    """One row of the printed table."""
    parts = ", ".join(f"{part} {share:.0%}" for part, share in result["shares"].items())
    found = "nothing fits"
    if result["fits"]:
        proof = "proven" if result["gap"] <= PROVEN else f"within {result['gap']:.2%}"
        found = f"step {result['step_s']:.3f} s ({proof}), {result['pipeline_degree']} groups"
    grows = f"{result['grows']}: " if result["grows"] else ""
    return (
        f"{grows}{result['case']}: {result['cpu_s']:.2f} s CPU ({parts}), {result['host_memory_gib']:.2f} GiB; {found}"
    )


def growth_table(results: list[dict[str, Any]]) -> Table:
    """How the time grows with each quantity, the others as they are."""
    table = Table(title="One search of Llama-2-7B, by what grows (else 32 layers on 8 H100s, all their memory)")
    for header in ("grows", "to", "CPU seconds", "planning", "pricing", "solving", "host GiB", "could be faster by"):
        table.add_column(header, justify="left" if header == "grows" else "right")
    before = ""
    for found in (one for one in results if one["grows"]):
        if before not in ("", found["grows"]):
            table.add_section()
        before = found["grows"]
        table.add_row(
            found["grows"],
            str(found["grown_to"]),
            f"{found['cpu_s']:.2f}",
            *(f"{found['shares'][part]:.0%}" for part in ("planning", "pricing", "solving")),
            f"{found['host_memory_gib']:.2f}",
            "nothing fits" if not found["fits"] else "proven" if found["gap"] <= PROVEN else f"{found['gap']:.2%}",
        )
    return table


def draw(record: Path) -> None:
    """The picture of growth, beside the record."""
    if find_spec("matplotlib") is None:
        print("The growth is not drawn: matplotlib, the `plot` extra, is not installed.", file=sys.stderr)
        return
    command = [sys.executable, str(PARTS / "draw_growth.py"), str(record), str(record.with_suffix(".svg"))]
    subprocess.run(command, check=True)


def claims(results: list[dict[str, Any]]) -> list[Claim]:
    """Times of the first cases, and memory of all."""
    made = []
    for case, found in zip(CLAIMED, results, strict=False):
        assert case.limit_s is not None
        made.append(Claim(f"{case.title}: search", found["cpu_s"], case.limit_s, "s CPU"))
        if found["fits"]:
            made.append(Claim(f"{case.title}: how much faster a plan could be", found["gap"], PROVEN))
    largest = max(results, key=lambda found: found["host_memory_gib"])
    memory = f"peak host memory of any search ({largest['case']})"
    return [*made, Claim(memory, largest["host_memory_gib"], MEMORY_LIMIT_GIB, "GiB")]


if __name__ == "__main__":
    run(measure, saved=draw)
