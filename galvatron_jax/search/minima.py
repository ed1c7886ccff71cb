"""The least that one stage can take for given layers, exactly: the layer search on the stage's own chain.

The relaxation of a stage's memory, as in `bounds`, is loose where a stage has few layers: one layer's change of option
is much of the stage. What the layer search finds is the optimum. Stages whose layers look alike are solved once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.search.chain import Chain, Options
from galvatron_jax.search.layers import Relaxed, close, relax
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
    there, back = problem.passing[:, start, stop].tolist()
    return weight.forward * there + weight.backward * back + weight.once * problem.exchange_s(start, stop)


@dataclass(frozen=True, eq=False)
class _Answer:
    """What is known of a stage."""

    below: float
    """Seconds that it was asked to be below."""
    least: Least
    relaxed: Relaxed | None
    """What the exact answer begins with; None where this is it."""


@dataclass
class Known:
    """What was found, for all problems of a search."""

    answers: dict[tuple, _Answer] = field(default_factory=dict)
    parts: dict[tuple[int, ...], tuple[int, tuple]] = field(default_factory=dict)
    """Layers and moves that stages are made of, by their identities: a number for them, and themselves."""
    weights: dict[tuple, tuple[tuple[Weight, ...], ...]] = field(default_factory=dict)
    """Of the stages: those that bounded the latest cuts well, per schedule, degree and number of micro-batches."""

    def number(self, parts: tuple) -> int:
        """A number for some layers and moves, the same whenever they are the same."""
        key = tuple(map(id, parts))
        if key not in self.parts:
            self.parts[key] = len(self.parts), parts
        return self.parts[key][0]


@dataclass
class StageMinima:
    """Exact minima of one problem with one virtual stage per group."""

    problem: Pipeline
    budget_bytes: float
    """Per device, without `Pipeline.fixed_bytes`."""
    deadline: float | None = None
    known: Known = field(default_factory=Known, repr=False)
    """Problems made of the same layers may share it."""
    _keys: dict[tuple[int, int, int], tuple] = field(default_factory=dict, repr=False)

    def limit(self, stage: int, start: int, stop: int) -> int:
        """Bytes for the options of a stage."""
        return int(self.budget_bytes) - self.problem.kept_bytes(stage, start, stop)

    def least(
        self, stage: int, start: int, stop: int, weight: Weight, *, below: float = math.inf, exact: bool = True
    ) -> Least:
        """The least weighted seconds of a stage, if they are below some.

        Args:
            stage: its number.
            start: its first layer.
            stop: the layer after its last.
            weight: of its seconds.
            below: more is infinite.
            exact: whether a bound by relaxation, and a choice that may take more, will not do.
        """
        fixed = sending(self.problem, start, stop, weight)
        key = (self._key(stage, start, stop), weight, fixed)
        known = self.known.answers.get(key)
        if known is not None and exact and known.relaxed is not None:
            known = self._exact(known.relaxed, known.below, fixed)
        if known is None or (math.isinf(known.least.seconds) and known.below < below):
            chain = stage_chain(self.problem, stage, start, stop, weight)
            known = self._relaxed(chain, self.limit(stage, start, stop), below, fixed)
            if exact and known.relaxed is not None:
                known = self._exact(known.relaxed, below, fixed)
        self.known.answers[key] = known
        return known.least

    def _key(self, stage: int, start: int, stop: int) -> tuple:
        """What a stage's seconds and bytes follow from."""
        ends = (stage, start, stop)
        if ends not in self._keys:
            problem = self.problem
            parts = (*(problem.options(layer, start) for layer in range(start, stop)), *problem.moves[start : stop - 1])
            last = problem.recomputes and stage == problem.num_stages - 1
            self._keys[ends] = (
                problem.residuals_kept(stage), self.limit(*ends), problem.recomputes, start > 0,
                stop < len(problem.layers), last, self.known.number(parts),
            )  # fmt: skip
        return self._keys[ends]

    def _relaxed(self, chain: Chain, limit: int, below: float, fixed: float) -> _Answer:
        relaxed = relax(chain, budget_bytes=limit, upper_s=below - fixed)
        best = relaxed.solution
        seconds = min(relaxed.least_s, math.inf if best is None else best.seconds)
        least = Least((seconds + fixed) * (1 - _ROUNDING), None if best is None else best.options)
        return _Answer(below, least, relaxed if len(relaxed.bound_s) else None)

    def _exact(self, relaxed: Relaxed, below: float, fixed: float) -> _Answer:
        known = below - fixed if relaxed.solution is None else relaxed.solution.seconds
        closed = close(relaxed, upper_s=known, deadline=self.deadline)
        best = closed.solution or relaxed.solution
        seconds = math.inf if best is None else best.seconds
        if not closed.proven:
            seconds = min(seconds, relaxed.least_s)
        return _Answer(below, Least((seconds + fixed) * (1 - _ROUNDING), None if best is None else best.options), None)
