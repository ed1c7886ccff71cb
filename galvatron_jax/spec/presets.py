"""Clusters by name, from published datasheets. `h100x64` is 64 H100s in nodes of eight.

Where a datasheet gives tensor-core rates with 2:4 sparsity, the dense rate here is half of it. Links are per
device and direction: half of the figures that NVLink datasheets quote. Memory is what XLA reports on the
device where OpenXLA publishes it, else the datasheet's gigabytes as 10^9 bytes, on the safe side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from galvatron_jax.errors import InputError
from galvatron_jax.spec.cluster import ClusterSpec, DeviceSpec, Link
from galvatron_jax.spec.validation import near_name

NODE_SIZE = 8
MOST_DEVICES = 1024

_XLA_SPECS = "https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs"
# Latency of one ring step with NCCL's LL128 protocol, which keeps 120/128 of the bandwidth: the row `Ring` of `hwLat`.
_NCCL = "latencies: https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc (hwLat, ring, LL128)"
_NVLINK_LATENCY_S = 1.9e-6
_PCIE_LATENCY_S = 2.5e-6
_NETWORK_LATENCY_S = 4.0e-6


@dataclass(frozen=True)
class _Family:
    """Nodes of one product."""

    device: DeviceSpec
    intra: Link
    inter: Link | None
    source: str

    @property
    def most_devices(self) -> int:
        return MOST_DEVICES if self.inter else NODE_SIZE


def _hopper(name: str, *, memory_bytes: int, memory_bandwidth_bytes_per_s: float, source: str) -> _Family:
    """An SXM5 Hopper: H100 and H200 differ in memory only."""
    peaks = {"float32": 66.9e12, "tensorfloat32": 494.7e12, "bfloat16": 989.4e12, "float16": 989.4e12}
    return _Family(
        device=DeviceSpec(
            name=name,
            memory_bytes=memory_bytes,
            peak_flops_per_s=peaks,
            memory_bandwidth_bytes_per_s=memory_bandwidth_bytes_per_s,
        ),
        intra=Link(name="NVLink 4 through NVSwitch", latency_s=_NVLINK_LATENCY_S, bandwidth_bytes_per_s=450e9),
        inter=Link(name="InfiniBand NDR, 400 Gbit/s", latency_s=_NETWORK_LATENCY_S, bandwidth_bytes_per_s=50e9),
        source=source,
    )


# By name without the number of devices.
_FAMILIES = {
    "a100x": _Family(
        device=DeviceSpec(
            name="NVIDIA A100-SXM4-80GB",
            memory_bytes=85_100_068_864,
            peak_flops_per_s={"float32": 19.5e12, "tensorfloat32": 156e12, "bfloat16": 312e12, "float16": 312e12},
            memory_bandwidth_bytes_per_s=2.039e12,
        ),
        intra=Link(name="NVLink 3 through NVSwitch", latency_s=_NVLINK_LATENCY_S, bandwidth_bytes_per_s=300e9),
        inter=Link(name="InfiniBand HDR, 200 Gbit/s", latency_s=_NETWORK_LATENCY_S, bandwidth_bytes_per_s=25e9),
        source=(
            "NVIDIA A100 datasheet (June 2021), https://www.nvidia.com/en-us/data-center/a100/: FP32 19.5, TF32 156, "
            "BF16 and FP16 312 TFLOP/s dense; 2039 GB/s; NVLink 600 GB/s both ways. DGX A100 datasheet: one 200 Gbit/s "
            f"port per GPU. Memory: {_XLA_SPECS}/a100_sxm_80.txtpb; {_NCCL}"
        ),
    ),
    "h100x": _hopper(
        "NVIDIA H100 80GB HBM3",
        memory_bytes=84_942_979_072,
        memory_bandwidth_bytes_per_s=3.35e12,
        source=(
            "NVIDIA H100 datasheet and Hopper architecture whitepaper (SXM5), "
            "https://www.nvidia.com/en-us/data-center/h100/: FP32 66.9, TF32 494.7, BF16 and FP16 989.4 TFLOP/s dense; "
            "3.35 TB/s; NVLink 900 GB/s both ways. DGX H100 datasheet: one 400 Gbit/s port per GPU. "
            f"Memory: {_XLA_SPECS}/h100_sxm.txtpb; {_NCCL}"
        ),
    ),
    "h200x": _hopper(
        "NVIDIA H200",
        memory_bytes=141_000_000_000,
        memory_bandwidth_bytes_per_s=4.8e12,
        source=(
            "NVIDIA H200 datasheet (SXM), https://www.nvidia.com/en-us/data-center/h200/: 141 GB at 4.8 TB/s; "
            "FP32 66.9, TF32 494.7, BF16 and FP16 989.4 TFLOP/s dense, as H100; NVLink 900 GB/s both ways. "
            f"DGX H200 datasheet: one 400 Gbit/s port per GPU; {_NCCL}"
        ),
    ),
    "titanrtx": _Family(
        device=DeviceSpec(
            name="NVIDIA TITAN RTX",
            memory_bytes=24_000_000_000,
            # Turing has neither bfloat16 nor TF32 units: bfloat16 runs at float32's rate.
            peak_flops_per_s={"float32": 16.3e12, "bfloat16": 16.3e12, "float16": 130.5e12},
            memory_bandwidth_bytes_per_s=672e9,
        ),
        intra=Link(name="PCIe 3.0 x16", latency_s=_PCIE_LATENCY_S, bandwidth_bytes_per_s=15.75e9),
        inter=Link(
            name=f"InfiniBand EDR, 100 Gbit/s for the {NODE_SIZE} GPUs of a node",
            latency_s=_NETWORK_LATENCY_S,
            bandwidth_bytes_per_s=12.5e9 / NODE_SIZE,
        ),
        source=(
            "NVIDIA TITAN RTX product page, https://www.nvidia.com/en-us/deep-learning-ai/products/titan-rtx/: 24 GB, "
            "672 GB/s, FP32 16.3 and tensor FP16 130.5 TFLOP/s; PCI Express 3.0: 8 GT/s x 16 lanes x 128/130. "
            "No NVLink bridge. Nodes are joined as in Miao et al., 'Galvatron', VLDB 2023, "
            f"https://arxiv.org/abs/2211.13878: 100 Gbit/s InfiniBand, taken as one port per node; {_NCCL}"
        ),
    ),
    "rtx4090x": _Family(
        device=DeviceSpec(
            name="NVIDIA GeForce RTX 4090",
            memory_bytes=24_000_000_000,
            peak_flops_per_s={
                "float32": 82.6e12,
                "tensorfloat32": 82.6e12,
                "bfloat16": 165.2e12,
                "float16": 165.2e12,
            },
            memory_bandwidth_bytes_per_s=1.008e12,
        ),
        intra=Link(name="PCIe 4.0 x16", latency_s=_PCIE_LATENCY_S, bandwidth_bytes_per_s=31.5e9),
        inter=None,
        source=(
            "NVIDIA Ada GPU architecture whitepaper, appendix A, "
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf: 24 GB, "
            "1008 GB/s, FP32 82.6, TF32 82.6, BF16 and FP16 (FP32 accumulation) 165.2 TFLOP/s dense; "
            f"PCI Express 4.0: 16 GT/s x 16 lanes x 128/130; {_NCCL}"
        ),
    ),
}


def cluster_preset(name: str) -> ClusterSpec:
    """The cluster of a name such as ``h100x64``: 64 H100s in 8 nodes of 8; ``h100x2``: two in one node.

    Raises:
        InputError: for an unknown name, with the nearest ones.

    Example:
        >>> cluster = cluster_preset("a100x16")
        >>> cluster.num_nodes, cluster.devices_per_node, cluster.device.name
        (2, 8, 'NVIDIA A100-SXM4-80GB')
    """
    match = re.fullmatch(r"(.*\D)([1-9][0-9]*)", name.lower())
    if not match or match[1] not in _FAMILIES:
        near = near_name(name, preset_names())
        hint = f" Did you mean {near!r}?" if near else ""
        raise InputError(f"No cluster preset {name!r}.{hint} Presets: {preset_summary()}.")
    prefix, count = match[1], int(match[2])
    family = _FAMILIES[prefix]
    counts = _counts(family)
    if count not in counts:
        nearest = sorted(sorted(counts, key=lambda known: abs(known - count))[:2])
        names = " and ".join(f"{prefix}{known}" for known in nearest)
        raise InputError(
            f"No cluster preset {name!r}: there are 1, 2 or 4 such devices in one node, or full nodes of "
            f"{NODE_SIZE} up to {family.most_devices} devices. Nearest: {names}."
        )
    num_nodes = max(1, count // NODE_SIZE)
    return ClusterSpec(
        name=f"{prefix}{count}",
        num_nodes=num_nodes,
        devices_per_node=count // num_nodes,
        device=family.device,
        intra=family.intra,
        inter=family.inter if num_nodes > 1 else None,
        source=family.source,
    )


def preset_names() -> tuple[str, ...]:
    """Every name that `cluster_preset` knows."""
    return tuple(f"{prefix}{count}" for prefix, family in _FAMILIES.items() for count in _counts(family))


def preset_summary() -> str:
    """The presets in one line, for help texts."""
    return ", ".join(f"{prefix}1 to {prefix}{family.most_devices}" for prefix, family in _FAMILIES.items())


def _counts(family: _Family) -> tuple[int, ...]:
    return (1, 2, 4, *range(NODE_SIZE, family.most_devices + 1, NODE_SIZE))
