"""What all benchmarks share: options, claims, honest pairs of timings, and the one JSON object of the last line."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

WALL_PRECISION = 0.01
"""Standard error up to which a ratio of times is believed; a machine with other work to do gives 0.02 to 0.05."""

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """A figure that must not exceed its limit."""

    claim: str
    value: float
    limit: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        mark = "holds" if self.holds else "DOES NOT HOLD"
        return f"{mark}: {self.claim}: {self.value:.4g} (limit {self.limit:g}) {self.unit}".rstrip()


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found."""

    results: list[dict[str, Any]]
    claims: list[Claim]


@dataclass(frozen=True)
class Pairs:
    """Times of two ways to do the same work, taken in turns so that a busy machine slows both."""

    first_s: tuple[float, ...]
    second_s: tuple[float, ...]
    first_cpu_s: tuple[float, ...] = field(repr=False, default=())
    second_cpu_s: tuple[float, ...] = field(repr=False, default=())

    @property
    def ratio(self) -> float:
        """Median over the pairs of first / second."""
        return statistics.median(self._ratios(self.first_s, self.second_s))

    @property
    def cpu_ratio(self) -> float:
        """The same of the process's CPU time, which other processes disturb less."""
        return statistics.median(self._ratios(self.first_cpu_s, self.second_cpu_s))

    @property
    def standard_error(self) -> float:
        """Of the median ratio."""
        return self._standard_error(self._ratios(self.first_s, self.second_s))

    @property
    def settled(self) -> tuple[float, str]:
        """The ratio to go by, and its clock: of time, or of CPU time where other processes made times too unsure.

        Virtual devices outnumber the cores and keep them busy, so that CPU time is what a step takes of an idle
        machine. It does not show devices that wait for one another; time does.
        """
        return (self.ratio, "wall") if self.standard_error <= WALL_PRECISION else (self.cpu_ratio, "cpu")

    @staticmethod
    def _standard_error(ratios: Sequence[float]) -> float:
        """From the quartiles: 1.253 s / sqrt(n), where s is the interquartile range / 1.349."""
        low, _, high = statistics.quantiles(ratios, n=4)
        return 1.253 * (high - low) / 1.349 / math.sqrt(len(ratios))

    @staticmethod
    def _ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
        return [a / b for a, b in zip(first, second, strict=True)]

    def summary(self, first: str, second: str) -> dict[str, Any]:
        """Medians with quartiles, for the results."""
        cpu = self._ratios(self.first_cpu_s, self.second_cpu_s)
        quartiles = statistics.quantiles(self._ratios(self.first_s, self.second_s), n=4)
        return {
            f"{first}_median_s": round(statistics.median(self.first_s), 5),
            f"{second}_median_s": round(statistics.median(self.second_s), 5),
            "ratio_median": round(self.ratio, 4),
            "ratio_standard_error": round(self.standard_error, 4),
            "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
            "cpu_ratio_median": round(self.cpu_ratio, 4),
            "cpu_ratio_standard_error": round(self._standard_error(cpu), 4),
            "clock": self.settled[1],
            "pairs": len(self.first_s),
        }


def time_pairs(
    first: Callable[[], Any],
    second: Callable[[], Any],
    *,
    pairs: int = 15,
    most_pairs: int = 80,
    precision: float = 0.005,
    seconds: float = 40.0,
) -> Pairs:
    """Times two functions in turns, the one that goes first alternating.

    Args:
        first: does the work once and blocks until it is done.
        second: likewise.
        pairs: times that each is timed at least.
        most_pairs: and at most.
        precision: enough pairs are timed when the median ratio's standard error is below this.
        seconds: no pair begins later than this, once there are as many as asked for.
    """
    first(), second()
    wall: dict[int, list[float]] = {0: [], 1: []}
    cpu: dict[int, list[float]] = {0: [], 1: []}
    begin = time.perf_counter()
    for number in range(most_pairs):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start, start_cpu = time.perf_counter(), time.process_time()
            (first, second)[which]()
            wall[which].append(time.perf_counter() - start)
            cpu[which].append(time.process_time() - start_cpu)
        found = Pairs(tuple(wall[0]), tuple(wall[1]), tuple(cpu[0]), tuple(cpu[1]))
        late = time.perf_counter() - begin > seconds
        if number + 1 >= pairs and (late or found.standard_error < precision):
            break
    return found


def virtual_cpus(count: int) -> str:
    """Splits the CPU into virtual devices; call it before JAX is imported.

    Another platform is used where `JAX_PLATFORMS` names it.

    Returns:
        The devices in words, for the name of the hardware.
    """
    assert "jax" not in sys.modules, "JAX is imported already"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if os.environ["JAX_PLATFORMS"] != "cpu":
        return f"{count} {os.environ['JAX_PLATFORMS']} devices"
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={count}".strip()
    return f"{count} virtual devices"


def run(
    measure: Callable[..., Outcome],
    *,
    devices: str = "",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    saved: Callable[[Path], None] | None = None,
) -> NoReturn:
    """Runs a benchmark script: its options, its figures, and its exit code.

    Args:
        measure: does the measurements; told whether `--full` asks for the whole table. Its module's docstring is the
            help.
        devices: what `virtual_cpus` gave.
        options: what this script takes beside: by name, keywords of `add_argument`. `measure` gets them by keyword.
        saved: told the file that `--save` wrote.
    """
    script = sys.modules[measure.__module__]
    name = Path(str(script.__file__)).stem
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py", description=script.__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a claim does not hold")
    parser.add_argument("--full", action="store_true", help="the whole table, which takes longer")
    parser.add_argument("--save", action="store_true", help="write the JSON object to benchmarks/results")
    own = options or {}
    for option, keywords in own.items():
        parser.add_argument(f"--{option}", **keywords)
    chosen = parser.parse_args()
    conditions = _conditions()
    outcome = measure(chosen.full, **{option: getattr(chosen, option) for option in own})
    record = make_record(name, outcome, hardware=hardware(devices), conditions=conditions)
    for claim in outcome.claims:
        print(claim)
    if chosen.save:
        path = save(record)
        if saved is not None:
            saved(path)
    if chosen.json:
        print(json.dumps(record, ensure_ascii=False))
    sys.exit(1 if chosen.check and not all(claim.holds for claim in outcome.claims) else 0)


def make_record(name: str, outcome: Outcome, *, hardware: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a benchmark."""
    return {
        "benchmark": name,
        "hardware": hardware,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "conditions": conditions,
        "results": outcome.results,
        "claims": [{**asdict(claim), "holds": claim.holds} for claim in outcome.claims],
    }


def save(record: dict[str, Any]) -> Path:
    """Writes a record where the results are kept, named by benchmark and hardware."""
    place = re.sub(r"[^a-z0-9]+", "-", record["hardware"].lower()).strip("-")
    path = RESULTS / f"{record['benchmark']}.{place}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return path


def hardware(devices: str = "") -> str:
    """This machine in words, such as `2-core x86-64 CPU, 8 virtual devices`."""
    machine = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"
    return f"{machine}, {devices}" if devices else machine


def _conditions() -> dict[str, Any]:
    """What else was going on, and with which software."""
    return {
        "load_average_before": round(os.getloadavg()[0], 2),
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("jax", "flax", "numpy")},
    }
