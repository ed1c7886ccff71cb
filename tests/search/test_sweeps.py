"""Sweeps: every combination, infeasible ones included."""

from __future__ import annotations

from dataclasses import replace

import pytest

from galvatron_jax.errors import InputError
from galvatron_jax.search.sweeps import Quantity, SweepAxis, SweepCell, _best_known, run_sweep
from tests.search.fake import cluster
from tests.search.questions import question

MEMORY = SweepAxis(Quantity.MEMORY, (50_000, 150_000, 2**30))
DEVICES = SweepAxis(Quantity.DEVICES, (2, 4))


def test_every_combination_is_the_answer_to_its_own_question() -> None:
    told = []
    sweep = run_sweep(question(), (MEMORY, DEVICES), progress=lambda *what: told.append(what))
    assert [cell.values for cell in sweep.cells] == [(m, d) for m in MEMORY.values for d in DEVICES.values]
    assert told[1] == (1, 6, "memory 48.83 KiB, devices 4")
    for cell in sweep.cells:
        memory, devices = cell.values
        assert cell.question.budget_bytes == memory
        assert cell.question.cluster.num_devices == devices
        if cell.result is not None:
            alone = replace(question(), memory_bytes=int(memory)).on_devices(int(devices)).answer(runners_up=False)
            assert cell.result.plan == alone.plan


def test_cells_in_which_nothing_fits_say_by_how_much_and_the_sweep_goes_on() -> None:
    sweep = run_sweep(question(), (MEMORY, DEVICES))
    assert sweep.cells[0].result is None
    assert sweep.cells[-1].result is not None
    assert sweep.cells[0].reason.startswith("nothing fits: the nearest plan needs ")
    assert sweep.cells[0].reason.endswith(" too much")
    first, *_, last = sweep.records()
    assert list(first) == list(last)
    assert (first["fits"], first["step_s"], first["global_batch"]) == (False, None, 8)
    assert (last["fits"], last["reason"], last["devices"], last["schedule"]) == (True, None, 4, "none")
    assert last["plan"].startswith("layers 0 (embedding)")


def test_a_cell_that_makes_no_sense_says_so_and_the_sweep_goes_on() -> None:
    sweep = run_sweep(question(), (SweepAxis(Quantity.BATCH, (6, 8)),))
    assert "global batch of 6 cannot be cut into [4] equal micro-batches" in sweep.cells[0].reason
    assert sweep.cells[1].result is not None


def test_more_memory_and_faster_links_are_never_slower() -> None:
    axes = (SweepAxis(Quantity.INTER_BANDWIDTH, (0.5, 1, 4)), SweepAxis(Quantity.INTRA_BANDWIDTH, (1, 2)))
    rates = [cell.result.examples_per_s for cell in run_sweep(question(), axes).cells if cell.result]
    assert rates[0] < rates[-1]
    assert rates[::2] == sorted(rates[::2])
    assert rates[1::2] == sorted(rates[1::2])
    memory = run_sweep(question(), (SweepAxis(Quantity.MEMORY, (120_000, 200_000, 2**30)),))
    rates = [cell.result.examples_per_s for cell in memory.cells if cell.result]
    assert rates == sorted(rates)


def test_where_a_search_was_cut_short_a_plan_found_with_another_budget_counts() -> None:
    sweep = run_sweep(question(), (SweepAxis(Quantity.MEMORY, (200_000, 2**30)),))
    tight, ample = sweep.cells
    assert tight.result is not None
    assert ample.result is not None
    poor = ample.question.answer(runners_up=False)
    slow = poor.prediction.model_copy(update={"time": poor.prediction.time.model_copy(update={"step_s": 1.0})})
    found = replace(poor, plan=poor.plan.model_copy(update={"prediction": slow}))
    cut_short = SweepCell(ample.values, ample.question, found)
    _, better = _best_known(sweep.axes, [tight, cut_short])
    assert better.result is not None
    assert better.result.plan.strategies == tight.result.plan.strategies
    assert better.result.prediction.memory_budget_bytes == 2**30
    assert better.result.prediction.time.step_s == tight.result.prediction.time.step_s
    # A plan that does not fit does not count, however fast.
    assert poor.prediction.largest.total_bytes > 200_000
    assert _best_known(sweep.axes, [tight, ample])[0] == tight


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((), "A sweep needs something to vary, such as memory=16GiB:80GiB:8GiB."),
        ((DEVICES, DEVICES), "The sweep varies devices twice; give all its values at once."),
        ((SweepAxis(Quantity.BATCH, ()),), "The sweep over batch needs positive values, not []."),
        ((SweepAxis(Quantity.MEMORY, (-1.0,)),), "The sweep over memory needs positive values, not [-1.0]."),
        ((SweepAxis(Quantity.DEVICES, (3,)),), "3 devices do not fill nodes of 2"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(axes: tuple[SweepAxis, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run_sweep(question(), axes)
    assert message in str(caught.value)


def test_links_that_no_cluster_of_the_sweep_has_are_refused() -> None:
    alone = question(cluster=cluster(1, 4).model_copy(update={"inter": None}))
    with pytest.raises(InputError, match="varies the bandwidth between nodes, but 'toys' has one node"):
        run_sweep(alone, (SweepAxis(Quantity.INTER_BANDWIDTH, (1, 2)),))
