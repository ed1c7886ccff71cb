"""Plans of several stages, sweeps and explanations, as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from galvatron_jax.errors import InputError
from galvatron_jax.report.explanations import explanation, rules_table, what_binds
from galvatron_jax.report.plans import plan_report
from galvatron_jax.report.searches import search_report
from galvatron_jax.report.sweeps import describe_plan, save_sweep, sweep_figure, sweep_table, sweep_title
from galvatron_jax.report.text import render
from galvatron_jax.report.timelines import plan_timeline
from galvatron_jax.search import Rule
from galvatron_jax.search.sensitivity import Sensitivity, sensitivities
from galvatron_jax.search.sweeps import Quantity, SweepAxis, run_sweep
from tests.search.questions import PIPELINES, question

PIPELINE = question(space=PIPELINES)


@pytest.fixture(scope="module")
def found():
    return PIPELINE.answer()


@pytest.fixture(scope="module")
def sweep():
    return run_sweep(question(), (SweepAxis(Quantity.MEMORY, (50_000, 2**30)), SweepAxis(Quantity.DEVICES, (2, 4))))


def test_a_plan_of_several_stages_has_a_row_per_stage_and_per_group(found):
    text = render(plan_report(found.plan))
    assert "toy on 4 devices, batch 8 in 4 micro-batches, 2 stages (1f1b)" in text
    assert "Stages (forward and backward of one micro-batch)" in text
    assert "group 1" in text
    assert "Predicted memory per device of 1.00 GiB" in text
    assert "pipeline bubble" in text


def test_a_plan_written_by_hand_shows_its_strategies_only(found):
    text = render(plan_report(found.plan.model_copy(update={"prediction": None})))
    assert "stage" in text
    assert "Predicted" not in text


def test_a_timeline_needs_stages_and_their_times(found):
    assert plan_timeline(found.plan).total_s < found.prediction.time.step_s
    with pytest.raises(InputError, match="one stage: its micro-batches run one after another"):
        plan_timeline(question().answer(runners_up=False).plan)
    with pytest.raises(InputError, match="has no prediction of its stages.*Price it first"):
        plan_timeline(found.plan.model_copy(update={"prediction": None}))


def test_explanations_hold_every_part(found):
    text = render(explanation(found, sensitivities(PIPELINE, found)))
    for part in ("Side by side: ", "the best", "Pruning rules: ", "With more of each: ", "Most of the step is"):
        assert part in text
    assert "twice the bandwidth between nodes" in text


def test_every_rule_says_what_it_removes(found):
    pruned = tuple((rule.value, 1) for rule in Rule)
    text = render([rules_table(replace(found, statistics=replace(found.statistics, pruned=pruned)))])
    assert all(rule in text for rule in Rule)


def test_what_binds_is_said_with_the_largest_gain_first(found):
    memory, links = (
        Sensitivity(resource, change, 1.0, gain, found.plan, True)
        for resource, change, gain in (("memory", "1 GiB more", 0.02), ("link in a node", "twice of it", 0.3))
    )
    assert what_binds(found, (memory, links)) == (
        "What binds most: link in a node (+30.0% examples/s with twice of it). "
        "Then memory (+2.0% examples/s with 1 GiB more)."
    )
    nothing = what_binds(found, (replace(memory, gain=0.0),))
    assert nothing.startswith("Nothing of these binds: most of the step is ")


def test_a_pipeline_does_not_claim_that_memory_does_not_bind(found):
    assert "Memory does not bind" not in render(search_report(found))
    alone = question().answer()
    assert "Memory does not bind" in render(search_report(alone))
    unproven = replace(found, statistics=replace(found.statistics, bound_s=found.statistics.step_s / 2))
    assert "not proven; no plan is more than 50.0% faster" in render(search_report(unproven))


def test_plans_in_a_few_words(found):
    assert describe_plan(found.plan).startswith("2 stages 1f1b, batch 8 in 4 micro-batches")


def test_a_sweep_is_a_table_with_a_row_per_cell(sweep):
    assert sweep_title(sweep) == "toy on toy, batch 8: 2 of memory × 2 of devices"
    text = render([sweep_table(sweep)], width=160)
    assert text.count("nothing fits: the nearest plan needs") == 2
    assert "48.83 KiB" in text
    assert "batch 8" in text
    assert sweep_title(replace(sweep, axes=sweep.axes[:1])).startswith("toy on 4 × toy, batch 8")
    several = replace(sweep, question=replace(sweep.question, global_batches=(8, 16)))
    assert "the best batch of 8 to 16" in sweep_title(several)


def test_a_sweep_is_written_by_its_ending(sweep, tmp_path):
    save_sweep(sweep, str(tmp_path / "new" / "sweep.csv"))
    lines = (tmp_path / "new" / "sweep.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("memory_bytes,devices,")
    with pytest.raises(InputError, match=r"sweep.txt: a sweep's table is written to .csv and .json files"):
        save_sweep(sweep, str(tmp_path / "sweep.txt"))


def test_a_sweep_is_a_line_per_combination_of_the_other_axes(sweep):
    pytest.importorskip("matplotlib")
    figure = sweep_figure(sweep)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["devices 2", "devices 4"]
    assert axes.get_xlabel() == "memory per device, GiB"
    assert "gaps: no plan fits" in axes.get_title()
