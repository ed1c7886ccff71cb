"""Hetu-Galvatron's measurements as a `Profile`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

from galvatron_jax.errors import InputError
from galvatron_jax.spec.galvatron.computation import ComputationProfile, ForwardTimes, read_computation
from galvatron_jax.spec.galvatron.hardware import HardwareProfile, read_hardware
from galvatron_jax.spec.galvatron.reading import MB, find_file
from galvatron_jax.spec.profile import (
    CollectiveKind,
    CollectiveTiming,
    LayerTiming,
    LocalShape,
    Profile,
    Provenance,
    Timing,
)
from galvatron_jax.spec.strategy import Remat
from galvatron_jax.spec.validation import did_you_mean

BACKWARD_OVER_FORWARD = 2.0
"""Backward per forward seconds that Hetu-Galvatron assumes (`bct_fct_coe`); recomputation adds one forward."""

_LINE_BYTES = (MB, 1024 * MB)
"""Messages at which a bandwidth becomes times: those between which Hetu-Galvatron measures collectives."""

_HALVES = (CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER)
"""Collectives that it prices as half an all-reduce of the same array (`remap_config_for_latency`)."""


def read_profile(
    folder: str | PathLike[str],
    *,
    hardware: str | PathLike[str],
    model_fingerprint: str = "galvatron",
    kinds: Mapping[str, str] | None = None,
    sequence: int | Sequence[int] | None = None,
    num_nodes: int | None = None,
    devices_per_node: int | None = None,
    device: str = "unknown device",
) -> Profile:
    """Reads the profile of a model and a machine that Hetu-Galvatron 2.0 to 3.0 published.

    Layers: forward per micro-batch at one device, as measured; backward is twice that, and under full recomputation
    three times, as its cost model assumes (it measures forward only). What it calls `other` is divided equally between
    embedding and head, as it divides it between first and last stage. Shards smaller than a whole layer were not
    measured, so they are left to be scaled.

    Collectives: all-reduce and all-to-all as measured; an all-gather or a reduce-scatter takes half the all-reduce.
    Group sizes with a bandwidth alone take `2 (n - 1) / n` of the array over it. Overlap: with a slowdown `o` of both
    partners, `2 - o` of the communication hides.

    Args:
        folder: Where `computation_profiling_*.json` lies, or that file itself.
        hardware: Folder of the hardware files.
        model_fingerprint: Fingerprint of the `ModelSpec` that the profile is to serve.
        kinds: Fingerprints of layer kinds by what was measured: `layertype_0`, `layertype_1`, ..., `embedding` and
            `head`. Those left out stand under their own names.
        sequence: Tokens (one number per layer type where they differ); None where the file has one length only.
        num_nodes: Nodes of the machine; None where the folder has files of one machine only.
        devices_per_node: Devices of each node; None likewise.
        device: Kind of device; the files do not say.

    Raises:
        DocumentError: naming every fault of a file.
        InputError: when `kinds` names something that was not measured.
    """
    what = "computation times"
    path = find_file(Path(folder), "computation_profiling_*.json", what=what, option="give the file's path as `folder`")
    computation = read_computation(path, sequence=sequence)
    machine = read_hardware(hardware, num_nodes=num_nodes, devices_per_node=devices_per_node)
    return Profile(
        provenance=Provenance.IMPORTED,
        device=device,
        num_devices=machine.num_devices,
        model_fingerprint=model_fingerprint,
        layers=tuple(_layers(computation, kinds or {})),
        collectives=tuple(_collectives(machine)),
        overlap=0.0 if machine.overlap_slowdown is None else min(1.0, max(0.0, 2.0 - machine.overlap_slowdown)),
    )


def _layers(computation: ComputationProfile, kinds: Mapping[str, str]) -> Iterator[LayerTiming]:
    named = {f"layertype_{index}": (times, 1.0) for index, times in enumerate(computation.layers)}
    if computation.other is not None:
        named |= dict.fromkeys(("embedding", "head"), (computation.other, 0.5))
    unknown = [name for name in kinds if name not in named]
    if unknown:
        hints = " ".join(f"{name!r} is none.{did_you_mean(name, named)}" for name in unknown)
        raise InputError(f"{computation.source}: `kinds` must name what was measured. {hints}")
    for name, (times, share) in named.items():
        yield from _timings(kinds.get(name, name), times, share)


def _timings(kind: str, times: ForwardTimes, share: float) -> Iterator[LayerTiming]:
    for batch, seconds in times.points:
        for remat, repeats in ((Remat.NONE, 0.0), (Remat.FULL, 1.0)):
            forward = seconds * share
            yield LayerTiming(
                kind=kind,
                shape=LocalShape(batch=batch),
                remat=remat,
                forward=Timing(median_s=forward),
                backward=Timing(median_s=forward * (BACKWARD_OVER_FORWARD + repeats)),
            )


def _collectives(machine: HardwareProfile) -> Iterator[CollectiveTiming]:
    for size, table in _allreduces(machine).items():
        yield from _curve(CollectiveKind.ALL_REDUCE, size, table, factor=1.0)
        for kind in _HALVES:
            yield from _curve(kind, size, table, factor=0.5)
    for size, table in machine.alltoall_seconds.items():
        yield from _curve(CollectiveKind.ALL_TO_ALL, (size, _level(machine, size, True)), table, factor=1.0)
    for size, bandwidth in machine.p2p_bytes_per_s.items():
        table = {count: count / bandwidth for count in _LINE_BYTES}
        yield from _curve(CollectiveKind.PERMUTE, (size, _level(machine, size, False)), table, factor=1.0)


def _allreduces(machine: HardwareProfile) -> dict[tuple[int, str], Mapping[int, float]]:
    """Seconds by bytes for each group size and level: measured tables, and lines where only a bandwidth is known."""
    tables: dict[tuple[int, str], Mapping[int, float]] = {}
    # Within a node neighbours count, not devices far apart: a group on the inner mesh axes.
    for (size, neighbours), bandwidth in sorted(machine.allreduce_bytes_per_s.items()):
        passes = 2 * (size - 1) / size
        tables[size, _level(machine, size, neighbours)] = {count: passes * count / bandwidth for count in _LINE_BYTES}
    for size, table in machine.allreduce_seconds.items():
        tables[size, _level(machine, size, True)] = table
    return tables


def _level(machine: HardwareProfile, size: int, neighbours: bool) -> str:
    """Groups of devices that are far apart cross nodes wherever there are several."""
    crosses = machine.num_nodes > 1 and (not neighbours or size > machine.devices_per_node)
    return "inter" if crosses else "intra"


def _curve(
    kind: CollectiveKind, group: tuple[int, str], table: Mapping[int, float], *, factor: float
) -> Iterator[CollectiveTiming]:
    size, level = group
    for count, seconds in sorted(table.items()):
        yield CollectiveTiming(
            kind=kind, axis_size=size, level=level, bytes=count, timing=Timing(median_s=seconds * factor)
        )
