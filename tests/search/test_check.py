"""The winner's own problem, solved another way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from galvatron_jax.search import check
from galvatron_jax.search.check import Checked, check_winner
from galvatron_jax.search.space import Rule
from tests.search.fake import toy_model
from tests.search.questions import PIPELINES, SMALL, question


@pytest.mark.parametrize("space", [SMALL, PIPELINES])
@pytest.mark.parametrize("shared", [{}, {"tied": True, "skip": True}])
def test_brute_force_confirms_small_problems(space, shared) -> None:
    # Brute force asks of each group alone whether it fits.
    space = replace(space, disabled_rules=frozenset({Rule.ONE_PROGRAM}))
    asked = question(model=toy_model(2, **shared), space=space, memory_bytes=260_000)
    found = asked.answer(runners_up=False)
    checked = check_winner(asked, found.plan, time_limit_s=10, spare_bytes=found.statistics.spare_bytes)
    assert checked.oracle == "brute force"
    assert not checked.refuted
    assert checked.oracle_s == pytest.approx(checked.search_s, rel=1e-9)
    assert checked.verdict.startswith("brute force finds nothing faster than ")


@pytest.mark.parametrize("space", [SMALL, PIPELINES])
def test_the_mixed_integer_program_confirms_larger_ones(space, monkeypatch) -> None:
    monkeypatch.setattr(check, "_MOST_CHOICES", 0)
    asked = question(model=toy_model(4, tied=True), space=space, memory_bytes=300_000)
    found = asked.answer(runners_up=False)
    checked = check_winner(asked, found.plan, time_limit_s=30, spare_bytes=found.statistics.spare_bytes)
    assert checked.oracle == "the mixed-integer program"
    assert not checked.refuted
    assert checked.oracle_s == pytest.approx(checked.search_s, rel=1e-4)


def test_a_worse_plan_is_refuted() -> None:
    asked = question(space=SMALL)
    plan = asked.answer(runners_up=False).plan
    assert plan.prediction is not None
    slow = plan.prediction.time.model_copy(update={"step_s": 2 * plan.prediction.time.step_s})
    worse = plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"time": slow})})
    checked = check_winner(asked, worse, time_limit_s=10)
    assert checked.refuted
    assert "found a step of " in checked.verdict
    assert "50.000% less than" in checked.verdict


def test_what_was_not_ruled_out_is_said() -> None:
    text = Checked("the mixed-integer program", search_s=1.0, oracle_s=float("inf"), bound_s=0.9).verdict
    assert text == (
        "the mixed-integer program found nothing faster than 1.00 s in the time given; it has not ruled out that 10.0% "
        "less is possible. Give it more time with --time-limit."
    )
