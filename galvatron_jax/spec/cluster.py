"""`ClusterSpec`: the devices and links a plan is made for."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from galvatron_jax.spec.document import Document, Record


class DeviceSpec(Record):
    """One accelerator."""

    name: str
    """Device kind, as the vendor or JAX names it."""
    memory_bytes: PositiveInt
    """What a program may use on one device."""
    peak_flops_per_s: dict[str, PositiveFloat]
    """Dense peak FLOP/s per dtype name (`float32`, `bfloat16`, `float16`), and as `tensorfloat32` that of
    float32 matrix products at reduced precision."""
    memory_bandwidth_bytes_per_s: PositiveFloat
    """Of the device's own memory."""


class Link(Record):
    """What joins devices at one level of the topology."""

    name: str
    """Technology, such as `NVLink 4`."""
    latency_s: NonNegativeFloat
    """Of one message between two devices."""
    bandwidth_bytes_per_s: PositiveFloat
    """Per device, in one direction."""


class ClusterSpec(Document):
    """Nodes of equal devices. Devices of one node are joined by `intra`, nodes by `inter`."""

    version: int = 1
    """Version of this format."""
    name: str
    """Such as `h100x64`."""
    num_nodes: PositiveInt
    devices_per_node: PositiveInt
    device: DeviceSpec
    """What every device is."""
    intra: Link
    """Joins the devices of one node."""
    inter: Link | None = None
    """Joins nodes; None for a single node."""
    source: str
    """Where the figures come from (datasheets), or how they were measured."""

    @model_validator(mode="after")
    def _check(self) -> ClusterSpec:
        if self.num_nodes > 1 and self.inter is None:
            raise ValueError(f"{self.num_nodes} nodes need an `inter` link between them")
        return self

    @property
    def num_devices(self) -> int:
        """Devices in the whole cluster."""
        return self.num_nodes * self.devices_per_node
