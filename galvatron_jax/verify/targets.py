"""GPUs that are not here, as XLA's GPU compiler takes them.

The compiler needs no GPU, no driver and no CUDA toolkit: only JAX's CUDA plugin (the `verify` extra) and a description
of the device in a dozen figures. What it says of memory and collectives is what it would say on the real machine, but
for kernels that it would choose by timing them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import jax

from galvatron_jax.errors import InputError
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.validation import did_you_mean

INSTALL = "pip install 'galvatron-jax[verify]'"

_ELEMENTS = {"s8": 2, "s32": 4, "u32": 8, "f16": 10, "f32": 11, "f64": 12, "bf16": 16, "f8e5m2": 19, "f8e4m3fn": 20}
"""Numbers of XLA's element types (`xla_data.proto`)."""


@dataclass(frozen=True)
class GpuTarget:
    """A GPU in the figures that the compiler asks for."""

    name: str
    compute_capability: tuple[int, int]
    accelerated: bool
    """Whether code may use features of this very architecture (`sm_90a`)."""
    multiprocessors: int
    float_units: int
    """float32 units of a multiprocessor."""
    double_units: int
    """float64 units of a multiprocessor."""
    clock_ghz: float
    tensor_clock_ghz: float
    tensor_flops_per_clock: int
    """Of one of a multiprocessor's four tensor cores: bfloat16 multiply-adds."""
    memory_bytes: int
    memory_bandwidth_bytes_per_s: int
    l2_bytes: int
    shared_memory_bytes: int
    """Of a multiprocessor."""
    shared_memory_per_block_bytes: int
    """That a block may ask for."""
    links: int
    """NVLinks in use."""
    source: str

    def text(self) -> str:
        """The description as XLA reads it: a `GpuTargetConfigProto` in text form."""
        major, minor = self.compute_capability
        minor_text = f" minor: {minor}" if minor else ""
        feature = "ACCELERATED_FEATURES" if self.accelerated else "NONE"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory_bytes}
              shared_memory_per_block_optin: {self.shared_memory_per_block_bytes}
              core_count: {self.multiprocessors} fpus_per_core: {self.float_units} clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              memory_bandwidth: {self.memory_bandwidth_bytes_per_s} device_memory_size: {self.memory_bytes}
              l2_cache_size: {self.l2_bytes} pcie_bandwidth: 34359738368
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {major}{minor_text} feature_extension: {feature} }}
              scalar_unit_description {{ {self._scalar_rates()} }}
              matrix_unit_description {{ {self._tensor_rates()} }}
              device_address_bits: 64 ecc_enabled: true device_vendor: "NVIDIA Corporation" name: "{self.name}"
              driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
              dnn_version: "9.10.0" device_interconnect_info {{ active_links: {self.links} }}
            }}
            platform_name: "CUDA" device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }} runtime_version {{ major: 12 minor: 9 patch: 0 }}
        """

    def _scalar_rates(self) -> str:
        units = {"s32": 64, "u32": 64, "f16": 128, "f32": self.float_units, "f64": self.double_units, "bf16": 128}
        twice = {"f16", "bf16"}
        return " ".join(_rate(t, self.clock_ghz, count, 2 if t in twice else 1) for t, count in units.items())

    def _tensor_rates(self) -> str:
        flops = self.tensor_flops_per_clock
        rates = {"s8": 2 * flops, "f16": flops, "f32": flops // 2, "bf16": flops}
        if self.accelerated:
            rates |= {"f8e5m2": 2 * flops, "f8e4m3fn": 2 * flops}
        found = [_rate(t, self.tensor_clock_ghz, 4, count) for t, count in rates.items()]
        return " ".join([*found, _rate("f64", self.clock_ghz, 4, self.double_units // 2)])


def _rate(element: str, clock_ghz: float, units: int, operations: int) -> str:
    value = f"clock_rate_ghz: {clock_ghz} units_per_core: {units} ops_per_clock: {operations}"
    return f"rate_infos {{ key: {_ELEMENTS[element]} value {{ {value} }} }}"


_XLA = "openxla/xla, xla/backends/gpu/target_config/specs"


def _hopper(name: str, *, memory_bytes: int, bandwidth: int, l2_bytes: int, source: str) -> GpuTarget:
    return GpuTarget(
        name=name, compute_capability=(9, 0), accelerated=True, multiprocessors=132, float_units=128, double_units=64,
        clock_ghz=1.98, tensor_clock_ghz=1.83, tensor_flops_per_clock=512, memory_bytes=memory_bytes,
        memory_bandwidth_bytes_per_s=bandwidth, l2_bytes=l2_bytes, shared_memory_bytes=233472,
        shared_memory_per_block_bytes=232448, links=18, source=source,
    )  # fmt: skip


TARGETS = {
    "h100": _hopper(
        "NVIDIA H100 80GB HBM3", memory_bytes=84_942_979_072, bandwidth=3_352_320_000_000, l2_bytes=50 * 2**20,
        source=f"NVIDIA H100 Tensor Core GPU architecture whitepaper (SXM5); {_XLA}/h100_sxm.txtpb",
    ),
    "h200": _hopper(
        "NVIDIA H200", memory_bytes=150_100_000_000, bandwidth=4_915_200_000_000, l2_bytes=60 * 2**20,
        source=f"NVIDIA H200 datasheet (SXM); {_XLA}/h200.txtpb",
    ),
    "a100": GpuTarget(
        name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0), accelerated=False, multiprocessors=108, float_units=64,
        double_units=32, clock_ghz=1.41, tensor_clock_ghz=1.41, tensor_flops_per_clock=256, memory_bytes=85_100_068_864,
        memory_bandwidth_bytes_per_s=2_039_040_000_000, l2_bytes=40 * 2**20, shared_memory_bytes=167936,
        shared_memory_per_block_bytes=166912, links=12,
        source=f"NVIDIA A100 Tensor Core GPU architecture whitepaper (SXM4); {_XLA}/a100_sxm_80.txtpb",
    ),
}  # fmt: skip
"""By name."""


def read_target(text: str) -> tuple[str, ClusterSpec]:
    """A target's name, and the cluster of a text such as `h100x64`: 64 H100s in nodes of eight.

    Raises:
        InputError: when there is no such cluster, or the compiler does not know its devices.
    """
    cluster = cluster_preset(text)
    name = cluster.name.rpartition("x")[0]
    if name not in TARGETS:
        raise InputError(
            f"XLA's GPU compiler has no description of {cluster.device.name} here. Targets: {', '.join(TARGETS)}, each "
            "with x and the number of devices, such as h100x64."
        )
    return name, cluster


def target_devices(name: str, count: int, *, per_node: int = 8) -> list[Any]:
    """Devices to compile for, node by node.

    Set `JAX_PLATFORMS=cpu` (or `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`) before JAX is imported: the plugin else looks for a
    driver.

    Args:
        name: a target of `TARGETS`.
        count: devices.
        per_node: devices of a node.

    Raises:
        InputError: when there is no such target, the devices do not fill nodes, or the plugin is missing.
    """
    if name not in TARGETS:
        raise InputError(f"There is no target {name!r}.{did_you_mean(name, list(TARGETS))}")
    nodes, rest = divmod(count, min(count, per_node))
    if rest:
        raise InputError(f"{count} devices do not fill nodes of {per_node}; use a multiple.")
    from jax.experimental import topologies  # an optional extra serves it

    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=TARGETS[name].text(), topology=f"{nodes}x1x{min(count, per_node)}"
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise InputError(f"XLA's GPU compiler is not at hand ({error}). {_way_out()}") from error
    return list(topology.devices)


def plugin_installed() -> bool:
    """Whether JAX's CUDA plugin is: the compiler."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (12, 13))


def _way_out() -> str:
    if not plugin_installed():
        return f"Install it by: {INSTALL} (it needs no GPU)."
    if getattr(jax.config, "jax_platforms", None) != "cpu":
        return "It is installed, but JAX looked for a GPU first: set JAX_PLATFORMS=cpu before Python starts."
    return "It is installed; its version must be that of jaxlib: compare them with pip list."
