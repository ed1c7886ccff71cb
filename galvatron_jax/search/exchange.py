"""Local search on a pipeline's solution: one or two layers of a stage change their options, as long as that helps."""

from __future__ import annotations

import itertools
import time

import numpy as np

from galvatron_jax.search.fronts import pareto
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, StageOptions, evaluate

_CHECKED = 12
"""Most promising changes that are priced in full."""
_ROUNDS = 30
_BETTER = 1e-9


def exchange(
    problem: Pipeline, found: PipelineSolution, *, budget_bytes: float, deadline: float | None = None
) -> PipelineSolution:
    """A solution with the same cuts from which no change of one or two layers of a stage leads further.

    Args:
        problem: with one virtual stage per group.
        found: the solution.
        budget_bytes: per device, without `Pipeline.fixed_bytes`.
        deadline: of `time.monotonic()`.
    """
    stage, idle = 0, 0
    for _ in range(_ROUNDS * problem.num_stages):
        if idle == problem.num_stages or (deadline is not None and time.monotonic() > deadline):
            break
        better = _change(problem, found, stage, budget_bytes)
        if better is None:
            stage, idle = (stage + 1) % problem.num_stages, idle + 1
        else:
            found, idle = better, 0
    return found


def _change(problem: Pipeline, found: PipelineSolution, stage: int, budget_bytes: float) -> PipelineSolution | None:
    """The best change in one stage that makes the step faster."""
    layers, options, delta = _singles(problem, found, stage)
    if not len(layers):
        return None
    first, second = np.triu_indices(len(layers))
    apart = (layers[first] != layers[second]) | (first == second)
    first, second = first[apart], second[apart]
    total = delta[first] + np.where((first == second)[:, None], 0.0, delta[second])
    here = found.stages[stage]
    fits = here.resident_bytes + here.passing_bytes + total[:, 3] <= budget_bytes
    useful = fits & (total[:, :3] < 0).any(1)
    first, second, total = first[useful], second[useful], total[useful]
    if not len(first):
        return None
    seconds = _step_seconds(problem, found, stage, total)
    best = np.argpartition(seconds, _CHECKED)[:_CHECKED] if len(seconds) > _CHECKED else np.arange(len(seconds))
    for change in best[np.argsort(seconds[best], kind="stable")]:
        if seconds[change] >= found.seconds * (1 - _BETTER):
            return None
        chosen = list(found.options)
        for single in (first[change], second[change]):
            chosen[layers[single]] = int(options[single])
        better = evaluate(problem, found.starts, tuple(chosen))
        if better.seconds < found.seconds * (1 - _BETTER) and max(better.bytes) <= budget_bytes:
            return better
    return None


def _step_seconds(problem: Pipeline, found: PipelineSolution, stage: int, total: np.ndarray) -> np.ndarray:
    """Seconds of a step when one stage's seconds change. `total` is float64[changes, 4]."""
    kinds, here = problem.kinds, found.stages[stage]
    apart = np.arange(problem.num_stages) != stage
    forward, backward, once = (
        np.array([getattr(s, name) for s in found.stages]) for name in ("forward_s", "backward_s", "once_s")
    )
    rest = (kinds.forward * forward + kinds.backward * backward)[:, apart].max(1)
    forward_s, backward_s = here.forward_s + total[:, 0], here.backward_s + total[:, 1]
    seconds = np.maximum(here.once_s + total[:, 2], once[apart].max())
    for does_forward, does_backward in itertools.product((False, True), repeat=2):
        ticks = (kinds.forward[:, stage] == does_forward) & (kinds.backward[:, stage] == does_backward)
        own = does_forward * forward_s + does_backward * backward_s
        seconds += _at_least(rest[ticks], kinds.count[ticks], own)
    return seconds


def _at_least(rest: np.ndarray, count: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Sum of ticks that take what the other stages take, but no less than some stage's own seconds.

    Args:
        rest: seconds of the other stages. float64[kinds]
        count: ticks of each kind. int64[kinds]
        own: seconds of the stage, several to try. float64[changes]
    """
    order = np.argsort(rest)
    ticks = np.concatenate([[0], np.cumsum(count[order])])
    longer = np.concatenate([np.cumsum((rest * count)[order][::-1])[::-1], [0.0]])
    place = np.searchsorted(rest[order], own)
    return np.asarray(ticks[place] * own + longer[place])


def _singles(problem: Pipeline, found: PipelineSolution, stage: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Changes of one layer: which, its new option, and what the stage's seconds and bytes become more.

    Of like layers with like options and neighbours the first two stand for all.

    Returns:
        int64[changes], int64[changes], and float64[changes, 4]: forward, backward, once a step, bytes.
    """
    start = found.starts[stage]
    stop = (*found.starts[1:], len(problem.layers))[stage]
    seen: dict[tuple, int] = {}
    layers, options, deltas = [], [], []
    for layer in range(start, stop):
        own = problem.options(layer, start)
        key = (id(own), found.options[layer], *_neighbours(problem, found, layer, start, stop))
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 2:
            continue
        delta = _deltas(problem, found, stage, layer, start, stop, own)
        others = pareto(delta)
        others = others[others != found.options[layer]]
        layers.append(np.full(len(others), layer))
        options.append(others)
        deltas.append(delta[others])
    return np.concatenate(layers), np.concatenate(options), np.concatenate(deltas)


def _neighbours(problem: Pipeline, found: PipelineSolution, layer: int, start: int, stop: int) -> tuple[int, int]:
    """Boundary classes of the layers before and after; -1 at the stage's edges."""
    before = problem.options(layer - 1, start).boundary[found.options[layer - 1]] if layer > start else -1
    after = problem.options(layer + 1, start).boundary[found.options[layer + 1]] if layer + 1 < stop else -1
    return int(before), int(after)


def _deltas(
    problem: Pipeline, found: PipelineSolution, stage: int, layer: int, start: int, stop: int, own: StageOptions
) -> np.ndarray:
    """What every option of a layer adds to its stage, next to its present one. float64[options, 4]."""
    times = np.stack([own.forward_s, own.backward_s], axis=1)
    before, after = _neighbours(problem, found, layer, start, stop)
    last = stop == len(problem.layers)
    if before >= 0:
        times = times + problem.moves[layer - 1][before, own.boundary]
    elif start:
        times = times + own.enter_s[own.boundary]
    if after >= 0:
        times = times + problem.moves[layer][own.boundary, after]
    elif not last:
        times = times + own.leave_s[own.boundary]
    forward, backward = times[:, 0], times[:, 1]
    if problem.recomputes:
        backward = backward + forward
        forward = np.zeros_like(forward) if last else forward
    needed = own.static_bytes + problem.residuals_kept(stage) * own.residual_bytes + 0.0
    columns = np.stack([forward, backward, own.once_s, needed], axis=1)
    return columns - columns[found.options[layer]]
