"""Curves through measurements rise, stay near the points, and say by how much they miss them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from galvatron_jax.cost.lines import fit_rising

SECONDS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=7)


@given(SECONDS)
def test_a_fit_never_falls_and_keeps_its_residuals(seconds: list[float]) -> None:
    y = np.array(seconds)
    fit = fit_rising(4.0 ** np.arange(len(y)), y)
    assert np.all(np.diff(fit.y) >= 0)
    assert np.all(fit.y > 0)
    np.testing.assert_allclose(fit.y * (1 + fit.residuals), y, rtol=1e-9)
    assert fit(4.0 ** len(y)) >= fit.y[-1]


@given(SECONDS)
def test_a_fit_is_the_least_squares_one_of_all_that_never_fall(seconds: list[float]) -> None:
    y = np.array(seconds)
    fit = fit_rising(4.0 ** np.arange(len(y)), y)
    # As a sum of steps, none negative: the same problem for another solver.
    steps = np.tril(np.ones((len(y), len(y)))) / y[:, None]
    _, least = nnls(steps, np.ones(len(y)))
    assert np.linalg.norm(fit.y / y - 1) <= least + 1e-6


def test_points_in_order_are_met_exactly() -> None:
    fit = fit_rising(np.array([1.0, 2.0, 8.0]), np.array([1.0, 1.5, 9.0]))
    assert fit.y.tolist() == [1.0, 1.5, 9.0]
    assert fit.worst == 0.0


def test_what_falls_is_pooled_and_said() -> None:
    fit = fit_rising(np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 4.0]))
    assert fit.y[0] == fit.y[1] == 1.2
    assert fit.worst == 2.0 / 1.2 - 1
