"""Hetu-Galvatron's published cost formulas, so that its plans and others can be priced on its own profiles.

Source: Hetu-Galvatron, main branch at cea12ff (June 2026, Apache-2.0), under `galvatron/core`: `layer_cost.py` and
`embedding_lmhead_cost.py` of `cost_model/components`, `cost_model/cost_model_handler.py`, and
`search_engine/dynamic_programming.py`. Each function names the one it is. Two things differ on purpose: batches that
do not divide raise an error (it rounds them down), and resharding between layers has the factor that its units ask for
(there it counts a hundredfold). Constants of its formulas, such as a backward of twice the forward, are its own.

With `d` devices that repeat a layer, `dc` is the seconds per byte of an all-reduce among them, and `P` the bytes of
the layer's parameters on a device in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from galvatron_jax.errors import InputError
from galvatron_jax.spec.files import read_data
from galvatron_jax.spec.galvatron.computation import ComputationProfile, ForwardTimes, read_computation
from galvatron_jax.spec.galvatron.hardware import HardwareProfile, read_hardware
from galvatron_jax.spec.galvatron.memory import EndMemory, MemoryProfile, read_memory
from galvatron_jax.spec.galvatron.profile import BACKWARD_OVER_FORWARD
from galvatron_jax.spec.galvatron.reading import MB, find_file
from galvatron_jax.spec.galvatron.strategies import Degrees
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel
from galvatron_jax.spec.validation import did_you_mean

CONTEXT_BYTES = 1024 * MB
"""What every device is assumed to lose to the framework (`pytorch_context_mem`)."""

_MB_PER_MS = MB * 1e3 / 1e9
"""Its formulas take a bandwidth of 1 GB/s for 1 MB (2**20 bytes) per millisecond."""

_PUBLISHED_SIZES = {"llama2-7b": (4096, 32)}
"""Hidden size and layers of models whose profile files do not say (Touvron et al., "Llama 2", 2023, and its code)."""


@dataclass(frozen=True)
class GalvatronCost:
    """Cost of a layer, or of a stage's embedding or head, on one device of a stage."""

    forward_s: float = 0.0
    """Of one micro-batch, communication and what ZeRO-3 gathers included."""
    backward_s: float = 0.0
    """Of one micro-batch, recomputation included, gradient synchronisation not."""
    synchronisation_s: float = 0.0
    """Once per step: what gradient synchronisation adds to the last backward."""
    static_bytes: float = 0.0
    """Parameters, gradients and optimizer state."""
    activation_bytes: float = 0.0
    """Kept per micro-batch in flight."""

    @property
    def microbatch_s(self) -> float:
        """Forward and backward of one micro-batch."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class GalvatronProfile:
    """What its formulas rest on: a model's profile and a machine's."""

    computation: ComputationProfile
    memory: MemoryProfile
    hardware: HardwareProfile
    hidden_size: int
    num_layers: int
    """Repeated blocks of the model, over which the time of pipeline transfers is spread."""
    mixed_precision: bool = True
    """Whether activations and gradients have 2 bytes rather than 4."""
    async_grad_reduce: bool = True
    """Whether gradients stay whole over the micro-batches and are reduced once; False reduces them each time."""

    @classmethod
    def load(
        cls,
        profiles_dir: str | PathLike[str],
        *,
        model: str = "llama2-7b",
        hardware_dir: str | PathLike[str] | None = None,
        sequence: int | Sequence[int] | None = None,
        num_nodes: int = 1,
        devices_per_node: int = 8,
        hidden_size: int | None = None,
        num_layers: int | None = None,
    ) -> GalvatronProfile:
        """Reads the files of one model and one machine.

        Args:
            profiles_dir: Holds a folder per model, and one named `hardware`.
            model: Name of the model's folder.
            hardware_dir: Folder of the hardware files, where it is another.
            sequence: Tokens; None where the files have one length only.
            num_nodes: Nodes of the machine.
            devices_per_node: Devices of each.
            hidden_size: Of the model; None where a model configuration in its folder (`hidden_size`) says.
            num_layers: Repeated blocks; None likewise (`num_hidden_layers`).

        Raises:
            DocumentError: naming every fault of a file.
            InputError: when nothing says the model's size.
        """
        folder = Path(profiles_dir) / model
        pick = "keep one of them in the folder"
        computation = find_file(folder, "computation_profiling_*.json", what="computation times", option=pick)
        memory = find_file(folder, "memory_profiling_*.json", what="memory", option=pick)
        hidden, layers = _model_size(folder, hidden_size, num_layers)
        machine = Path(hardware_dir) if hardware_dir is not None else Path(profiles_dir) / "hardware"
        return cls(
            computation=read_computation(computation, sequence=sequence),
            memory=read_memory(memory, sequence=sequence),
            hardware=read_hardware(machine, num_nodes=num_nodes, devices_per_node=devices_per_node),
            hidden_size=hidden,
            num_layers=layers,
        )

    @property
    def sequences(self) -> tuple[int, ...]:
        """Tokens per layer type.

        Raises:
            InputError: for files of version 2.0, which do not say.
        """
        lengths = self.memory.sequence or self.computation.sequence
        if lengths is None:
            raise InputError(f"{self.memory.source}: names no sequence length, on which the size of messages rests.")
        return lengths

    @property
    def activation_width(self) -> int:
        """Bytes of an activation's element in a message."""
        return 2 if self.mixed_precision else 4


def degrees_of(strategy: LayerStrategy, mesh: Mapping[str, int], *, pp: int = 1) -> Degrees:
    """A strategy in Hetu-Galvatron's terms.

    Args:
        strategy: The strategy.
        mesh: Sizes of the axes of a stage.
        pp: Pipeline stages.

    Raises:
        InputError: for what its formulas do not know: ZeRO-1, partial recomputation, tp beside Ulysses, idle axes.
    """
    tp, sp, dp = (math.prod(mesh[axis] for axis in axes) for axes in (strategy.tp, strategy.sp, strategy.dp))
    ulysses = strategy.sp_kind is SequenceParallel.ULYSSES
    why = None
    if strategy.zero == 1:
        why = "ZeRO-1; it knows ZeRO 0, 2 and 3"
    elif strategy.remat not in (Remat.NONE, Remat.FULL):
        why = f"recomputation of {strategy.remat.value!r}; it knows none and full"
    elif ulysses and tp > 1:
        why = "tensor parallelism beside Ulysses in one layer"
    elif dp * tp * (sp if ulysses else 1) != math.prod(mesh.values()):
        why = "mesh axes that serve nothing"
    if why:
        raise InputError(f"Hetu-Galvatron's formulas cannot price {strategy.short()}: {why}.")
    group = sp if ulysses else tp
    kind = strategy.sp_kind if group > 1 else SequenceParallel.NONE
    return Degrees(pp, group, kind, dp, strategy.zero, strategy.remat is Remat.FULL)


def layer_cost(
    profile: GalvatronProfile, degrees: Degrees, *, microbatch: int, num_microbatches: int, layer_type: int = 0
) -> GalvatronCost:
    """Cost of one layer: `TimeCostModelBase` and `MemoryCostModelBase` in `layer_cost.py`.

    Forward is `(m x + c)` of the fit through the measured batches at `x` examples per device, over the devices that
    share the layer (`t x` where one batch was measured); backward twice that, and once more under recomputation. Of the
    6 all-gathers that tensor parallelism costs, 4 count as forward here, of the 4 all-to-alls of Ulysses 2;
    recomputation repeats half of all. ZeRO-3 adds half of `dc * M`, not hidden, to each forward, where the gradients'
    message is `M = 2 (d - 1) / d * P`, halved in mixed precision. Synchronisation, in the last backward of `b`
    seconds, takes `max(b, dc M) + (o - 1) min(b, dc M)` with it, `o` the measured slowdown.

    Args:
        profile: The profiles.
        degrees: The strategy.
        microbatch: Examples of one micro-batch over the whole stage.
        num_microbatches: Of one step; gradient memory under ZeRO depends on whether it is one.
        layer_type: Which of the profile's layer types.

    Raises:
        InputError: when the batch does not divide, or the profile lacks the strategy's degrees.
    """
    batch = _local_batch(microbatch, degrees)
    replicas = _replicas(degrees)
    memory = profile.memory.layers[layer_type]
    parameters = memory.parameter_bytes / _tensor_parallel(degrees)
    compute = _forward_seconds(profile.computation.layers[layer_type], batch, degrees.group)
    repeated = compute if degrees.checkpoint else 0.0
    backward = BACKWARD_OVER_FORWARD * compute + repeated
    gradients = 2 * (replicas - 1) / replicas * parameters / (2 if profile.mixed_precision else 1)
    reduce = gradients * _seconds_per_byte(profile, degrees)
    shared = _sharing_seconds(profile, degrees, batch, layer_type)
    transfer = _transfer_seconds(profile, degrees.pp, batch, layer_type)
    gathered = reduce / 2 if degrees.zero == 3 else 0.0
    return GalvatronCost(
        forward_s=compute + shared[0] + gathered + transfer / 2,
        backward_s=backward + shared[1] + transfer / 2,
        synchronisation_s=_synchronisation(reduce, backward, _slowdown(profile)) if degrees.dp > 1 else 0.0,
        static_bytes=4 * parameters * state_ratio(profile, degrees, num_microbatches=num_microbatches),
        activation_bytes=batch * _activation_bytes(profile, degrees, layer_type),
    )


def ends_cost(
    profile: GalvatronProfile, degrees: Degrees, *, stage: int, microbatch: int, num_microbatches: int
) -> GalvatronCost:
    """Cost of embedding and head on a stage: `embedding_lmhead_cost.py`. `CONTEXT_BYTES` comes on top of it.

    With one stage that is both of them; the first of several holds the embedding, the last the head, each of which
    takes half of the measured time; those between hold neither. Vocabulary parallelism costs an all-gather each
    (counted as forward). Gradients of a quarter of the states' bytes, halved in mixed precision, are reduced in half
    an all-reduce; that hides behind the backward, which it slows down. ZeRO-3 gathers likewise, in both passes.

    Args:
        profile: The profiles.
        degrees: The strategy of both; its recomputation is not looked at.
        stage: Index of the stage, below `degrees.pp`.
        microbatch: Examples of one micro-batch over the whole stage.
        num_microbatches: Of one step.

    Raises:
        InputError: when the batch does not divide, or the profile lacks the strategy's degrees.
    """
    first, last = stage == 0, stage == degrees.pp - 1
    if not first and not last:
        return GalvatronCost()
    batch, replicas = _local_batch(microbatch, degrees), _replicas(degrees)
    memory = profile.memory.whole if first and last else profile.memory.first if first else profile.memory.last
    tp = _tensor_parallel(degrees)
    states = _entry(memory.state_bytes, tp, profile, "states of embedding and head at tp")
    compute = 0.0
    if profile.computation.other is not None:
        share = 1.0 if first and last else 0.5
        compute = share * _forward_seconds(profile.computation.other, batch, degrees.group)
    gradients = states / 4 / (2 if profile.mixed_precision else 1)
    comm = gradients * _seconds_per_byte(profile, degrees) * (replicas - 1) / replicas
    slowdown, gathers = _slowdown(profile), 0.5 if degrees.zero == 3 else 0.0
    backward = BACKWARD_OVER_FORWARD * compute
    alone = _behind(gathers * comm, backward, slowdown)
    shared = 0.0
    if tp > 1:
        tokens = (profile.sequences[:1] if first else ()) + (profile.sequences[-1:] if last else ())
        shared = sum(_gather_seconds(profile, batch * length, degrees) for length in tokens)
    return GalvatronCost(
        forward_s=_behind(gathers * comm, compute, slowdown) + shared,
        backward_s=alone,
        synchronisation_s=_behind((gathers + 0.5) * comm, backward, slowdown) - alone,
        static_bytes=states * state_ratio(profile, degrees, num_microbatches=num_microbatches),
        activation_bytes=batch * _end_activation(profile, memory, degrees),
    )


def state_ratio(profile: GalvatronProfile, degrees: Degrees, *, num_microbatches: int) -> float:
    """Share of a layer's states that a device holds under ZeRO: `zero2_ratio` and `zero3_ratio` in `layer_cost.py`.

    Over `d` replicas, ZeRO-2 in mixed precision keeps an eighth whole, and two where gradients gather over several
    micro-batches; ZeRO-3 keeps nothing, or an eighth. What is sharded takes `1 / d + 0.003`.
    """
    replicas = _replicas(degrees)
    if degrees.zero not in (0, 2, 3):
        raise InputError(f"Hetu-Galvatron's formulas know ZeRO 0, 2 and 3, not {degrees.zero}.")
    if degrees.zero == 0 or replicas == 1:
        return 1.0
    pieces = 8 if profile.mixed_precision else 4
    sharded = 1 / replicas + 0.003
    whole = 1 / pieces if degrees.zero == 2 else 0.0
    growth = 1.0
    if num_microbatches > 1 and profile.async_grad_reduce:
        # In float32 the gradients are as large as the parameters: ZeRO-2 keeps half of all.
        whole += 1 / pieces
    elif num_microbatches > 1 and (profile.mixed_precision or degrees.zero == 3):
        growth = 5 / 4
    return growth * ((1 - whole) * sharded + whole)


def in_flight(pp: int, stage: int) -> int:
    """Micro-batches whose activations a stage of 1F1B holds (`cumulative_num`): `pp - stage`."""
    if not 0 <= stage < pp:
        raise InputError(f"Stage {stage} is none of {pp} stages, which count from 0.")
    return pp - stage


def global_buffer_bytes(
    profile: GalvatronProfile, *, microbatch: int, stage_devices: int, max_group: int | None
) -> float:
    """The buffer that tensor-parallel layers gather into (`global_memory` in `dynamic_programming.py`).

    It holds one activation of the examples that a group of `max_group` devices works on.

    Args:
        profile: The profiles.
        microbatch: Examples of one micro-batch over the whole stage.
        stage_devices: Devices of a stage.
        max_group: The largest group of devices that share a layer by tensor parallelism, 1 where none does; None
            where its search looked at Ulysses alone, which needs no such buffer.
    """
    if max_group is None:
        return 0.0
    batch = microbatch / (stage_devices / max_group)
    return batch * profile.hidden_size * max(profile.sequences) * profile.activation_width


def usable_bytes(budget_bytes: int) -> int:
    """What its search may fill: a budget of 21 GB and above loses a fifth to the allocator's cache (`mem_cache`)."""
    budget = budget_bytes // MB
    return budget_bytes - (int(budget * 0.2) * MB if budget // 1024 > 20 else 0)


def reshard_seconds(
    profile: GalvatronProfile, before: Degrees, after: Degrees, *, microbatch: int, layer_type: int = 0
) -> float:
    """Moving one micro-batch's activations between layers that groups of unlike size share (`inter_layer_cost`).

    `(g - 1) / g` of the larger group's activation at the all-reduce bandwidth of `g` neighbours. There the factor is
    1e-7 seconds where milliseconds per megabyte ask for 1e-9, and the reported time leaves it out.
    """
    if before.group == after.group:
        return 0.0
    group = max(before.group, after.group)
    stage_devices = before.group * before.dp
    batch = microbatch / (stage_devices / group)
    moved = (group - 1) / group * batch * profile.sequences[layer_type] * profile.hidden_size
    return moved * profile.activation_width / _bandwidth(profile, group, neighbours=True)


def published_step_seconds(
    layers: Sequence[Sequence[GalvatronCost]], ends: Sequence[GalvatronCost], *, num_microbatches: int
) -> float:
    """The step time that its search reports: `pipeline_costmodel` in `cost_model_handler.py`.

    Kept to compare with what it published: steady state is priced at the first or the last stage alone, so a slow stage
    between them costs next to nothing.

    Args:
        layers: Costs of the layers of each stage.
        ends: Of embedding and head, per stage.
        num_microbatches: Of one step.
    """
    times = [sum(c.microbatch_s for c in stage) + end.microbatch_s for stage, end in zip(layers, ends, strict=True)]
    synced = [sum(c.microbatch_s + c.synchronisation_s for c in stage) for stage in layers]
    stages, total = len(times), sum(times)
    ahead = min(stages - 1, num_microbatches - 1) * times[0]
    # A third of it is the forward ramp, two thirds the backward one; both are bound alike.
    ramps = max(ahead, total - times[0])
    by_first = ramps + times[0] * max(0, num_microbatches + 1 - stages)
    by_last = total + times[-1] * (num_microbatches - 1)
    exposed = max(sync - sum(times[: index + 1]) for index, sync in enumerate(synced))
    return max(by_first, by_last) + max(0.0, exposed)


def _model_size(folder: Path, hidden_size: int | None, num_layers: int | None) -> tuple[int, int]:
    hidden, layers = _PUBLISHED_SIZES.get(folder.name, (None, None))
    for path in sorted(folder.glob("*.json")):
        if "_profiling_" not in path.name and not path.name.startswith("galvatron_config"):
            config = read_data(path)
            hidden, layers = config.get("hidden_size", hidden), config.get("num_hidden_layers", layers)
    hidden, layers = hidden_size or hidden, num_layers or layers
    if not isinstance(hidden, int) or not isinstance(layers, int):
        raise InputError(
            f"{folder}: no model configuration there says the hidden size and number of layers. Give `hidden_size` and "
            f"`num_layers`.{did_you_mean(folder.name, _PUBLISHED_SIZES)}"
        )
    return hidden, layers


def _tensor_parallel(degrees: Degrees) -> int:
    return 1 if degrees.kind is SequenceParallel.ULYSSES else degrees.group


def _replicas(degrees: Degrees) -> int:
    """Devices that repeat a layer's parameters: those of Ulysses too (`sdp_size`)."""
    return degrees.dp * (degrees.group if degrees.kind is SequenceParallel.ULYSSES else 1)


def _local_batch(microbatch: int, degrees: Degrees) -> int:
    if microbatch % degrees.dp:
        raise InputError(
            f"A micro-batch of {microbatch} examples does not divide over dp {degrees.dp}; use a multiple of it, or a "
            "smaller dp."
        )
    return microbatch // degrees.dp


def _forward_seconds(times: ForwardTimes, batch: int, group: int) -> float:
    points = times.points
    if len(points) == 1:
        ((measured, seconds),) = points
        return seconds / measured * batch / group
    slope, start = np.polyfit([count for count, _ in points], [seconds for _, seconds in points], 1)
    return float(slope * batch / group + start)


def _slowdown(profile: GalvatronProfile) -> float:
    slowdown = profile.hardware.overlap_slowdown
    if slowdown is None:
        raise InputError(f"{profile.hardware.source}: has no overlap_coefficient.json, which these formulas need.")
    return slowdown


def _bandwidth(profile: GalvatronProfile, size: int, *, neighbours: bool) -> float:
    known = profile.hardware.allreduce_bytes_per_s
    # All devices together are their own neighbours.
    key = (size, neighbours or size == profile.hardware.num_devices)
    if key not in known:
        sizes = ", ".join(f"{size} (consec {int(near)})" for size, near in sorted(known))
        wanted = f"{size} (consec {int(key[1])})"
        raise InputError(f"{profile.hardware.source}: no all-reduce bandwidth of groups of {wanted}; it has {sizes}.")
    return known[key]


def _seconds_per_byte(profile: GalvatronProfile, degrees: Degrees) -> float:
    """`dc`: of an all-reduce among a layer's replicas, which tensor parallelism pulls apart."""
    replicas = _replicas(degrees)
    if replicas == 1:
        return 0.0
    return 1 / (_bandwidth(profile, replicas, neighbours=_tensor_parallel(degrees) == 1) * _MB_PER_MS)


def _synchronisation(comm: float, backward: float, slowdown: float) -> float:
    """What a reduction adds to the backward that it overlaps with (`bct_dp_overlap`)."""
    return max(comm, backward) + (slowdown - 1) * min(comm, backward) - backward


def _behind(comm: float, compute: float, slowdown: float) -> float:
    """Computation with communication behind it, which slows down the computation alone (`get_overlap_time`)."""
    return comm + max(0.0, compute * slowdown - comm) / slowdown


def _sharing_seconds(profile: GalvatronProfile, degrees: Degrees, batch: int, layer_type: int) -> tuple[float, float]:
    """Forward and backward seconds of what devices that share a layer exchange (`tp_communication_time`)."""
    if degrees.group == 1:
        return 0.0, 0.0
    tokens = batch * profile.sequences[layer_type]
    each = _gather_seconds(profile, tokens, degrees)
    forward, backward = (2, 2) if degrees.kind is SequenceParallel.ULYSSES else (4, 2)
    repeated = (forward + backward) / 2 if degrees.checkpoint else 0
    return each * forward, each * (backward + repeated)


def _gather_seconds(profile: GalvatronProfile, tokens: int, degrees: Degrees) -> float:
    """One all-gather (half an all-reduce) or all-to-all: as measured at just this size, or by the fit through all."""
    ulysses = degrees.kind is SequenceParallel.ULYSSES
    tables = profile.hardware.alltoall_seconds if ulysses else profile.hardware.allreduce_seconds
    if degrees.group not in tables:
        name = "all2all" if ulysses else "allreduce"
        have = ", ".join(map(str, sorted(tables))) or "no group size"
        raise InputError(
            f"{profile.hardware.source}: no {name} times (sp_time file) of groups of {degrees.group}; it has {have}."
        )
    table, factor = tables[degrees.group], 1.0 if ulysses else 0.5
    count = tokens * profile.hidden_size * profile.activation_width
    if count in table:
        return factor * table[count]
    sizes = list(table)
    slope, start = np.polyfit(sizes, list(table.values()), 1) if len(sizes) > 1 else (table[sizes[0]] / sizes[0], 0.0)
    return factor * float(slope * count + start)


def _transfer_seconds(profile: GalvatronProfile, pp: int, batch: int, layer_type: int) -> float:
    """A layer's share of sending activations on and gradients back (`p2p_message_size`)."""
    if pp == 1:
        return 0.0
    bandwidths = profile.hardware.p2p_bytes_per_s
    if pp not in bandwidths:
        have = ", ".join(map(str, sorted(bandwidths))) or "none"
        raise InputError(f"{profile.hardware.source}: no p2p bandwidth of {pp} stages; it has {have}.")
    sent = pp * 2 * batch * profile.sequences[layer_type] * profile.hidden_size * profile.activation_width
    return sent / (bandwidths[pp] * _MB_PER_MS) / profile.num_layers


def _activation_bytes(profile: GalvatronProfile, degrees: Degrees, layer_type: int) -> float:
    """Bytes that a layer keeps per example."""
    memory = profile.memory.layers[layer_type]
    if not degrees.checkpoint:
        return _entry(memory.activation_bytes, degrees.group, profile, "activations at degree")
    if memory.checkpoint_bytes is None:
        raise InputError(f"{profile.memory.source}: no activations under recomputation (`checkpoint`).")
    split = degrees.kind is SequenceParallel.ULYSSES or profile.memory.sequence_parallel
    return memory.checkpoint_bytes / (degrees.group if split else 1)


def _end_activation(profile: GalvatronProfile, memory: EndMemory, degrees: Degrees) -> float:
    return _entry(memory.activation_bytes, degrees.group, profile, "activations of embedding and head at degree")


def _entry(table: Mapping[int, float], degree: int, profile: GalvatronProfile, what: str) -> float:
    if degree not in table:
        have = ", ".join(map(str, sorted(table))) or "none"
        raise InputError(f"{profile.memory.source}: no {what} {degree}; it has {have}. Profile the model there.")
    return table[degree]
