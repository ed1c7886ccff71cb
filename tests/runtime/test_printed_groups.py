"""Groups of collectives, read from programs however a version of JAX prints them."""

from __future__ import annotations

import pytest

from galvatron_jax._compat import compiled_groups, groups_along, lowered_groups

MESH = {"a": 2, "b": 2, "c": 1}
ALONG_A = [[0, 2], [1, 3]]


def mesh_axes(*axes: str) -> str:
    """As JAX 0.12 lowers a group along axes."""
    listed = ", ".join(f"#stablehlo.axis_ref<{axis}>" for axis in axes)
    return (
        '"(%1) <{channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, '
        f"replica_groups = #stablehlo.replica_group_mesh_axes<mesh = @mesh_0, axes = [{listed}]>, use_global_device_ids"
    )


@pytest.mark.parametrize(
    ("axes", "groups"),
    [
        (("a",), ALONG_A),
        (("b",), [[0, 1], [2, 3]]),
        (("c",), [[0], [1], [2], [3]]),
        (("a", "b", "c"), [[0, 1, 2, 3]]),
        (("b", "a"), [[0, 2, 1, 3]]),
        ((), [[0], [1], [2], [3]]),
    ],
)
def test_a_group_along_axes_is_the_devices_that_differ_there(axes: tuple[str, ...], groups: list) -> None:
    assert groups_along(axes, mesh=MESH) == groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("<{replica_groups = dense<[[0, 2], [1, 3]]> : tensor<2x2xi64>, use_global_device_ids", ALONG_A),
        ("<{replica_groups = dense<0> : tensor<1x1xi64>, use_global_device_ids", [[0]]),
        (mesh_axes('name = "a"'), ALONG_A),
        (mesh_axes('name = "b"', 'name = "a"'), [[0, 2, 1, 3]]),
        (mesh_axes('name = "of another mesh"'), None),
        (mesh_axes('name = "a", sub_axis_info = #stablehlo.sub_axis_info<pre_size = 1, size = 2>'), None),
        ("<{source_target_pairs = dense<[[0, 1]]> : tensor<1x2xi64>", None),
    ],
)
def test_groups_are_read_from_lowered_text(text: str, groups: list | None) -> None:
    assert lowered_groups(text, mesh=MESH) == groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", ALONG_A),
        ("replica_groups=[2,2]<=[4], use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true", ALONG_A),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=1] {'a'}, use_global_device_ids=true", ALONG_A),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=1] {'b','a'}, dimensions={0}", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['all'=4] {'all':(1)2}, dimensions={0}", ALONG_A),
        ("replica_groups=mesh['all'=4] {'all':(2)2}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['all'=4,'one'=1] {'one','all':(2)2,'all':(1)2}, dimensions={0}", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['x'=1,'y'=2,'z'=2], device_ids=([2,2]T(1,0)) {'y'}, channel_id=1", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'a'}, dimensions={0}", [[3, 2], [1, 0]]),
        ("source_target_pairs={{0,1}}", None),
    ],
)
def test_groups_are_read_from_compiled_text(text: str, groups: list | None) -> None:
    assert compiled_groups(f"%x = f32[4]{{0}} all-reduce(%y), channel_id=1, {text}, to_apply=%sum") == groups
