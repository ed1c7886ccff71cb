"""Seconds of collectives: ring formulas and measurements."""

import pytest

from galvatron_jax.cost import derive_profile
from galvatron_jax.cost.links import Group, ProfiledLinks, RingLinks, group_of, links_for, ring_seconds
from galvatron_jax.errors import InputError
from galvatron_jax.partition.layer_plan import Collective
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.profile import CollectiveKind, CollectiveTiming, Profile, Provenance, Timing
from tests.search.fake import cluster, toy_model

MESH = (MeshAxis(name="a", size=2, level="inter"), MeshAxis(name="b", size=2), MeshAxis(name="c", size=2))
KIND = CollectiveKind.ALL_REDUCE


def collective(*axes: str, bytes_: int = 8_000_000, kind: CollectiveKind = KIND) -> Collective:
    return Collective(kind, axes, 2 ** len(axes), bytes_)


def profile(*points: tuple[int, int, float], level: str = "intra") -> Profile:
    timings = tuple(
        CollectiveTiming(kind=KIND, axis_size=size, level=level, bytes=count, timing=Timing(median_s=seconds))
        for size, count, seconds in points
    )
    return Profile(
        provenance=Provenance.MEASURED,
        device="toy",
        num_devices=8,
        model_fingerprint="toy",
        layers=(),
        collectives=timings,
    )


def test_a_ring_all_reduce_moves_twice_n_minus_one_nths() -> None:
    seconds = ring_seconds(KIND, Group(inside=4, nodes=1), payload_bytes=1e9, cluster=cluster())
    assert seconds == pytest.approx(7e-6 + 2 * 3 / 4 * 1e9 / 1e10)


def test_gather_and_scatter_together_cost_an_all_reduce_and_one_start() -> None:
    group, where = Group(inside=4, nodes=1), cluster()
    both = sum(
        ring_seconds(kind, group, payload_bytes=1e6, cluster=where)
        for kind in (CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER)
    )
    whole = ring_seconds(KIND, group, payload_bytes=1e6, cluster=where)
    assert both == pytest.approx(whole + where.intra.latency_s)


def test_a_group_across_nodes_shares_the_network_between_its_members_in_a_node() -> None:
    where = cluster(2, 4)
    wide = ring_seconds(KIND, Group(inside=4, nodes=2), payload_bytes=1e9, cluster=where)
    thin = ring_seconds(KIND, Group(inside=1, nodes=2), payload_bytes=1e9, cluster=where)
    assert wide == pytest.approx(2 * 7 / 8 * 1e9 / 4 / 1e9, rel=1e-3)
    assert thin == pytest.approx(2 * 1 / 2 * 1e9 / 1e9, rel=1e-3)


def test_groups_are_read_off_the_mesh() -> None:
    assert group_of(("a", "c"), MESH) == Group(inside=2, nodes=2)
    assert group_of(("a", "c"), MESH).level == "inter"
    assert group_of(("b", "c"), MESH).level == "intra"
    with pytest.raises(InputError, match="has no axis d"):
        group_of(("d",), MESH)


def test_an_axis_across_nodes_needs_a_network() -> None:
    single = cluster().model_copy(update={"inter": None})
    with pytest.raises(InputError, match="no link between nodes"):
        RingLinks(single, MESH).seconds(collective("a"))


def test_measurements_are_piecewise_linear_and_go_on_with_the_last_slope() -> None:
    links = ProfiledLinks(profile((2, 1000, 1.0), (2, 2000, 3.0)), cluster(2, 4), MESH)
    times = [links.seconds(collective("c", bytes_=count)) for count in (10, 1500, 3000)]
    assert times == pytest.approx([1.0, 2.0, 5.0])


def test_measurements_that_fall_are_evened_out_and_large_messages_never_free() -> None:
    links = ProfiledLinks(profile((2, 1000, 3.0), (2, 2000, 1.0)), cluster(2, 4), MESH)
    times = [links.seconds(collective("c", bytes_=count)) for count in (10, 1500, 4000)]
    # Off by less, in proportion, of the smaller one; beyond the end in proportion to the bytes.
    assert times == pytest.approx([1.2, 1.2, 2.4])
    flat_at_the_end = ProfiledLinks(profile((2, 1000, 1.0), (2, 2000, 2.0), (2, 3000, 2.0)), cluster(2, 4), MESH)
    assert flat_at_the_end.seconds(collective("c", bytes_=5000)) == pytest.approx(4.0)


def test_a_group_size_that_was_not_measured_is_scaled_by_the_ring() -> None:
    where = cluster(2, 4)
    links = ProfiledLinks(profile((2, 10**6, 1.0), (2, 10**9, 2.0)), where, MESH)
    four = links.seconds(collective("b", "c", bytes_=10**6))
    ratio = ring_seconds(KIND, Group(4, 1), payload_bytes=1e6, cluster=where) / ring_seconds(
        KIND, Group(2, 1), payload_bytes=1e6, cluster=where
    )
    assert four == pytest.approx(ratio)


def test_an_operation_that_was_never_measured_is_an_error() -> None:
    links = ProfiledLinks(profile((2, 1000, 1.0)), cluster(2, 4), MESH)
    with pytest.raises(InputError, match=r"no timing of all-to-all \(wanted: group of 2, intra\)"):
        links.seconds(collective("c", kind=CollectiveKind.ALL_TO_ALL))


def test_a_derived_profile_prices_as_its_own_table_says() -> None:
    where = cluster(2, 4)
    derived = derive_profile(toy_model(1), where)
    links = links_for(derived, cluster=where, mesh=MESH)
    assert derived.provenance is Provenance.DERIVED
    for timing in derived.collectives:
        if timing.axis_size == 2 and timing.level == "intra":
            found = links.seconds(Collective(timing.kind, ("c",), 2, timing.bytes))
            assert found == pytest.approx(timing.timing.median_s)
