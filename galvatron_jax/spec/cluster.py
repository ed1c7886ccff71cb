"""`ClusterSpec`: the devices and links a plan is made for."""

from __future__ import annotations

from galvatron_jax.spec.document import Document, Record


class DeviceSpec(Record):
    """One accelerator."""

    name: str
    memory_bytes: int
    peak_flops_per_s: dict[str, float]
    """Dense peak FLOP/s per dtype name (`float32`, `bfloat16`, `float16`)."""
    memory_bandwidth_bytes_per_s: float


class Link(Record):
    """What joins devices at one level of the topology."""

    name: str
    latency_s: float
    bandwidth_bytes_per_s: float
    """Per device, in one direction."""


class ClusterSpec(Document):
    """Nodes of equal devices. Devices of one node are joined by `intra`, nodes by `inter`."""

    version: int = 1
    name: str
    num_nodes: int
    devices_per_node: int
    device: DeviceSpec
    intra: Link
    inter: Link | None = None
    """None for a single node."""
    source: str
    """Where the figures come from (datasheets), or how they were measured."""

    @property
    def num_devices(self) -> int:
        """Devices in the whole cluster."""
        return self.num_nodes * self.devices_per_node
