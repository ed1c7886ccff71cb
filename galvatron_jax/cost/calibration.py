"""Measured steps of real runs fed back into the numbers that predicted them.

A prediction is a sum of computation, communication and update. Runs whose sums weigh these unlike tell how far each is
off; runs of one sort, or a single one, tell only how far the sum is off, and then all three are scaled alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from galvatron_jax.errors import InputError
from galvatron_jax.spec.cluster import ClusterSpec, Link
from galvatron_jax.spec.plan import TimeBreakdown
from galvatron_jax.spec.profile import Profile, Timing
from galvatron_jax.spec.run import Run

_PRIOR = 0.02
"""Weight of the assumption that all parts are off alike, against a run that is off by as much. Small enough that two
unlike runs are met to a fraction of a per cent, large enough that like runs do not drive parts apart."""

_BOUNDS = 0.05, 20.0
"""Factors beyond these say that the profile is not of this machine, and are not believed."""


@dataclass(frozen=True)
class Factors:
    """Measured over predicted seconds, by part of a step."""

    compute: float
    communication: float
    """Of all collectives, gradient synchronisation included."""
    update: float
    error_before: float
    """Mean over the runs of the relative error of predicted seconds, sign left out."""
    error_after: float


def fit_factors(runs: Sequence[Run]) -> Factors:
    """How far the parts of the predictions are off, by least squares of the relative errors.

    Args:
        runs: with predictions from one and the same profile.

    Raises:
        InputError: when there is no run, or one without a prediction.
    """
    if not runs:
        raise InputError("There is no run to calibrate by; name the folder of at least one.")
    times = [run.prediction.time for run in runs if run.prediction is not None]
    if len(times) < len(runs):
        missing = ", ".join(sorted({run.model for run in runs if run.prediction is None}))
        raise InputError(f"Runs of {missing} hold no prediction: their plans were never priced.")
    measured = np.array([run.step_s for run in runs])
    parts = np.array([_parts(time) for time in times])
    relative = parts / measured[:, None]
    common = float(np.clip(np.median(1 / relative.sum(axis=1)), *_BOUNDS))
    rows = np.vstack([relative, _PRIOR * np.eye(3)])
    wanted = np.concatenate([np.ones(len(runs)), np.full(3, _PRIOR * common)])
    found = scipy.optimize.lsq_linear(rows, wanted, bounds=_BOUNDS).x
    return Factors(
        compute=float(found[0]),
        communication=float(found[1]),
        update=float(found[2]),
        error_before=float(np.mean(np.abs(relative.sum(axis=1) - 1))),
        error_after=float(np.mean(np.abs(relative @ found - 1))),
    )


def _parts(time: TimeBreakdown) -> tuple[float, float, float]:
    """Seconds of computation, communication and update; waiting in a pipeline is shared out among the first two."""
    busy = time.compute_s + time.communication_s
    share = time.compute_s / busy if busy else 1.0
    return (
        time.compute_s + share * time.bubble_s,
        time.communication_s + (1 - share) * time.bubble_s + time.synchronisation_s,
        time.update_s,
    )


def calibrated_profile(profile: Profile, factors: Factors) -> Profile:
    """The profile that would have predicted what was measured."""
    rate = profile.update_bytes_per_s
    return profile.model_copy(
        update={
            "layers": tuple(
                timing.model_copy(
                    update={
                        "forward": _scaled(timing.forward, factors.compute),
                        "backward": _scaled(timing.backward, factors.compute),
                    }
                )
                for timing in profile.layers
            ),
            "collectives": tuple(
                timing.model_copy(update={"timing": _scaled(timing.timing, factors.communication)})
                for timing in profile.collectives
            ),
            "update_bytes_per_s": None if rate is None else rate / factors.update,
        }
    )


def calibrated_cluster(cluster: ClusterSpec, factors: Factors) -> ClusterSpec:
    """The same for the cluster's figures, which serve where a profile holds no measurement."""
    device = cluster.device
    return cluster.model_copy(
        update={
            "device": device.model_copy(
                update={
                    "peak_flops_per_s": {
                        dtype: flops / factors.compute for dtype, flops in device.peak_flops_per_s.items()
                    },
                    "memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s / factors.compute,
                }
            ),
            "intra": _slower(cluster.intra, factors.communication),
            "inter": None if cluster.inter is None else _slower(cluster.inter, factors.communication),
            "source": f"{cluster.source}; scaled to measured steps",
        }
    )


def _scaled(timing: Timing, factor: float) -> Timing:
    return timing.model_copy(update={"median_s": timing.median_s * factor, "spread_s": timing.spread_s * factor})


def _slower(link: Link, factor: float) -> Link:
    return link.model_copy(
        update={
            "latency_s": link.latency_s * factor,
            "bandwidth_bytes_per_s": link.bandwidth_bytes_per_s / factor,
        }
    )
