"""GPUs that are not here, by name."""

from __future__ import annotations

import pytest

from galvatron_jax.errors import InputError
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.verify import targets
from galvatron_jax.verify.targets import TARGETS, read_target, target_devices

from .compiler import needs_compiler


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_has_the_figures_of_the_cluster_preset(name: str) -> None:
    target, device = TARGETS[name], cluster_preset(f"{name}x8").device
    assert target.name == device.name
    assert target.memory_bytes == pytest.approx(device.memory_bytes, rel=0.07)
    assert target.memory_bandwidth_bytes_per_s == pytest.approx(device.memory_bandwidth_bytes_per_s, rel=0.03)
    tensor_cores = 4 * target.multiprocessors
    peak = 2 * tensor_cores * target.tensor_flops_per_clock * target.tensor_clock_ghz * 1e9
    assert peak == pytest.approx(device.peak_flops_per_s["bfloat16"], rel=0.01)
    assert target.source


def test_a_target_is_named_as_a_cluster() -> None:
    name, cluster = read_target("h100x64")
    assert name == "h100"
    assert (cluster.num_nodes, cluster.devices_per_node) == (8, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10x8", "Did you mean 'h100x8'"),
        ("titanrtx8", "Targets: h100, h200, a100"),
        ("h100x12", "full nodes"),
    ],
)
def test_other_targets_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_target(text)


def test_devices_that_fill_no_node_are_refused() -> None:
    with pytest.raises(InputError, match="do not fill nodes of 8"):
        target_devices("h100", 12)
    with pytest.raises(InputError, match="Did you mean 'h100'"):
        target_devices("h10", 8)


def test_without_the_compiler_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    def missing(**_: object) -> None:
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(targets, "plugin_installed", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'galvatron-jax\[verify\]' \(it needs no GPU\)"):
        target_devices("h100", 8)
    monkeypatch.setattr(targets, "plugin_installed", lambda: True)
    with pytest.raises(InputError, match="its version must be that of jaxlib"):
        target_devices("h100", 8)


@needs_compiler
@pytest.mark.parametrize("name", TARGETS)
def test_the_compiler_takes_every_target(name: str) -> None:
    devices = target_devices(name, 16)
    assert len(devices) == 16
    assert devices[0].device_kind == TARGETS[name].name
