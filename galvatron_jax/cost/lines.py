"""Piecewise linear curves through measurements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def interpolate(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """Value at `at` of the curve through the points (`x` ascending).

    Below the first point the first value holds; beyond the last one the last slope upwards goes on, so the result is
    never negative. A single point, or a curve that never rises, is proportional beyond its end.

    Example:
        >>> interpolate(np.array([1.0, 2.0]), np.array([10.0, 30.0]), 3.0)
        50.0
    """
    if at <= x[-1]:
        return float(np.interp(at, x, y))
    slopes = np.diff(y) / np.diff(x)
    rising = slopes[slopes > 0]
    if len(rising):
        return float(y[-1] + rising[-1] * (at - x[-1]))
    return float(y[-1] * at / x[-1]) if x[-1] > 0 else float(y[-1])


@dataclass(frozen=True, eq=False)
class RisingFit:
    """Seconds over bytes: a latency, then pieces of constant bandwidth that can be infinite but never negative."""

    x: np.ndarray
    """Ascending. float64[points]"""
    y: np.ndarray
    """Never falling. float64[points]"""
    residuals: np.ndarray
    """Measured over fitted, less one. float64[points]"""

    def __call__(self, at: float) -> float:
        """Value of the curve."""
        return interpolate(self.x, self.y, at)

    @property
    def worst(self) -> float:
        """Largest residual either way."""
        return float(np.abs(self.residuals).max())


def fit_rising(x: np.ndarray, y: np.ndarray) -> RisingFit:
    """The curve that never falls, with a knot at every point, that is off by the least relative squares.

    More bytes never take less time; measurements may say so. Pool adjacent violators (Barlow et al., "Statistical
    inference under order restrictions", 1972) with weights `1 / y**2`: points in order stay as they are, those out of
    order are pooled.

    Args:
        x: where, ascending. float64[points]
        y: what was measured there, positive. float64[points]

    Example:
        >>> fit_rising(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 3.0])).y.tolist()
        [1.0, 3.0, 3.0]
    """
    weights = 1.0 / np.maximum(y, np.finfo(float).tiny) ** 2 if np.all(y > 0) else np.ones(len(y))
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(y.tolist(), weights.tolist(), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            before = pools.pop()
            total = before[1] + pool[1]
            pool = ((before[0] * before[1] + pool[0] * pool[1]) / total, total, before[2] + pool[2])
        pools.append(pool)
    fitted = np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])
    return RisingFit(x, fitted, np.divide(y, fitted, out=np.ones(len(y)), where=fitted > 0) - 1.0)
