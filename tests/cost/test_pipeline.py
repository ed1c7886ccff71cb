"""What stages wait for beside their own work."""

import numpy as np
import pytest

from galvatron_jax.cost.pipeline import CutCost, passing_seconds

CUTS = (CutCost(), CutCost(8, 1.0, 0.5), CutCost(8, 2.0, 0.25), CutCost(8, 4.0, 0.125))
"""In front of each of four layers."""


@pytest.mark.parametrize("recomputes", [False, True])
def test_one_stage_waits_for_nothing(recomputes: bool) -> None:
    assert passing_seconds(CUTS, recomputes=recomputes)[:, 0, 4].tolist() == [0.0, 0.0]


def test_two_stages_each_wait_for_one_message_each_way() -> None:
    found = passing_seconds(CUTS, recomputes=False)
    assert found[:, 0, 2].tolist() == found[:, 2, 4].tolist() == [2.0, 0.25]


def test_a_stage_in_between_sends_on_at_its_end_and_back_at_its_start() -> None:
    assert passing_seconds(CUTS, recomputes=False)[:, 1, 3].tolist() == [4.0, 0.5]


def test_a_last_stage_without_a_forward_waits_in_its_backward() -> None:
    plain, again = (passing_seconds(CUTS, recomputes=recomputes) for recomputes in (False, True))
    assert again[:, 2, 4].tolist() == [0.0, 2.25]
    np.testing.assert_array_equal(again[:, :, :4], plain[:, :, :4])
