"""`Plan`: everything needed to run a model in parallel, with what was predicted of it."""

from __future__ import annotations

import math
from enum import StrEnum
from os import PathLike
from typing import Any

from pydantic import Field

from galvatron_jax.spec.document import Document, Record
from galvatron_jax.spec.strategy import LayerStrategy


class Schedule(StrEnum):
    """Order in which pipeline stages work on micro-batches."""

    NONE = "none"
    """One stage: micro-batches one after another, gradients accumulated."""
    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    ONE_F_ONE_B_STASH = "1f1b-stash"
    INTERLEAVED = "interleaved"


class MeshAxis(Record):
    """One mesh axis of prime size, slowest link first."""

    name: str
    size: int
    """Devices along the axis, a prime."""
    level: str = "intra"
    """`intra` (within a node) or `inter` (crosses nodes)."""


class LayerGroup(Record):
    """Consecutive layers of the model with one strategy."""

    start: int
    """Index of the first layer in `ModelSpec.layers`."""
    stop: int
    """Index after the last."""
    strategy: LayerStrategy
    """How each of them is spread over the mesh."""


class Stage(Record):
    """A pipeline stage: the layers it holds."""

    groups: tuple[LayerGroup, ...]
    """Layer groups, in the order of the model's layers."""


class TimeBreakdown(Record):
    """Predicted seconds of one step."""

    step_s: float
    compute_s: float
    communication_s: float
    """Collectives of forward and backward that computation does not hide."""
    synchronisation_s: float
    """Gradient synchronisation, once per step, and parameter gathers after the update."""
    update_s: float
    bubble_s: float = 0.0


class StageTime(Record):
    """Predicted seconds of one stage."""

    forward_s: float
    """Of one micro-batch, its way to the next stage included."""
    backward_s: float
    """Of one micro-batch; what the schedule recomputes, and the gradient's way back, included."""
    once_s: float
    """Once per step: gradient synchronisation and update."""


class MemoryBreakdown(Record):
    """Predicted peak bytes on one device of a stage."""

    total_bytes: int
    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    residual_bytes: int
    """What forward keeps for backward, boundary activations included."""
    workspace_bytes: int
    """Temporaries of the largest layer: gathered weights, logits; in a pipeline also the parameters of a layer outside
    of loops, taken out of the flat arrays, and its gradients of one micro-batch."""
    copied_bytes: int = 0
    """Parameters once more, under ZeRO 3 in the order in which they are gathered."""
    batch_bytes: int = 0
    state_bytes: int = 0
    """Random keys and counters, batch statistics, the number of the step."""
    padded_bytes: int = 0
    """In a pipeline, beside the total: by how much the flat arrays of the state are longer than these stages need, for
    they have the length of the longest group's on every device."""
    reserved_bytes: int = 0
    """The same of what a step holds in between: one program runs on all devices, and its memory is as large as the
    largest gradients, slots and temporaries of any group."""

    @property
    def argument_bytes(self) -> int:
        """What one device hands to a train step: the state between steps, and its share of the global batch."""
        return self.parameter_bytes + self.optimizer_bytes + self.padded_bytes + self.state_bytes + self.batch_bytes

    @property
    def peak_bytes(self) -> int:
        """What the compiled program needs on every device; the total is what these stages alone would."""
        return self.total_bytes + self.padded_bytes + self.reserved_bytes


class Prediction(Record):
    """What the cost model expects of the plan."""

    time: TimeBreakdown
    memory: tuple[MemoryBreakdown, ...]
    """Per stage."""
    stages: tuple[StageTime, ...] = ()
    """Per stage; empty with one stage."""
    memory_budget_bytes: int | None = None
    provenance: str = "derived"
    """Of the profile that it rests on."""

    @property
    def largest(self) -> MemoryBreakdown:
        """Memory of the group of devices that needs most."""
        return max(self.memory, key=lambda memory: memory.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """What the compiled program needs on every device; see `MemoryBreakdown.peak_bytes`."""
        return max(memory.peak_bytes for memory in self.memory)


class Plan(Document):
    """How to train one model with one global batch on one mesh."""

    version: int = 1
    """Version of this format."""
    model: str
    """Name of the model, for people."""
    model_fingerprint: str | None = None
    """Fingerprint of the `ModelSpec` it was made for.

    None in a plan written by hand for any model with as many layers.
    """
    mesh: tuple[MeshAxis, ...]
    """Mesh axes, slowest link first; their sizes multiply to the number of devices."""
    global_batch: int
    """Examples of one optimizer step, over all devices and micro-batches."""
    num_microbatches: int = 1
    """Equal parts of the global batch that run one after another, gradients accumulated."""
    schedule: Schedule = Schedule.NONE
    """Order in which the stages work on the micro-batches; `none` with one stage."""
    stages: tuple[Stage, ...]
    """Pipeline stages in the order of the model's layers; one without pipeline parallelism. With interleaving, several
    times as many as there are groups of devices: stage `k` runs on group `k % pipeline_degree`."""
    pipeline_axes: tuple[str, ...] = ()
    """Leading mesh axes along which the stages lie; every stage is spread over the others."""
    batch_axes: tuple[str, ...] = ()
    """Mesh axes over which the input batch, and values that cross more than one layer, split their batch dim."""
    executor: str = "local"
    """Which executor runs it: `local` (the planner's own programs), or `annotate` (XLA's partitioner; one stage)."""
    gradient_sum_dtype: str | None = None
    """Type in which gradients are summed over devices where their own is wider, such as `bfloat16` for parameters in
    float32: half the bytes, and summands and sums are rounded to it. Each device adds up those of its micro-batches in
    their own type all the same. None sums in that everywhere. Of the executor `local` alone."""
    prediction: Prediction | None = None
    """What the cost model expects; None in a plan written by hand."""
    software: dict[str, str] = Field(default_factory=dict)
    """Versions of jax, jaxlib, galvatron_jax and Python with which it was made."""

    @property
    def num_devices(self) -> int:
        """Product of the mesh axes."""
        total = 1
        for axis in self.mesh:
            total *= axis.size
        return total

    @property
    def pipeline_degree(self) -> int:
        """Groups of devices that stages lie on."""
        return math.prod(axis.size for axis in self.mesh if axis.name in self.pipeline_axes)

    @property
    def stage_mesh(self) -> tuple[MeshAxis, ...]:
        """Axes over which each stage is spread."""
        return tuple(axis for axis in self.mesh if axis.name not in self.pipeline_axes)

    @property
    def strategies(self) -> tuple[LayerStrategy, ...]:
        """One strategy per layer of the model, in order."""
        groups = sorted((g for stage in self.stages for g in stage.groups), key=lambda g: g.start)
        return tuple(g.strategy for g in groups for _ in range(g.start, g.stop))

    @classmethod
    def from_galvatron(cls, path: str | PathLike[str], *, model_fingerprint: str | None = None, **choices: Any) -> Plan:
        """Reads a plan of Hetu-Galvatron: see `spec.galvatron.read_plan`, also for `choices`.

        Args:
            path: A `galvatron_config_*.json` file, or a JSON file with a plan in its notation (`4-2*-1-c`).
            model_fingerprint: Fingerprint of the `ModelSpec` that is to be trained; None for any with as many layers.
            choices: `model`, `num_devices`, `devices_per_node`, `global_batch`, `num_microbatches`,
                `sequence_parallel`, where the file leaves them open or is to be overruled.

        Raises:
            DocumentError: naming every fault of the file.
        """
        from galvatron_jax.spec.galvatron.plan import read_plan  # it imports this module

        return read_plan(path, model_fingerprint=model_fingerprint, **choices)
