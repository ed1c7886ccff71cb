"""Good stages in no time: the Lagrangian relaxation of the whole model at many prices of a byte, cut where it pleases.

For every price, one cheapest path runs through all layers. A stage takes a piece of one path, or begins on the path of
one price and ends on that of the next, wherever that just fits. What comes out is within a layer's change of option of
the optimum; `polish` then seeks better options for the stages of one cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from galvatron_jax.search.bounds import Bounds
from galvatron_jax.search.chain import Chain, Options
from galvatron_jax.search.fronts import StageFront
from galvatron_jax.search.pipeline import Pipeline, PipelineSolution, StageOptions, evaluate, sum_stage
from galvatron_jax.search.relaxation import Cases, shortest_paths

_UNEVEN = 2
"""Layers by which a chunk may differ from the average."""
_WORKSPACES = 3
"""Limits on the workspace that paths are sought under."""


@dataclass(frozen=True, eq=False)
class _Paths:
    """Options along the cheapest paths, and what they add up to. [paths, layers]; times [paths, layers, 2]."""

    options: np.ndarray
    seconds: np.ndarray
    """Forward and backward, the move from the layer before included."""
    once: np.ndarray
    resident: np.ndarray
    workspace: np.ndarray


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs of paths to begin and to end on: neighbours by price, and each with itself."""

    ahead: np.ndarray
    """int64[pairs]"""
    after: np.ndarray
    resident: np.ndarray
    """Sums over the first layers. float64[paths, layers + 1]"""
    seconds: np.ndarray

    @classmethod
    def of(cls, resident: np.ndarray, seconds: np.ndarray) -> _Pairs:
        """The pairs of paths with these bytes and seconds per layer."""
        paths = np.arange(len(resident))
        ahead = np.concatenate([paths[:-1], paths[1:], paths])
        after = np.concatenate([paths[1:], paths[:-1], paths])
        nothing = np.zeros((len(paths), 1))
        resident, seconds = (np.concatenate([nothing, part.cumsum(1)], axis=1) for part in (resident, seconds))
        return cls(ahead, after, resident, seconds)

    def between(self, sums: np.ndarray, start: int, stop: int) -> np.ndarray:
        """What layers `start` to `stop - 1` take, by the layer that changes to the second path. [pairs, layers]."""
        change = sums[:, start:stop]
        ends = sums[self.after, stop] - sums[self.ahead, start]
        return (change[self.ahead] - change[self.after]) + ends[:, None]


@dataclass
class SketchBuilder:
    """Stages of one problem, each with its one good choice."""

    problem: Pipeline
    bounds: Bounds
    budget_bytes: float
    grown: int = 0
    complete: bool = False
    _paths: dict[int, _Paths] = field(default_factory=dict, repr=False)
    _joined: dict[int, _Pairs] = field(default_factory=dict, repr=False)
    _fronts: dict[tuple[int, int, int], StageFront] = field(default_factory=dict, repr=False)

    def front(self, stage: int, start: int, stop: int) -> StageFront:
        """A good choice for a virtual stage, if one was found that fits."""
        key = (stage, start, stop)
        if key not in self._fronts:
            self._fronts[key] = self._sketch(stage, start, stop)
            self.grown += 1
        return self._fronts[key]

    def likely(self, length: int) -> bool:
        """Whether a stage of so many layers is worth a look: chunks of one group are of much the same length."""
        problem = self.problem
        return problem.num_chunks == 1 or abs(length - len(problem.layers) / problem.num_stages) <= _UNEVEN

    def neighbours(self, found: PipelineSolution) -> Iterator[PipelineSolution]:
        """A solution with one cut moved by a layer, the stages beside it sketched anew; where that fits."""
        count = len(self.problem.layers)
        for cut in range(1, len(found.starts)):
            for step in (-1, 1):
                starts = list(found.starts)
                starts[cut] += step
                ends = (*starts, count)
                if not ends[cut - 1] < ends[cut] < ends[cut + 1]:
                    continue
                fronts = [self.front(stage, ends[stage], ends[stage + 1]) for stage in (cut - 1, cut)]
                if not all(len(front) for front in fronts):
                    continue
                between = fronts[0].options[0] + fronts[1].options[0]
                options = found.options[: ends[cut - 1]] + between + found.options[ends[cut + 1] :]
                moved = evaluate(self.problem, tuple(starts), options)
                if max(moved.bytes) <= self.budget_bytes:
                    yield moved

    @property
    def _weight(self) -> np.ndarray:
        """Seconds of a step per second forward and backward of its slowest stage."""
        return self.problem.num_microbatches * np.array([2.0 if self.problem.recomputes else 1.0, 1.0])

    def paths(self, stage: int) -> _Paths:
        """Cheapest paths at the bytes that count in a stage."""
        kept = self.problem.residuals_kept(stage)
        if kept not in self._paths:
            self._paths[kept] = self._seek(stage, kept)
        return self._paths[kept]

    def _seek(self, stage: int, kept: int) -> _Paths:
        problem = self.problem
        chain = chain_of(problem, kept, np.array([*self._weight, 1.0]), 0, len(problem.layers))
        sizes = np.unique(np.concatenate([layer.workspace_bytes for layer in chain.layers]))
        floor = max(int(layer.workspace_bytes.min()) for layer in chain.layers)
        sizes = sizes[sizes >= floor]
        sizes = sizes[np.unique(np.linspace(0, len(sizes) - 1, _WORKSPACES).astype(int))]
        price = self.bounds.priced[stage].price * problem.num_microbatches
        cases = Cases(np.zeros(len(sizes) * len(price), np.int64), np.repeat(sizes, len(price)))
        options = shortest_paths(chain, cases, multiplier=np.tile(price, len(sizes))).options
        options = options[np.sort(np.unique(options, axis=0, return_index=True)[1])]
        return self._sum(options, kept)

    def _pairs(self, stage: int) -> _Pairs:
        kept = self.problem.residuals_kept(stage)
        if kept not in self._joined:
            paths = self.paths(stage)
            self._joined[kept] = _Pairs.of(paths.resident, paths.seconds @ self._weight + paths.once)
        return self._joined[kept]

    def _sum(self, options: np.ndarray, kept: int) -> _Paths:
        problem = self.problem
        layers = problem.layers
        rows = range(len(layers))
        seconds = np.stack([_times(layers[i])[options[:, i]] for i in rows], axis=1)
        boundary = np.stack([layers[i].boundary[options[:, i]] for i in rows], axis=1)
        for i in rows[1:]:
            seconds[:, i] += problem.moves[i - 1][boundary[:, i - 1], boundary[:, i]]
        return _Paths(
            options,
            seconds,
            np.stack([layers[i].once_s[options[:, i]] for i in rows], axis=1),
            np.stack([_resident(layers[i], kept)[options[:, i]] for i in rows], axis=1).astype(float),
            np.stack([layers[i].workspace_bytes[options[:, i]] for i in rows], axis=1).astype(float),
        )

    def _nothing(self) -> StageFront:
        nothing = np.zeros(0)
        return StageFront(nothing, nothing, nothing, nothing, nothing, (), complete=False)

    def _sketch(self, stage: int, start: int, stop: int) -> StageFront:
        problem, paths = self.problem, self.paths(stage)
        # Chunks of one group share its bytes evenly here.
        limit = self.budget_bytes / problem.num_chunks - problem.kept_bytes(stage, start, stop)
        # Begin on one path, end on another: every place to change. A change at the start is none.
        here, pairs = slice(start, stop), self._pairs(stage)
        workspace = _joined_max(paths.workspace[:, here], pairs.ahead, pairs.after)
        needed = pairs.between(pairs.resident, start, stop) + workspace
        cost = np.where(needed <= limit, pairs.between(pairs.seconds, start, stop), np.inf)
        pair, cut = np.unravel_index(int(cost.argmin()), cost.shape)
        if not np.isfinite(cost[pair, cut]):
            return self._nothing()
        first, second = pairs.ahead[pair], pairs.after[pair]
        chosen = np.concatenate([paths.options[first, start : start + cut], paths.options[second, start + cut : stop]])
        return self._front(stage, start, stop, self._translated(chosen, start, stop))

    def _translated(self, chosen: np.ndarray, start: int, stop: int) -> tuple[int, ...]:
        """The same strategies where a layer of the stage shares its parameters with an earlier one."""
        found = []
        for layer, option in zip(range(start, stop), chosen, strict=True):
            whole, here = self.problem.layers[layer], self.problem.options(layer, start)
            if here is whole:
                found.append(int(option))
            else:
                strategy = whole.strategies[option]
                found.append(here.strategies.index(strategy) if strategy in here.strategies else 0)
        return tuple(found)

    def _front(self, stage: int, start: int, stop: int, options: tuple[int, ...]) -> StageFront:
        total = sum_stage(self.problem, stage, start, stop, options)
        if total.resident_bytes + total.passing_bytes > self.budget_bytes:
            return self._nothing()
        return StageFront(
            np.array([total.forward_s]),
            np.array([total.backward_s]),
            np.array([total.once_s]),
            np.array([float(total.resident_bytes)]),
            np.array([float(total.passing_bytes)]),
            (options,),
            complete=False,
        )


def chain_of(problem: Pipeline, kept: int, weight: np.ndarray, start: int, stop: int) -> Chain:
    """Some layers as the chain of one stage.

    Args:
        problem: the problem; no layer of the stage may share a parameter with an earlier one of it.
        kept: micro-batches whose residuals the stage holds.
        weight: seconds of the chain per second forward, backward and once a step. float64[3]
        start: first layer.
        stop: layer after the last.
    """
    made: dict[tuple[int, bool, bool], Options] = {}
    layers = []
    for index in range(start, stop):
        options = problem.layers[index]
        key = (id(options), index == start > 0, index == stop - 1 < len(problem.layers) - 1)
        if key not in made:
            made[key] = _chain_options(options, kept, weight, enters=key[1], leaves=key[2])
        layers.append(made[key])
    return Chain(tuple(layers), tuple(moves @ weight[:2] for moves in problem.moves[start : stop - 1]))


def _chain_options(options: StageOptions, kept: int, weight: np.ndarray, *, enters: bool, leaves: bool) -> Options:
    times = _times(options)
    if enters:
        times = times + options.enter_s[options.boundary]
    if leaves:
        times = times + options.leave_s[options.boundary]
    return Options(
        options.strategies,
        times @ weight[:2] + weight[2] * options.once_s,
        _resident(options, kept),
        options.workspace_bytes,
        options.boundary,
        options.num_classes,
        np.ones((1, len(options)), bool),
    )


def _times(options: StageOptions) -> np.ndarray:
    return np.stack([options.forward_s, options.backward_s], axis=1)


def _resident(options: StageOptions, kept: int) -> np.ndarray:
    return options.static_bytes + kept * options.residual_bytes


def _joined_max(values: np.ndarray, ahead: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The largest value of what begins on one path and ends on another, for every place to change. [pairs, layers]."""
    head = np.concatenate([np.zeros((len(values), 1)), np.maximum.accumulate(values, axis=1)], axis=1)
    tail = np.maximum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
    return np.maximum(head[ahead, :-1], tail[after])
