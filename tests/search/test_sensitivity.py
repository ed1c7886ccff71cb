"""What more of a resource would bring: the same question asked again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from galvatron_jax.search.sensitivity import binding, sensitivities
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.units import GIB
from tests.search.fake import cluster
from tests.search.questions import question


def found_for(asked, **options):
    result = asked.answer(runners_up=False)
    return result, {one.resource: one for one in sensitivities(asked, result, **options)}


def test_each_gain_is_that_of_the_search_with_more() -> None:
    asked = question(memory_bytes=200_000)
    told = []
    result, found = found_for(asked, progress=lambda *what: told.append(what))
    assert list(found) == ["memory", "link in a node", "link between nodes", "devices"]
    assert told[0] == (0, 4, "searching with 1.00 GiB more per device")
    more = {
        "memory": replace(asked, memory_bytes=200_000 + GIB),
        "link in a node": asked.with_bandwidth("intra", 2.0),
        "link between nodes": asked.with_bandwidth("inter", 2.0),
        "devices": asked.on_devices(8),
    }
    for resource, changed in more.items():
        rate = changed.answer(runners_up=False).examples_per_s
        assert found[resource].examples_per_s == pytest.approx(rate)
        assert found[resource].gain == pytest.approx(rate / result.examples_per_s - 1)
        assert found[resource].proven
    assert found["memory"].gain > 0


def test_what_matters_most_comes_first_and_trifles_are_left_out() -> None:
    asked = question(memory_bytes=200_000)
    result, found = found_for(asked)
    several = tuple(replace(found["memory"], gain=gain) for gain in (0.005, 0.2, -0.1, 0.5))
    assert [one.gain for one in binding(several)] == [0.5, 0.2]
    assert result.plan.num_devices == 4


def test_more_is_never_worse_for_want_of_time() -> None:
    _, found = found_for(question(memory_bytes=200_000), time_limit_s=0.0)
    assert all(one.gain >= 0 for name, one in found.items() if name != "devices")


def test_links_that_are_not_there_are_left_out() -> None:
    _, found = found_for(question(cluster=cluster(1, 4)))
    assert "link between nodes" not in found
    _, found = found_for(question(cluster=cluster(1, 1)))
    assert list(found) == ["memory", "devices"]


def test_devices_that_cannot_be_are_noted() -> None:
    alone = question(cluster=cluster(1, 4).model_copy(update={"inter": None}))
    _, found = found_for(alone)
    assert found["devices"].plan is None
    assert "has no link between nodes" in found["devices"].note
    assert found["devices"].gain == 0
    preset = question(cluster=cluster_preset("rtx4090x8"))
    _, found = found_for(preset)
    assert "No cluster preset 'rtx4090x16'" in found["devices"].note
