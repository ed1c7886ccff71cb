import pytest

from galvatron_jax.errors import InputError
from galvatron_jax.spec.presets import cluster_preset, preset_names, preset_summary


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds(name):
    cluster = cluster_preset(name)
    assert cluster.name == name
    assert name.endswith(f"x{cluster.num_devices}")
    assert (cluster.inter is None) == (cluster.num_nodes == 1)
    assert "http" in cluster.source
    peaks = cluster.device.peak_flops_per_s
    assert {"float32", "bfloat16", "float16"} <= set(peaks)
    assert peaks["float32"] <= peaks["bfloat16"] <= peaks["float16"]


@pytest.mark.parametrize("family", ["a100", "h100", "h200"])
def test_data_centre_presets_reach_128_nodes(family):
    cluster = cluster_preset(f"{family}x1024")
    assert (cluster.num_nodes, cluster.devices_per_node) == (128, 8)
    assert cluster.inter.bandwidth_bytes_per_s < cluster.intra.bandwidth_bytes_per_s


def test_workstation_nodes_share_one_network_port():
    inter = cluster_preset("titanrtx16").inter
    assert inter.bandwidth_bytes_per_s * 8 == 100e9 / 8  # bytes of eight devices, bits of the port


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("a100x8", (19.5e12, 312e12, 2.039e12, 300e9)),
        ("h100x8", (66.9e12, 989.4e12, 3.35e12, 450e9)),
        ("h200x8", (66.9e12, 989.4e12, 4.8e12, 450e9)),
        ("titanrtx8", (16.3e12, 16.3e12, 672e9, 15.75e9)),
        ("rtx4090x8", (82.6e12, 165.2e12, 1.008e12, 31.5e9)),
    ],
)
def test_figures_are_the_datasheets(name, figures):
    cluster = cluster_preset(name)
    device = cluster.device
    assert figures == (
        device.peak_flops_per_s["float32"],
        device.peak_flops_per_s["bfloat16"],
        device.memory_bandwidth_bytes_per_s,
        cluster.intra.bandwidth_bytes_per_s,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10x8", "No cluster preset 'h10x8'. Did you mean 'h100x8'?"),
        ("h100", "No cluster preset 'h100'. Did you mean 'h100x"),
        ("h100x12", "or full nodes of 8 up to 1024 devices. Nearest: h100x8 and h100x16."),
        ("h100x2048", "Nearest: h100x1016 and h100x1024."),
        ("titanrtx8000", "Nearest: titanrtx1016 and titanrtx1024."),
        ("rtx4090x16", "up to 8 devices. Nearest: rtx4090x4 and rtx4090x8."),
        ("???", "Presets: a100x1 to a100x1024, h100x1 to h100x1024"),
        ("h100x0", "No cluster preset 'h100x0'."),
    ],
)
def test_an_unknown_preset_names_the_near_ones(name, message):
    with pytest.raises(InputError) as caught:
        cluster_preset(name)
    assert message in str(caught.value)


def test_the_summary_names_each_family():
    assert all(name in preset_summary() for name in ("a100x1", "h100x1024", "h200x1", "titanrtx", "rtx4090x8"))
