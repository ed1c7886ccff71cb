"""Piecewise linear curves through measurements."""

from __future__ import annotations

import numpy as np


def interpolate(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """Value at `at` of the curve through the points (`x` ascending).

    Below the first point the first value holds; beyond the last one the last segment's slope goes on, but never
    downwards, so the result is never negative. A single point is proportional beyond it.

    Example:
        >>> interpolate(np.array([1.0, 2.0]), np.array([10.0, 30.0]), 3.0)
        50.0
    """
    if at <= x[-1]:
        return float(np.interp(at, x, y))
    if len(x) == 1:
        return float(y[0] * at / x[0]) if x[0] > 0 else float(y[0])
    slope = max(0.0, float((y[-1] - y[-2]) / (x[-1] - x[-2])))
    return float(y[-1] + slope * (at - x[-1]))
