"""Plans for the accuracy of step times are many and valid; what is measured is kept; figures are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.parts.accuracy_plans import MODELS, QUICK, plans
from benchmarks.parts.accuracy_record import Bench, file_name, summary
from galvatron_jax.cost import derive_profile
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.plan_checks import check_plan
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.profile import LayerTiming, LocalShape, Timing
from galvatron_jax.spec.strategy import Remat, SequenceParallel
from tests.search.fake import toy_model

LINKS = ("open", "500 Mbit/s")


def two_hosts() -> ClusterSpec:
    preset = cluster_preset("h100x16")
    return preset.model_copy(update={"num_nodes": 2, "devices_per_node": 1})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A model that is profiled, with nothing measured yet."""
    model = toy_model(4).model_copy(update={"name": "toy"})
    bench = Bench(tmp_path, LINKS, plans)
    model.save(tmp_path / "model.json")
    (tmp_path / "optimizer.json").write_text(json.dumps({"slots": ["float32", "float32"], "scalar_bytes": 4}))
    for number, link in enumerate(LINKS):
        two_hosts().save(tmp_path / f"cluster {file_name(link)}.json")
        derive_profile(model, two_hosts()).save(tmp_path / f"profile {file_name(link)} 0.json")
        found = plans(model)["dp x1" if number == 0 else "1f1b x16"]
        found.save(tmp_path / f"searched {file_name(link)}.json")
    return bench


def test_there_are_enough_plans_of_every_sort() -> None:
    model = toy_model(6)
    every = plans(model)
    assert len(every) >= 30
    assert len({plan.model_dump_json() for plan in every.values()}) == len(every)
    for plan in every.values():
        check_plan(plan, model, 2)
    strategies = {strategy for plan in every.values() for strategy in plan.strategies}
    assert {strategy.zero for strategy in strategies} == {0, 1, 2, 3}
    assert {strategy.remat for strategy in strategies} == set(Remat)
    assert {strategy.sp_kind for strategy in strategies} == set(SequenceParallel)
    assert {plan.schedule for plan in every.values()} == set(Schedule)
    assert any(len(set(plan.strategies)) > 1 for plan in every.values())
    assert set(QUICK) <= set(every)
    assert len(MODELS) == 2


def test_what_was_measured_is_not_measured_again(bench: Bench) -> None:
    names = ["dp x1", "dp x4", "1f1b x4"]
    # The first searched plan equals a plan by name; the second is one more.
    assert set(bench.missing(names)) == {"dp x1", "dp x4", "1f1b x4", "searched for 500 Mbit/s"}
    plan = plans(bench.model)["dp x1"].model_dump(mode="json")
    record = {"plan": plan, "rounds": 3, "seconds": {"open": [0.2, 0.1, 0.3], "500 Mbit/s": [0.4, 0.5, 0.3]}}
    (bench.folder / "measured dp x1.json").write_text(json.dumps(record))
    assert set(bench.missing(names)) == {"dp x4", "1f1b x4", "searched for 500 Mbit/s"}


def test_a_record_of_another_plan_does_not_count(bench: Bench) -> None:
    plan = plans(bench.model)["dp x4"].model_dump(mode="json")
    (bench.folder / "measured dp x1.json").write_text(json.dumps({"plan": plan, "rounds": 3, "seconds": {}}))
    assert "dp x1" in bench.missing(["dp x1"])


def test_rounds_go_on_where_they_were_ended(bench: Bench) -> None:
    names = ["dp x1", "dp x4"]
    assert bench.done(names) == 0
    for name, rounds in (("dp x1", 3), ("dp x4", 1), ("searched for 500 Mbit/s", 2)):
        record = {"plan": bench.wanted(names)[name].model_dump(mode="json"), "rounds": rounds, "seconds": {}}
        (bench.folder / f"measured {file_name(name)}.json").write_text(json.dumps(record))
    assert set(bench.missing(names)) == {"dp x4", "searched for 500 Mbit/s"}
    assert bench.done(names) == 1


def test_of_several_profiles_the_least_layer_and_the_median_collective_count(bench: Bench) -> None:
    def timing(median: float, least: float) -> Timing:
        return Timing(median_s=median, least_s=least)

    profile = bench.profile("open")
    shape = LocalShape(batch=1)
    for number, (middle, least) in enumerate([(3.0, 2.0), (5.0, 1.0), (4.0, 4.0)]):
        layer = LayerTiming(
            kind="k", shape=shape, remat=Remat.NONE, forward=timing(middle, least), backward=timing(9.0, 9.0 - number)
        )
        collectives = [each.model_copy(update={"timing": timing(middle, least)}) for each in profile.collectives]
        update = {"layers": (layer,), "collectives": tuple(collectives)}
        profile.model_copy(update=update).save(bench.folder / f"profile {file_name('open')} {number}.json")
    found = bench.profile("open")
    assert (found.layers[0].forward.median_s, found.layers[0].backward.median_s) == (1.0, 7.0)
    assert {each.timing.median_s for each in found.collectives} == {4.0}


def test_rows_and_their_summary() -> None:
    def row(plan: str, measured: float, predicted: float) -> dict:
        numbers = {"measured_s": measured, "predicted_s": predicted, "error": round(predicted / measured - 1, 4)}
        return {"model": "m", "link": "open", "plan": plan, **numbers}

    rows = [row("dp x1", 1.0, 1.1), row("tp x1", 2.0, 1.8), row("1f1b x4", 3.0, 3.0), row("searched for open", 1.1, 1)]
    (found,) = summary(rows)
    assert found["mean_absolute_error"] == pytest.approx((0.1 + 0.1 + 0.0) / 3, abs=1e-4)
    assert found["spearman"] == 1.0
    assert found["fastest_measured"] == "dp x1"
    assert found["searched_over_fastest"] == pytest.approx(0.1)
    assert found["plans"] == 3
    assert abs(found["worst_error"]) == pytest.approx(0.1)
