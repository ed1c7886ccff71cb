"""Hetu-Galvatron's plans as `Plan`: its `galvatron_config_*.json` files, and plans in its notation.

Its runtime keeps what forward computed until backward needs it, so `pipedream_flush` becomes the 1F1B schedule that
stashes. Data-parallel replicas form the outer axes of a stage and the devices that share a layer the inner ones
(`tp_consecutive_flags` of 1).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from galvatron_jax.spec.diff import format_value
from galvatron_jax.spec.files import read_data
from galvatron_jax.spec.galvatron.reading import Faults
from galvatron_jax.spec.galvatron.strategies import DP_TYPES, Degrees, make_mesh, make_strategy, parse_notation
from galvatron_jax.spec.plan import LayerGroup, Plan, Schedule, Stage
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from galvatron_jax.spec.validation import did_you_mean

_SCHEDULES = {"pipedream_flush": Schedule.ONE_F_ONE_B_STASH, "gpipe": Schedule.GPIPE}
_ENDS = ("vtp", "vsp", "vcp", "embed_sdp", "default_dp_type", "pipeline_type", "chunks", "pp_division")
_ENCODED = ("tp_sizes_enc", "tp_consecutive_flags", "dp_types_enc", "checkpoint", "use_sp", "cp_sizes_enc")
_CONFIG_KEYS = (*_ENDS, *_ENCODED, "pp_deg", "global_bsz", "world_size")
_NOTATION_KEYS = (*_ENDS, "plan", "pp", "bsz", "world", "layers", "seq")
_FIGURES = ("mem_gb", "n_layer_strategies", "tasks", "throughput", "time_cost_s", "mem_used_mb", "cpu_s", "wall_s")
"""What a search reported beside its plan; of no use to whoever runs it."""

_MACHINE = re.compile(r"(\d+)nodes_(\d+)gpus_per_node|_(\d+)gpu_")


@dataclass(frozen=True)
class _Request:
    """What the caller says beside the file."""

    model: str | None
    model_fingerprint: str | None
    num_devices: int | None
    devices_per_node: int | None
    global_batch: int | None
    num_microbatches: int | None
    sequence_parallel: bool


def read_plan(
    path: str | PathLike[str],
    *,
    model: str | None = None,
    model_fingerprint: str | None = None,
    num_devices: int | None = None,
    devices_per_node: int | None = None,
    global_batch: int | None = None,
    num_microbatches: int | None = None,
    sequence_parallel: bool = True,
) -> Plan:
    """Reads a plan of Hetu-Galvatron 2.0 to 3.0, for a model of embedding, repeated blocks and head.

    Layer 0 is the embedding, the last layer the head, and both take the strategy that `vtp`, `vsp` and `embed_sdp` give
    (degree, Ulysses, ZeRO-3).

    Args:
        path: A `galvatron_config_*.json` file, or one whose `plan` lists pairs of strategy (`4-2*-1-c|ddp`) and count.
        model: Name of the model; None for the file's name.
        model_fingerprint: Fingerprint of the `ModelSpec` that is to be trained; None for any with as many layers.
        num_devices: Devices; None where the file or its name says (`1nodes_8gpus_per_node`).
        devices_per_node: Devices that share the fast links; None likewise, or for one node.
        global_batch: Examples of a step instead of the file's.
        num_microbatches: Micro-batches instead of the file's `chunks`, which need not divide the batch there.
        sequence_parallel: Whether tensor parallelism splits the sequence too. A `galvatron_config` file does not say;
            versions before 2.1 did not.

    Raises:
        DocumentError: naming every fault of the file.
    """
    data = read_data(path)
    faults = Faults(str(path), "Hetu-Galvatron plan")
    request = _Request(
        model, model_fingerprint, num_devices, devices_per_node, global_batch, num_microbatches, sequence_parallel
    )
    return _Reader(Path(path), data, request, faults).plan()


@dataclass(frozen=True)
class _Reader:
    path: Path
    data: Mapping[str, Any]
    request: _Request
    faults: Faults

    def plan(self) -> Plan:
        notation = "plan" in self.data
        known = _NOTATION_KEYS + _FIGURES if notation else _CONFIG_KEYS
        for key in self.data:
            if key not in known:
                self.faults.add(key, f"unknown key.{did_you_mean(key, known)}")
        pp = self._integer("pp" if notation else "pp_deg")
        devices, per_node = self._machine("world" if notation else "world_size")
        if devices % pp:
            self.faults.add("pp_deg", f"{pp} stages do not divide {devices} devices.")
        self.faults.check()
        zero = self._default_zero()
        layers = (self._notation if notation else self._encoded)(pp, devices, zero)
        division = self._division(pp, len(layers))
        batch = self.request.global_batch or self._integer("bsz" if notation else "global_bsz")
        microbatches = self.request.num_microbatches or self._integer("chunks", default=1)
        ends = self._ends(pp, devices, zero)
        schedule = self._schedule(pp)
        self.faults.check()
        mesh = make_mesh(devices, per_node, pp, faults=self.faults)
        stage_mesh = mesh[_axes_of(pp, [axis.size for axis in mesh]) :]
        every = [("vtp", ends), *layers, ("vtp", ends)]
        strategies = [make_strategy(d, stage_mesh, place=place, faults=self.faults) for place, d in every]
        self._check_batch(batch, microbatches, every)
        self.faults.check()
        division[0] += 1
        division[-1] += 1
        return Plan(
            model=self.request.model or self.path.stem,
            model_fingerprint=self.request.model_fingerprint,
            mesh=mesh,
            global_batch=batch,
            num_microbatches=microbatches,
            schedule=schedule,
            stages=_stages(strategies, division),
            pipeline_axes=tuple(axis.name for axis in mesh[: len(mesh) - len(stage_mesh)]),
            batch_axes=min((s.dp for s in strategies), key=len),
        )

    def _integer(self, key: str, *, default: int | None = None, least: int = 1) -> int:
        if key not in self.data:
            if default is None:
                self.faults.add(key, "missing; expected a whole number.")
                return least
            return default
        return self.faults.integer(key, self.data[key], least=least)

    def _flag(self, key: str) -> bool:
        value = self.data.get(key, 0)
        if value not in (0, 1):
            self.faults.add(key, f"found {format_value(value)}; expected 0 or 1.")
        return value == 1

    def _machine(self, key: str) -> tuple[int, int]:
        """Devices in all, and in a node."""
        match = _MACHINE.search(self.path.name)
        per_node = self.request.devices_per_node or (int(match[2]) if match and match[2] else None)
        devices = self.request.num_devices
        if devices is None and key in self.data:
            devices = self.faults.integer(key, self.data[key])
        if devices is None and match:
            devices = int(match[1]) * int(match[2]) if match[2] else int(match[3])
        if devices is None:
            self.faults.add(key, "neither the file nor its name says how many devices there are: give `num_devices`.")
            return 1, 1
        per_node = min(per_node or devices, devices)
        if devices % per_node:
            self.faults.add(key, f"{devices} devices do not fill nodes of {per_node}: give `devices_per_node`.")
        return devices, per_node

    def _default_zero(self) -> int:
        # Searches choose between it and ZeRO-3; those that were published ran with zero2.
        name = self.data.get("default_dp_type", "zero2" if "plan" in self.data else "ddp")
        if name not in DP_TYPES:
            self.faults.add("default_dp_type", f"found {format_value(name)}.{did_you_mean(str(name), DP_TYPES)}")
            return 0
        return DP_TYPES[name]

    def _list(self, key: str, *, default: int | None, length: int | None, allowed: Sequence[int] | None) -> list[int]:
        """A list written as `"1,1,2"`, one number per layer."""
        text = self.data.get(key)
        if text is None:
            if default is None or length is None:
                self.faults.add(key, "missing; expected one number per layer, such as '1,1,2,2'.")
                return []
            return [default] * length
        if not isinstance(text, str) or not re.fullmatch(r"\d+(,\d+)*", text):
            self.faults.add(key, f"found {format_value(text)}; expected numbers joined by commas, such as '1,1,2,2'.")
            return []
        values = [int(part) for part in text.split(",")]
        if length is not None and len(values) != length:
            self.faults.add(key, f"has {len(values)} entries, but tp_sizes_enc has {length}; give one per layer.")
            return []
        wrong = [index for index, value in enumerate(values) if value not in (allowed or (value,)) or value < 0]
        if wrong:
            expected = " or ".join(map(str, allowed or ()))
            self.faults.add(f"{key}[{wrong[0]}]", f"found {values[wrong[0]]}; expected {expected}.")
        return values

    def _encoded(self, pp: int, devices: int, default_zero: int) -> list[tuple[str, Degrees]]:
        """Degrees of the blocks, with their places in the file, from lists with one number per layer."""
        sizes = self._list("tp_sizes_enc", default=None, length=None, allowed=None)
        count, flag = len(sizes), (0, 1)
        consecutive = self._list("tp_consecutive_flags", default=1, length=count, allowed=flag)
        sharded = self._list("dp_types_enc", default=0, length=count, allowed=flag)
        checkpoint = self._list("checkpoint", default=0, length=count, allowed=flag)
        ulysses = self._list("use_sp", default=0, length=count, allowed=flag)
        context = self._list("cp_sizes_enc", default=1, length=count, allowed=None)
        stage, layers = devices // pp, []
        self._check_supported(sizes, consecutive, context, stage)
        if not sizes or self.faults.lines:
            return []
        for index, size in enumerate(sizes):
            dp = stage // size
            kind = self._kind(size, ulysses[index] == 1)
            zero = (3 if sharded[index] else default_zero) if dp > 1 else 0
            layers.append((f"tp_sizes_enc[{index}]", Degrees(pp, size, kind, dp, zero, checkpoint[index] == 1)))
        return layers

    def _check_supported(self, sizes: list[int], consecutive: list[int], context: list[int], stage: int) -> None:
        for index, size in enumerate(sizes):
            if size < 1 or stage % size:
                self.faults.add(f"tp_sizes_enc[{index}]", f"{size} does not divide the {stage} devices of a stage.")
            elif index < len(consecutive) and consecutive[index] == 0 and 1 < size < stage:
                self.faults.add(
                    f"tp_consecutive_flags[{index}]",
                    "0 puts tensor parallelism on devices that are far apart; only neighbours are supported: set 1.",
                )
        for index, size in enumerate(context):
            if size != 1:
                self.faults.add(f"cp_sizes_enc[{index}]", f"context parallelism of {size} is not supported; set 1.")
                break

    def _kind(self, size: int, ulysses: bool) -> SequenceParallel:
        if size == 1 or not (ulysses or self.request.sequence_parallel):
            return SequenceParallel.NONE
        return SequenceParallel.ULYSSES if ulysses else SequenceParallel.MEGATRON

    def _notation(self, pp: int, devices: int, default_zero: int) -> list[tuple[str, Degrees]]:
        """Degrees of the blocks, with their places in the file, from pairs of strategy and count."""
        pairs, layers = self.data["plan"], []
        if not isinstance(pairs, list) or not pairs:
            self.faults.add("plan", f"found {format_value(pairs)}; expected pairs such as ['4-2*-1-c|ddp', 5].")
            return []
        for index, pair in enumerate(pairs):
            place = f"plan[{index}]"
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
                self.faults.add(place, f"found {format_value(pair)}; expected a pair such as ['4-2*-1-c|ddp', 5].")
                continue
            count = self.faults.integer(f"{place}[1]", pair[1])
            degrees = parse_notation(pair[0], default_zero=default_zero, place=f"{place}[0]", faults=self.faults)
            if degrees is None:
                continue
            if degrees.pp != pp:
                self.faults.add(f"{place}[0]", f"{pair[0]!r} has {degrees.pp} stages, but the file has {pp}.")
            used = degrees.pp * degrees.group * degrees.dp
            if used != devices:
                self.faults.add(f"{place}[0]", f"{pair[0]!r} uses {used} devices, but there are {devices}.")
            layers += [(f"{place}[0]", degrees)] * count
        return layers

    def _ends(self, pp: int, devices: int, default_zero: int) -> Degrees:
        """Strategy of embedding and head."""
        size, ulysses = self._integer("vtp", default=1), self._flag("vsp")
        if self._integer("vcp", default=1) != 1:
            self.faults.add("vcp", "context parallelism is not supported; set 1.")
        stage = devices // pp
        if stage % size:
            self.faults.add("vtp", f"{size} does not divide the {stage} devices of a stage.")
        dp = max(1, stage // size)
        zero = 3 if self._flag("embed_sdp") else default_zero
        return Degrees(pp, size, self._kind(size, ulysses), dp, zero if dp > 1 else 0, checkpoint=False)

    def _division(self, pp: int, num_blocks: int) -> list[int]:
        """Blocks of each stage."""
        value = self.data.get("pp_division")
        if isinstance(value, str) and re.fullmatch(r"\d+(,\d+)*", value):
            value = [int(part) for part in value.split(",")]
        if value is None and pp == 1:
            return [num_blocks]
        if not isinstance(value, list) or not all(type(count) is int and count > 0 for count in value):
            found = format_value(self.data.get("pp_division"))
            self.faults.add("pp_division", f"found {found}; expected the layers of each stage, such as '16,16'.")
            return [num_blocks]
        if len(value) != pp:
            self.faults.add("pp_division", f"has {len(value)} stages, but pp_deg is {pp}.")
        if num_blocks and sum(value) != num_blocks:
            self.faults.add("pp_division", f"sums to {sum(value)} layers, but {num_blocks} have a strategy.")
        return list(value)

    def _schedule(self, pp: int) -> Schedule:
        name = self.data.get("pipeline_type", "pipedream_flush")
        if name not in _SCHEDULES:
            self.faults.add("pipeline_type", f"found {format_value(name)}.{did_you_mean(str(name), _SCHEDULES)}")
            return Schedule.NONE
        return _SCHEDULES[name] if pp > 1 else Schedule.NONE

    def _check_batch(self, batch: int, microbatches: int, layers: list[tuple[str, Degrees]]) -> None:
        if batch % microbatches:
            self.faults.add(
                "chunks",
                f"{batch} examples do not divide into {microbatches} micro-batches (Hetu-Galvatron rounds down); "
                "give `num_microbatches` or `global_batch`.",
            )
            return
        place, degrees = max(layers, key=lambda layer: layer[1].dp)
        if batch // microbatches % degrees.dp:
            self.faults.add(
                place,
                f"micro-batches of {batch // microbatches} examples do not divide over dp {degrees.dp} "
                "(Hetu-Galvatron rounds down); give `num_microbatches` or `global_batch`.",
            )


def _axes_of(degree: int, sizes: Sequence[int]) -> int:
    """How many leading axes make up a degree."""
    return next(count for count in range(len(sizes) + 1) if math.prod(sizes[:count]) == degree)


def _stages(strategies: Sequence[LayerStrategy], division: Sequence[int]) -> tuple[Stage, ...]:
    stages, start = [], 0
    for count in division:
        groups = []
        for strategy, run in itertools.groupby(strategies[start : start + count]):
            stop = start + len(list(run))
            groups.append(LayerGroup(start=start, stop=stop, strategy=strategy))
            start = stop
        stages.append(Stage(groups=tuple(groups)))
    return tuple(stages)
