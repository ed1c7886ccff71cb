"""Questions: several batches, other clusters, other links; and plans priced as the search priced them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from galvatron_jax.cost.derive import derive_profile
from galvatron_jax.errors import InfeasibleError, InputError
from galvatron_jax.search import SearchSpace
from galvatron_jax.search.question import with_devices
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.profile import Provenance
from tests.search.fake import cluster, toy_model
from tests.search.questions import PIPELINES, question


@pytest.mark.parametrize("schedule", [schedule for schedule in Schedule if schedule is not Schedule.NONE])
@pytest.mark.parametrize("shared", [{}, {"tied": True, "skip": True}])
def test_a_pipeline_costs_exactly_what_the_search_predicted(schedule: Schedule, shared: dict) -> None:
    asked = question(model=toy_model(4, **shared), space=replace(PIPELINES, schedules=(schedule,)))
    plan = asked.answer(runners_up=False).plan
    assert plan.schedule is schedule
    assert len(plan.stages) == (4 if schedule is Schedule.INTERLEAVED else 2)
    assert asked.price(plan) == plan.prediction


def test_of_several_batches_the_one_with_most_examples_per_second_wins() -> None:
    batches = (4, 8, 16)
    rates = [question(global_batches=(batch,)).answer(runners_up=False).examples_per_s for batch in batches]
    found = question(global_batches=batches).answer()
    assert found.examples_per_s == max(rates)
    assert found.plan.global_batch == batches[rates.index(max(rates))]
    assert found.runners_up


def test_batches_that_do_not_fit_are_passed_over() -> None:
    budget = question(global_batches=(4,)).answer(runners_up=False).prediction.largest.total_bytes
    space = SearchSpace(tp=False, sequence=(), zero=(0,), num_microbatches=(1,))
    smallest = question(global_batches=(4,), space=space).answer(runners_up=False).prediction.largest.total_bytes
    found = question(global_batches=(4, 4096), space=space, memory_bytes=max(budget, smallest)).answer(runners_up=False)
    assert found.plan.global_batch == 4
    with pytest.raises(InfeasibleError, match="global batch of 64 fits"):
        question(global_batches=(64, 128), memory_bytes=1000).answer()


def test_devices_that_slow_links_make_useless_are_left_unused_where_that_is_allowed() -> None:
    slow = cluster(2, 2).intra.model_copy(update={"bandwidth_bytes_per_s": 1e3})
    asked = question(cluster=cluster(2, 2).model_copy(update={"intra": slow, "inter": slow}))
    whole, found = asked.answer(runners_up=False), replace(asked, fewer_devices=True).answer()
    assert (whole.plan.num_devices, found.plan.num_devices) == (4, 1)
    assert found.examples_per_s > whole.examples_per_s
    assert found.statistics.proven
    assert found.runners_up
    assert found.explain().startswith("Plan of toy for 1 devices of toys")
    quick = question(model=toy_model(4, width=1024, hidden=1024), cluster=cluster(1, 4), fewer_devices=True)
    assert quick.answer(runners_up=False).plan.num_devices == 4


def test_a_part_of_the_cluster_is_asked_only_where_it_can_hold_the_stages() -> None:
    asked = question(cluster=cluster(2, 3), global_batches=(12,), space=PIPELINES, fewer_devices=True)
    assert [part.cluster.num_devices for part in asked._parts()] == [6, 2]
    with pytest.raises(InfeasibleError, match="fits"):
        replace(asked, memory_bytes=1000).answer()


def test_a_question_needs_a_batch_and_its_own_models_profile() -> None:
    with pytest.raises(InputError, match="no global batch to try"):
        question(global_batches=())
    profile = derive_profile(toy_model(1), cluster()).model_copy(update={"model_fingerprint": "other"})
    with pytest.raises(InputError, match=r"made for model other, this is toy \(toy\). Profile this model"):
        question(profile=profile)


def test_presets_grow_into_their_larger_sisters_and_others_by_whole_nodes() -> None:
    assert with_devices(cluster_preset("a100x16"), 4) == cluster_preset("a100x4")
    assert with_devices(cluster_preset("a100x8"), 24) == cluster_preset("a100x24")
    own = cluster(2, 4)
    assert with_devices(own, 8) is own
    larger = with_devices(own, 12)
    assert (larger.name, larger.num_nodes, larger.devices_per_node) == ("toys with 12 devices", 3, 4)
    part = with_devices(own, 3)
    assert (part.num_nodes, part.devices_per_node) == (1, 3)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (6, "6 devices do not fill nodes of 4 as cluster 'toys' has them; use 4 or 8."),
        (8, "8 devices need 2 nodes, but cluster 'toys' has no link between nodes: give it `inter`, or use at most 4"),
        (0, "0 devices: there must be at least 1."),
    ],
)
def test_clusters_that_cannot_be_are_refused(devices: int, message: str) -> None:
    alone = cluster(1, 4).model_copy(update={"inter": None})
    with pytest.raises(InputError) as caught:
        with_devices(alone, devices)
    assert message in str(caught.value)


def test_presets_say_which_sizes_there_are() -> None:
    with pytest.raises(InputError, match="No cluster preset 'h100x12'.*Nearest: h100x8 and h100x16"):
        with_devices(cluster_preset("h100x8"), 12)


def test_faster_links_scale_what_was_measured_but_not_its_latency() -> None:
    profile = derive_profile(toy_model(4), cluster(2, 2)).model_copy(update={"provenance": Provenance.MEASURED})
    asked = question(profile=profile)
    faster = asked.with_bandwidth("inter", 2.0)
    assert faster.cluster.inter is not None
    assert faster.cluster.inter.bandwidth_bytes_per_s == 2e9
    assert faster.profile is not None
    for before, after in zip(profile.collectives, faster.profile.collectives, strict=True):
        if before.level == "intra":
            assert after == before
            continue
        ratio = after.timing.median_s / before.timing.median_s
        assert ratio == 1 if before.bytes == 1024 else 0.5 < ratio < 1
        if before.bytes == 2**30:
            assert ratio == pytest.approx(0.5, abs=0.01)
    assert asked.with_bandwidth("inter", 1.0) is asked
    alone = question(cluster=cluster(1, 4).model_copy(update={"inter": None}))
    assert alone.with_bandwidth("inter", 2.0) is alone
