"""A model of the zoo under tighter and tighter budgets: which plans the search chooses, and what it says of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from galvatron_jax.api.optimizer import optimizer_memory
from galvatron_jax.cost import price_plan
from galvatron_jax.errors import InfeasibleError
from galvatron_jax.spec.strategy import Remat
from galvatron_jax.units import format_bytes
from tests.runtime.matrix import traced

from .budgets import AMPLE, BUDGETS, CLUSTER, MODEL, OPTIMIZER, TOO_SMALL, chosen


def test_ample_memory_gives_plain_data_parallelism() -> None:
    plan = chosen(AMPLE).plan
    assert plan.num_microbatches == 1
    for strategy in plan.strategies:
        assert strategy.dp == ("a", "b", "c")
        assert strategy.zero == 0
        assert strategy.remat is Remat.NONE


def test_tighter_budgets_bring_rematerialisation_and_zero() -> None:
    plans = [chosen(budget).plan for budget in BUDGETS]
    remats = [any(s.remat is not Remat.NONE for s in plan.strategies) for plan in plans]
    zeros = [any(s.zero for s in plan.strategies) for plan in plans]
    assert remats[:2] == [False, True]
    assert not zeros[0]
    assert zeros[-1]
    assert remats[-1]
    # Each comes to stay.
    assert zeros == sorted(zeros)
    assert remats == sorted(remats)


def test_less_memory_is_never_faster_and_every_plan_fits() -> None:
    predictions = [chosen(budget).prediction for budget in BUDGETS]
    seconds = [prediction.time.step_s for prediction in predictions]
    assert seconds == sorted(seconds)
    for budget, prediction in zip(BUDGETS, predictions, strict=True):
        assert prediction.memory[0].total_bytes <= budget
        assert prediction.memory_budget_bytes == budget


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_choice_is_explained(budget: int) -> None:
    result = chosen(budget)
    text, prediction = result.explain(), result.prediction
    assert result.plan.strategies[1].short() in text
    assert f"{format_bytes(prediction.memory[0].total_bytes)} per device of {format_bytes(budget)}" in text
    assert f"bound by {result.bound_by}" in text
    binds = prediction.time.step_s > result.statistics.unlimited_s * (1 + 1e-9)
    assert ("Memory binds: with more of it a step could take" in text) == binds
    assert binds == (budget != AMPLE)
    assert result.runners_up
    for other in result.runners_up:
        assert f"{other.family}: " in text
        assert other.reason(prediction) in text


def test_runners_up_lose_for_a_reason_that_changes_with_the_budget() -> None:
    ample, tight = (
        {o.family: o.reason(chosen(b).prediction) for o in chosen(b).runners_up} for b in (AMPLE, BUDGETS[-1])
    )
    assert "slower: computation takes" in ample["data parallel, rematerialised"]
    assert "slower" in ample["ZeRO 3"]
    assert "more than there is" in tight["data parallel"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_prediction_is_the_price_of_the_plan(budget: int) -> None:
    model, plan = traced(MODEL).spec, chosen(budget).plan
    again = price_plan(model, plan, cluster=CLUSTER, optimizer=optimizer_memory(OPTIMIZER, model), memory_bytes=budget)
    assert again == plan.prediction


def test_a_budget_too_small_names_the_nearest_plan_and_what_would_fit() -> None:
    with pytest.raises(InfeasibleError) as caught:
        chosen(TOO_SMALL)
    text, nearest = str(caught.value), caught.value.nearest
    need = nearest.prediction.memory[0].total_bytes
    assert f"fits in {format_bytes(TOO_SMALL)} per device on 8 × NVIDIA TITAN RTX" in text
    assert f"The nearest needs {format_bytes(need)}, {format_bytes(need - TOO_SMALL)} too much" in text
    assert "What would fit: a budget of 1 MiB per device, or 64 such devices" in text
    # What it says is so: that much memory is enough, a byte less is not.
    assert chosen(need).prediction.memory[0].total_bytes == need
    with pytest.raises(InfeasibleError):
        chosen(need - 1)


_SEARCH = """
import sys, time
from galvatron_jax.cost import OptimizerMemory
from galvatron_jax.search import search
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.presets import cluster_preset

model = ModelSpec.load(sys.argv[1])
started = time.process_time()
search(model, cluster_preset("titanrtx8"), global_batch=32, optimizer=OptimizerMemory(("same", "same"), 4))
assert "jax" not in sys.modules
print(time.process_time() - started)
"""


def test_a_search_takes_seconds_and_no_jax(tmp_path: Path) -> None:
    traced(MODEL).spec.save(tmp_path / "model.json")
    done = subprocess.run(
        [sys.executable, "-c", _SEARCH, tmp_path / "model.json"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 10
