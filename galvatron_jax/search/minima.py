"""The least that one stage can take for given layers, exactly: the layer search on the stage's own chain.

The relaxation of a stage's memory, as in `bounds`, is loose where a stage has few layers: one layer's change of option
is much of the stage. What the layer search finds is the optimum. Stages whose layers look alike are solved once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.search.chain import Chain, Options
from galvatron_jax.search.layers import close, relax
from galvatron_jax.search.pipeline import Pipeline, StageOptions

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Least:
    """What a stage takes at least."""

    seconds: float
    """Weighted: no choice of options takes less; infinite where none fits, or none is below the seconds asked for."""
    options: tuple[int, ...] | None
    """A choice that takes just this, where one was found."""


@dataclass(frozen=True)
class Weight:
    """What a second of a stage is worth: forward, backward (what it recomputes included), and once a step."""

    forward: float
    backward: float
    once: float

    def inside(self, problem: Pipeline, stage: int) -> tuple[float, float]:
        """Of the layers' own seconds forward and backward: where stages recompute, backward begins with forward."""
        if not problem.recomputes:
            return self.forward, self.backward
        alone = self.forward if stage < problem.num_stages - 1 else 0.0
        return self.backward + alone, self.backward


def stage_chain(problem: Pipeline, stage: int, start: int, stop: int, weight: Weight) -> Chain:
    """The layers of a stage as a chain whose seconds are weighted; what it sends is left out."""
    own, kept, count = weight.inside(problem, stage), problem.residuals_kept(stage), len(problem.layers)
    made: dict[tuple[int, bool, bool], Options] = {}
    layers = []
    for index in range(start, stop):
        options = problem.options(index, start)
        key = (id(options), index == start > 0, index == stop - 1 < count - 1)
        if key not in made:
            made[key] = _weighted(options, own, weight, kept, enters=key[1], leaves=key[2])
        layers.append(made[key])
    return Chain(tuple(layers), tuple(moves @ np.array(own) for moves in problem.moves[start : stop - 1]))


def _weighted(
    options: StageOptions, own: tuple[float, float], weight: Weight, kept: int, *, enters: bool, leaves: bool
) -> Options:
    seconds = own[0] * options.forward_s + own[1] * options.backward_s + weight.once * options.once_s
    if enters:
        seconds = seconds + (options.enter_s @ np.array(own))[options.boundary]
    if leaves:
        # A stage that recomputes does not leave again.
        seconds = seconds + (options.leave_s @ np.array([weight.forward, weight.backward]))[options.boundary]
    return Options(
        options.strategies,
        seconds,
        options.static_bytes + kept * options.residual_bytes,
        options.workspace_bytes,
        options.boundary,
        options.num_classes,
        np.ones((1, len(options)), bool),
    )


def sending(problem: Pipeline, start: int, stop: int, weight: Weight) -> float:
    """Weighted seconds of a stage that no option changes: what it sends, and adds up with other stages."""
    seconds = weight.backward * problem.cuts[start].backward_s + weight.once * problem.exchange_s(start, stop)
    if stop < len(problem.layers):
        seconds += weight.forward * problem.cuts[stop].forward_s
    return seconds


@dataclass
class Known:
    """What was found, for all problems of a search."""

    least: dict[tuple, tuple[float, Least, tuple]] = field(default_factory=dict)
    """With the seconds that they had to be below, and the layers and moves that keys name."""
    weights: dict[tuple, tuple[Weight, ...]] = field(default_factory=dict)
    """Of the stages: those that bounded some cut well, per schedule, degree and number of micro-batches."""


@dataclass
class StageMinima:
    """Exact minima of one problem with one virtual stage per group."""

    problem: Pipeline
    budget_bytes: float
    """Per device, without `Pipeline.fixed_bytes`."""
    deadline: float | None = None
    known: Known = field(default_factory=Known, repr=False)
    """Problems made of the same layers may share it."""

    def limit(self, stage: int, start: int, stop: int) -> int:
        """Bytes for the options of a stage."""
        return int(self.budget_bytes) - self.problem.kept_bytes(stage, start, stop)

    def least(self, stage: int, start: int, stop: int, weight: Weight, *, below: float = math.inf) -> Least:
        """The least weighted seconds of a stage, if they are below some.

        Args:
            stage: its number.
            start: its first layer.
            stop: the layer after its last.
            weight: of its seconds.
            below: more is infinite.
        """
        problem, limit = self.problem, self.limit(stage, start, stop)
        parts = (*(problem.options(layer, start) for layer in range(start, stop)), *problem.moves[start : stop - 1])
        ends = (start > 0, stop < len(problem.layers), problem.recomputes and stage == problem.num_stages - 1)
        fixed = sending(problem, start, stop, weight)
        key = (problem.residuals_kept(stage), limit, weight, problem.recomputes, ends, fixed, tuple(map(id, parts)))
        asked, found, _ = self.known.least.get(key, (-math.inf, Least(math.inf, None), ()))
        if math.isinf(found.seconds) and asked < below:
            found = self._solve(stage_chain(problem, stage, start, stop, weight), limit, below - fixed)
            found = Least((found.seconds + fixed) * (1 - _ROUNDING), found.options)
            self.known.least[key] = below, found, parts
        return found

    def _solve(self, chain: Chain, limit: int, below: float) -> Least:
        relaxed = relax(chain, budget_bytes=limit, upper_s=below)
        known = below if relaxed.solution is None else relaxed.solution.seconds
        closed = close(relaxed, upper_s=known, deadline=self.deadline)
        best = closed.solution or relaxed.solution
        seconds = math.inf if best is None else best.seconds
        if not closed.proven:
            seconds = min(seconds, relaxed.least_s)
        return Least(seconds, None if best is None else best.options)
