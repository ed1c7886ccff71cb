"""Bandwidths and collective times, as Hetu-Galvatron's hardware profiler writes them, one file set per machine size.

- `allreduce_bandwidth_{n}nodes_{g}gpus_per_node.json`: `allreduce_size_{k}_consec_{0|1}`, bus bandwidth in GB/s of
  groups of `k` devices that are neighbours (1) or as far apart as possible (0);
- `p2p_bandwidth_...`: `pp_size_{k}`, GB/s between the neighbours of a pipeline of `k` stages;
- `sp_time_...`: `allreduce_size_{k}_{m}MB_time` and `all2all_size_{k}_{m}MB_time`, milliseconds at `m` MB per device;
- `overlap_coefficient.json`: `overlap_coe`, by how much computation and communication slow each other down.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from galvatron_jax.errors import DocumentError
from galvatron_jax.spec.files import read_data
from galvatron_jax.spec.galvatron.reading import MB, Faults
from galvatron_jax.spec.validation import did_you_mean

_SET = re.compile(r"(allreduce_bandwidth|p2p_bandwidth|sp_time)_(\d+)nodes_(\d+)gpus_per_node\.json")
_ALLREDUCE = re.compile(r"allreduce_size_(\d+)_consec_([01])")
_P2P = re.compile(r"pp_size_(\d+)")
_SP_TIME = re.compile(r"(allreduce|all2all)_size_(\d+)_(\d+)MB_time")
_GB = 1e9
"""Bytes of a GB in bandwidths: decimal, as nccl-tests prints them."""


@dataclass(frozen=True)
class HardwareProfile:
    """Bandwidths and collective times of one machine size."""

    source: str
    num_nodes: int
    devices_per_node: int
    allreduce_bytes_per_s: Mapping[tuple[int, bool], float]
    """Bus bandwidth by group size and whether its devices are neighbours."""
    p2p_bytes_per_s: Mapping[int, float]
    """By number of pipeline stages."""
    allreduce_seconds: Mapping[int, Mapping[int, float]]
    """By group size, then bytes per device; empty where the file set has none."""
    alltoall_seconds: Mapping[int, Mapping[int, float]]
    """The same for all-to-alls."""
    overlap_slowdown: float | None
    """Factor by which computation and communication slow down when they overlap; None where it was not measured."""

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        return self.num_nodes * self.devices_per_node


def read_hardware(
    folder: str | PathLike[str], *, num_nodes: int | None = None, devices_per_node: int | None = None
) -> HardwareProfile:
    """Reads the hardware files of one machine size from a folder.

    Args:
        folder: Where the files lie.
        num_nodes: Nodes of the machine; None where the folder has files of one size only.
        devices_per_node: Devices of each node; None likewise.

    Raises:
        DocumentError: naming every fault of a file, or the sizes that the folder has.
    """
    folder = Path(folder)
    nodes, devices = _choose(folder, num_nodes, devices_per_node)
    size = f"{nodes}nodes_{devices}gpus_per_node.json"
    bandwidths, p2p = _bandwidths(folder / f"allreduce_bandwidth_{size}"), _p2p(folder / f"p2p_bandwidth_{size}")
    seconds = _seconds(folder / f"sp_time_{size}")
    return HardwareProfile(
        source=str(folder),
        num_nodes=nodes,
        devices_per_node=devices,
        allreduce_bytes_per_s=bandwidths,
        p2p_bytes_per_s=p2p,
        allreduce_seconds=seconds["allreduce"],
        alltoall_seconds=seconds["all2all"],
        overlap_slowdown=_overlap(folder / "overlap_coefficient.json"),
    )


def _choose(folder: Path, num_nodes: int | None, devices_per_node: int | None) -> tuple[int, int]:
    """The machine size to read, of those a folder has all-reduce bandwidths of."""
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = did_you_mean(folder.name, near) if near else ""
        raise DocumentError(f"{folder}: no such folder of Hetu-Galvatron hardware files.{hint}")
    names = (match for path in folder.iterdir() if (match := _SET.fullmatch(path.name)))
    sizes = sorted({(int(match[2]), int(match[3])) for match in names if match[1] == "allreduce_bandwidth"})
    fitting = [
        size for size in sizes if num_nodes in (None, size[0]) and devices_per_node in (None, size[1])
    ]  # fmt: skip
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{nodes} x {devices}" for nodes, devices in sizes)
    if not sizes:
        raise DocumentError(f"{folder}: holds no allreduce_bandwidth_{{n}}nodes_{{g}}gpus_per_node.json file.")
    if not fitting:
        wanted = f"{num_nodes or 'any'} nodes x {devices_per_node or 'any'} devices"
        raise DocumentError(f"{folder}: holds no bandwidths of {wanted}; it has nodes x devices {listed}.")
    raise DocumentError(
        f"{folder}: holds bandwidths of several machines (nodes x devices: {listed}). Choose one: give `num_nodes` and "
        "`devices_per_node`."
    )


def _entries(path: Path, pattern: re.Pattern, form: tuple[str, ...], unit: str) -> Iterator[tuple[re.Match, float]]:
    """Matches of a file's keys with their numbers; raises every fault at the end."""
    faults = Faults(str(path), "hardware profile")
    for key, value in read_data(path).items():
        match = pattern.fullmatch(key)
        if not match:
            faults.unknown(key, form)
            continue
        number = faults.number(repr(key), value, unit=unit)
        if number == 0:
            faults.add(repr(key), f"found 0; expected more, in {unit}.")
        yield match, number
    faults.check()


def _bandwidths(path: Path) -> dict[tuple[int, bool], float]:
    entries = _entries(path, _ALLREDUCE, ("allreduce_size_K_consec_1", "allreduce_size_K_consec_0"), "GB/s")
    return {(int(match[1]), match[2] == "1"): number * _GB for match, number in entries}


def _p2p(path: Path) -> dict[int, float]:
    if not path.is_file():
        return {}
    return {int(match[1]): number * _GB for match, number in _entries(path, _P2P, ("pp_size_K",), "GB/s")}


def _seconds(path: Path) -> dict[str, dict[int, dict[int, float]]]:
    tables: dict[str, dict[int, dict[int, float]]] = {"allreduce": {}, "all2all": {}}
    if path.is_file():
        forms = ("allreduce_size_K_MMB_time", "all2all_size_K_MMB_time")
        for match, number in _entries(path, _SP_TIME, forms, "milliseconds"):
            tables[match[1]].setdefault(int(match[2]), {})[int(match[3]) * MB] = number / 1e3
    return tables


def _overlap(path: Path) -> float | None:
    if not path.is_file():
        return None
    faults = Faults(str(path), "hardware profile")
    data = read_data(path)
    for key in data:
        if key != "overlap_coe":
            faults.unknown(key, ("overlap_coe",))
    number = faults.number("overlap_coe", data.get("overlap_coe"), unit="times the undisturbed duration", least=1.0)
    faults.check()
    return number
