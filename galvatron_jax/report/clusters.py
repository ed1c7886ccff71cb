"""A cluster and a profile as tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from galvatron_jax.cost.lines import RisingFit, fit_rising
from galvatron_jax.report.text import facts, titled
from galvatron_jax.spec.cluster import ClusterSpec, Link
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.profile import CollectiveTiming, LayerTiming, Profile, Timing
from galvatron_jax.spec.strategy import SequenceParallel
from galvatron_jax.units import format_bytes, format_rate, format_seconds


def cluster_table(cluster: ClusterSpec) -> Group:
    """Devices, links and where the figures come from."""
    device = cluster.device
    rows = [
        ("devices", f"{cluster.num_devices}: {cluster.num_nodes} × {cluster.devices_per_node} {device.name}"),
        ("memory per device", format_bytes(device.memory_bytes)),
        ("memory bandwidth", format_rate(device.memory_bandwidth_bytes_per_s, "B/s")),
        *((f"peak {dtype}", format_rate(rate, "FLOP/s")) for dtype, rate in device.peak_flops_per_s.items()),
        ("link in a node", _link(cluster.intra)),
        *([("link between nodes", _link(cluster.inter))] if cluster.inter else []),
        ("source", cluster.source),
    ]
    return facts(f"Cluster {cluster.name}", rows)


def profile_report(profile: Profile, *, model: ModelSpec | None = None) -> Iterator[RenderableType]:
    """Everything in a profile.

    Args:
        profile: the profile.
        model: names the layer kinds.
    """
    where = f"{profile.num_devices} × {profile.device}, {profile.provenance.value}"
    yield facts(f"Profile: {where}", _profile_rows(profile))
    if profile.layers:
        yield _layer_table(profile.layers, title=f"Layers on one device of {where}", model=model)
    if profile.collectives:
        yield _collective_table(profile.collectives, title=f"Collectives on {where}")


def _link(link: Link) -> str:
    speed = format_rate(link.bandwidth_bytes_per_s, "B/s")
    return f"{link.name}: {speed} per device and direction, {format_seconds(link.latency_s)} latency"


def _profile_rows(profile: Profile) -> Iterator[tuple[str, str]]:
    yield "model", profile.model_fingerprint
    yield "layer timings", str(len(profile.layers))
    yield "collective timings", str(len(profile.collectives))
    yield "communication hidden by computation", f"{100 * profile.overlap:.0f} %"
    if profile.update_bytes_per_s:
        yield "optimizer update", format_rate(profile.update_bytes_per_s, "B/s")
    yield from profile.software.items()


def _layer_table(timings: tuple[LayerTiming, ...], *, title: str, model: ModelSpec | None) -> Group:
    names = {kind.fingerprint: kind.name for kind in model.kinds} if model else {}
    table = Table()
    for name in ("layer kind", "examples", "tp", "sequence", "remat"):
        table.add_column(name)
    for name in ("forward", "backward"):
        table.add_column(name, justify="right")
    for timing in timings:
        shape = timing.shape
        sequence = "–" if shape.sp_kind is SequenceParallel.NONE else f"{shape.sp_kind.value} {shape.sp}"
        table.add_row(
            names.get(timing.kind, timing.kind),
            str(shape.batch),
            str(shape.tp),
            sequence,
            timing.remat.value,
            _timing(timing.forward),
            _timing(timing.backward),
        )
    return titled(title, table)


def _collective_table(timings: tuple[CollectiveTiming, ...], *, title: str) -> Group:
    """One row per operation, group and link: the smallest payload shows the latency, the largest the bandwidth.

    The last column is the residual of the curve through all sizes that never falls.
    """
    table = Table()
    for name in ("collective", "devices", "link"):
        table.add_column(name)
    for name in ("smallest payload", "time", "largest payload", "time", "payload per second", "fit misses by"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, int, str], list[CollectiveTiming]] = defaultdict(list)
    for timing in timings:
        groups[timing.kind.value, timing.axis_size, timing.level].append(timing)
    for (kind, size, level), members in groups.items():
        small, large = min(members, key=lambda t: t.bytes), max(members, key=lambda t: t.bytes)
        seconds = large.timing.median_s
        table.add_row(
            kind,
            str(size),
            level,
            format_bytes(small.bytes),
            _timing(small.timing),
            format_bytes(large.bytes),
            _timing(large.timing),
            format_rate(large.bytes / seconds, "B/s") if seconds else "–",
            f"{100 * _fit(members).worst:.1f} %",
        )
    return titled(title, table)


def _fit(timings: list[CollectiveTiming]) -> RisingFit:
    """What the cost model reads."""
    timings = sorted(timings, key=lambda timing: timing.bytes)
    return fit_rising(np.array([t.bytes for t in timings], float), np.array([t.timing.median_s for t in timings]))


def _timing(timing: Timing) -> str:
    spread = f" ± {format_seconds(timing.spread_s)}" if timing.spread_s else ""
    return format_seconds(timing.median_s) + spread
