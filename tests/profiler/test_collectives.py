"""Collectives move what they say, over every size of group the mesh can form."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from galvatron_jax.profiler.bench import Bench
from galvatron_jax.profiler.cache import TimingCache
from galvatron_jax.profiler.collectives import (
    collective_function,
    collective_points,
    local_input,
    measure_collectives,
)
from galvatron_jax.profiler.devices import AxisGroup, axis_groups, live_mesh, num_nodes
from galvatron_jax.profiler.timing import Sampling
from galvatron_jax.spec.profile import CollectiveKind

QUICK = Sampling(window_s=0.002, budget_s=0.005, max_samples=3)


@dataclass(frozen=True)
class FakeDevice:
    process_index: int
    id: int
    platform: str = "cpu"


def fake_devices(nodes, each):
    return [FakeDevice(node, node * each + index) for node in range(nodes) for index in range(each)]


def fake_mesh(nodes, each, shape):
    return Mesh(np.array(fake_devices(nodes, each)).reshape(shape), tuple("abcdef"[: len(shape)]))


def test_the_live_mesh_has_prime_axes_over_all_devices():
    mesh = live_mesh()
    assert dict(mesh.shape) == {"a": 2, "b": 2, "c": 2}
    assert list(mesh.devices.flat) == jax.devices()


def test_a_single_device_has_a_mesh_without_groups():
    assert axis_groups(live_mesh(jax.devices()[:1])) == ()


def test_groups_are_those_that_subsets_of_axes_form():
    assert [(group.size, group.level) for group in axis_groups(live_mesh())] == [
        (2, "intra"),
        (4, "intra"),
        (8, "intra"),
    ]
    assert {group.size for group in axis_groups(live_mesh(jax.devices()[:6]))} == {2, 3, 6}


def test_groups_that_cross_processes_are_told_apart():
    found = {(group.size, group.level): group.axes for group in axis_groups(fake_mesh(2, 4, (2, 2, 2)))}
    assert found == {
        (2, "intra"): ("c",),
        (4, "intra"): ("b", "c"),
        (2, "inter"): ("a",),
        (4, "inter"): ("a", "c"),
        (8, "inter"): ("a", "b", "c"),
    }


def test_processes_are_nodes_and_must_be_equal():
    assert num_nodes(fake_devices(2, 4)) == 2
    with pytest.raises(ValueError, match=r"\[4, 3\] devices"):
        num_nodes(fake_devices(2, 4)[:-1])


@pytest.mark.parametrize("kind", list(CollectiveKind))
@pytest.mark.parametrize("size", [2, 8])
def test_bytes_are_the_full_array_that_the_group_holds_together(kind, size):
    mesh = live_mesh()
    group = next(group for group in axis_groups(mesh) if group.size == size)
    payload = 4096
    local = local_input(kind, group, payload)
    function = jax.shard_map(
        collective_function(kind, group),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    lowered = jax.jit(function).lower(local)
    result = lowered.out_info
    expected = {
        CollectiveKind.ALL_REDUCE: (payload, payload),
        CollectiveKind.ALL_GATHER: (payload // size, payload),
        CollectiveKind.REDUCE_SCATTER: (payload, payload // size),
        CollectiveKind.ALL_TO_ALL: (payload, payload),
        CollectiveKind.PERMUTE: (payload, payload),
    }
    assert (4 * local.size, 4 * result.size) == expected[kind]
    name = "all_to_all" if kind is CollectiveKind.ALL_TO_ALL else kind.value.replace("-", "_")
    assert lowered.as_text().count(f"stablehlo.{name}") == 1


def test_sizes_are_rounded_up_to_what_the_group_can_share():
    group = AxisGroup(("a",), 3, "intra")
    ((_, _, payload),) = collective_points([group], [4096], kinds=[CollectiveKind.REDUCE_SCATTER])
    assert payload == 4104


def test_measuring_gives_one_timing_per_kind_group_and_size(tmp_path):
    bench = Bench(mesh=live_mesh(jax.devices()[:4]), cache=TimingCache(tmp_path), sampling=QUICK)
    timings = measure_collectives(bench, sizes=(1024,))
    assert {(t.kind, t.axis_size, t.bytes) for t in timings} == {(k, n, 1024) for k in CollectiveKind for n in (2, 4)}
    assert all(t.timing.median_s > 0 and t.level == "intra" for t in timings)
