"""The search's problems as mixed-integer linear programs, solved by HiGHS: the independent truth for middle sizes.

A plan is a path of one unit of flow. It enters a stage in a boundary class, goes through one option of the layer there
(an arc, the integer decision) and moves on to a class of the next layer, or leaves the stage for the next one. So
options meet in classes only, and what they sum to is linear: seconds of a stage, its bytes, and one variable for its
largest workspace. Every kind of tick has a variable that no group's work exceeds. Nothing needs a big constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
import scipy

from galvatron_jax.search.chain import Chain, Options, Solution
from galvatron_jax.search.chain import evaluate as evaluate_chain
from galvatron_jax.search.pipeline import Cut, Pipeline, PipelineSolution, StageOptions, evaluate
from galvatron_jax.spec.plan import Schedule

_BUDGET_UNITS = 1e4
"""The budget in units of the program: HiGHS lets a row exceed its limit by 1e-6, which shall be next to nothing."""
_INFEASIBLE = 2
"""Status of `scipy.optimize.milp`."""
_ATTEMPTS = 4

Found = TypeVar("Found")


@dataclass(frozen=True)
class Bracket(Generic[Found]):
    """What is known of an optimum."""

    solution: Found | None
    """The best found that fits."""
    bound_s: float
    """Nothing is faster; infinite where nothing fits."""


def solve_milp(
    problem: Pipeline, *, budget_bytes: int, time_limit_s: float, gap: float = 1e-4
) -> PipelineSolution | None:
    """The fastest cuts and options that fit a budget.

    Args:
        problem: the problem.
        budget_bytes: per device, for everything.
        time_limit_s: after which the best found so far is given.
        gap: relative difference to the optimum that is good enough.

    Returns:
        None where none exists, or none was found in time.
    """
    return bracket(problem, budget_bytes=budget_bytes, time_limit_s=time_limit_s, gap=gap).solution


def solve_milp_chain(chain: Chain, *, budget_bytes: int, time_limit_s: float, gap: float = 1e-4) -> Solution | None:
    """The fastest choice that fits a budget; arguments and result as `solve_milp`.

    Args:
        chain: the problem.
        budget_bytes: for resident bytes and the largest workspace together.
        time_limit_s: for each variant of tied parameters.
        gap: relative difference to the optimum that is good enough.
    """
    return bracket_chain(chain, budget_bytes=budget_bytes, time_limit_s=time_limit_s, gap=gap).solution


def bracket(
    problem: Pipeline, *, budget_bytes: int, time_limit_s: float, gap: float = 1e-4
) -> Bracket[PipelineSolution]:
    """The best cuts and options found, and how fast any can be; arguments as `solve_milp`."""
    budget = budget_bytes - problem.fixed_bytes
    if budget < 0 or problem.num_stages > len(problem.layers):
        return Bracket(None, np.inf)
    limit, bound = float(budget), -np.inf
    for _ in range(_ATTEMPTS):
        program = _Formulation(problem, limit)
        choice, bound = program.solve(time_limit_s=time_limit_s, gap=gap)
        if choice is None:
            return Bracket(None, bound)
        found = evaluate(problem, *choice)
        excess = max(found.bytes) - budget
        if excess <= 0:
            return Bracket(found, bound)
        limit -= excess  # HiGHS's tolerance let some bytes too many pass.
    return Bracket(None, bound)


def bracket_chain(chain: Chain, *, budget_bytes: int, time_limit_s: float, gap: float = 1e-4) -> Bracket[Solution]:
    """The best choice found, and how fast any can be; arguments as `solve_milp_chain`."""
    best, bound = None, np.inf
    for variant in range(chain.num_variants):
        problem, kept = _as_pipeline(chain, variant)
        found = bracket(problem, budget_bytes=budget_bytes, time_limit_s=time_limit_s, gap=gap)
        bound = min(bound, found.bound_s)
        if found.solution is None:
            continue
        options = tuple(int(index[option]) for index, option in zip(kept, found.solution.options, strict=True))
        solution = evaluate_chain(chain, options)
        if best is None or solution.seconds < best.seconds:
            best = solution
    return Bracket(best, bound)


def _as_pipeline(chain: Chain, variant: int) -> tuple[Pipeline, list[np.ndarray]]:
    """A chain as a pipeline of one stage, and which options of each layer are left in it."""
    kept = [np.flatnonzero(layer.admitted[variant]) for layer in chain.layers]
    count = len(chain.layers)
    problem = Pipeline(
        schedule=Schedule.NONE,
        degree=1,
        num_chunks=1,
        num_microbatches=1,
        layers=tuple(_stage_options(layer, index) for layer, index in zip(chain.layers, kept, strict=True)),
        repeats=(None,) * count,
        moves=tuple(np.stack([moves, np.zeros_like(moves)], axis=-1) for moves in chain.moves),
        cuts=(Cut(),) * count,
    )
    return problem, kept


def _stage_options(options: Options, index: np.ndarray) -> StageOptions:
    zeros = np.zeros(len(index))
    return StageOptions(
        strategies=tuple(options.strategies[option] for option in index),
        forward_s=options.seconds[index],
        backward_s=zeros,
        once_s=zeros,
        static_bytes=options.resident_bytes[index],
        residual_bytes=np.zeros(len(index), np.int64),
        workspace_bytes=options.workspace_bytes[index],
        boundary=options.boundary[index],
        num_classes=options.num_classes,
        enter_s=np.zeros((options.num_classes, 2)),
        leave_s=np.zeros((options.num_classes, 2)),
    )


# ---------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True, eq=False)
class _Sum:
    """A linear expression."""

    variables: np.ndarray
    weights: np.ndarray

    def times(self, factor: float) -> _Sum:
        return replace(self, weights=self.weights * factor)


def _sum(variables: np.ndarray | int, weights: np.ndarray | float = 1.0) -> _Sum:
    variables = np.atleast_1d(variables)
    return _Sum(variables.ravel(), np.broadcast_to(np.asarray(weights, float), variables.shape).ravel())


def _joined(parts: Iterable[_Sum]) -> _Sum:
    parts = [_Sum(np.zeros(0, np.int64), np.zeros(0)), *parts]
    return _Sum(np.concatenate([p.variables for p in parts]), np.concatenate([p.weights for p in parts]))


@dataclass
class _Program:
    """Variables and rows, as they are added."""

    upper: list[np.ndarray] = field(default_factory=list)
    whole: list[np.ndarray] = field(default_factory=list)
    cost: list[np.ndarray] = field(default_factory=list)
    rows: list[tuple[_Sum, float, float]] = field(default_factory=list)
    count: int = 0

    def add(self, *shape: int, whole: bool = False, upper: float = np.inf, cost: float = 0.0) -> np.ndarray:
        """Variables from zero. Indices of the shape given; one index without a shape."""
        size = int(np.prod(shape))
        self.upper.append(np.full(size, upper))
        self.whole.append(np.full(size, int(whole)))
        self.cost.append(np.full(size, cost))
        self.count += size
        return np.arange(self.count - size, self.count).reshape(shape)

    def equal(self, left: _Sum, right: _Sum) -> None:
        self.rows.append((_joined([left, right.times(-1.0)]), 0.0, 0.0))

    def at_most(self, left: _Sum, right: _Sum | None = None, constant: float = 0.0) -> None:
        """Demands `left <= right + constant`."""
        self.rows.append((left if right is None else _joined([left, right.times(-1.0)]), -np.inf, constant))

    def solve(self, *, time_limit_s: float, gap: float) -> tuple[np.ndarray | None, float]:
        """Values of the variables, if any were found, and a lower bound of the cost."""
        sizes = [len(row.variables) for row, _, _ in self.rows]
        entries = _joined(row for row, _, _ in self.rows)
        index = np.repeat(np.arange(len(sizes)), sizes)
        matrix = scipy.sparse.csr_array((entries.weights, (index, entries.variables)), shape=(len(sizes), self.count))
        found = scipy.optimize.milp(
            np.concatenate(self.cost),
            integrality=np.concatenate(self.whole),
            bounds=scipy.optimize.Bounds(0.0, np.concatenate(self.upper)),
            constraints=scipy.optimize.LinearConstraint(
                matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows]
            ),
            options={"time_limit": time_limit_s, "mip_rel_gap": gap},
        )
        if found.status == _INFEASIBLE:
            return None, np.inf
        bound = getattr(found, "mip_dual_bound", None)
        return found.x, -np.inf if bound is None else float(bound)


# ---------------------------------------------------------------------------------------------- formulation


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's options: first those of its first use in a stage, then those where it shares parameters.

    The latter end in classes of their own, such that leaving can cost something else.
    """

    forward_s: np.ndarray
    backward_s: np.ndarray
    once_s: np.ndarray
    static_bytes: np.ndarray
    residual_bytes: np.ndarray
    workspace_bytes: np.ndarray
    node: np.ndarray
    """Where each option passes: its class, renumbered. int64[options]"""
    boundary: np.ndarray
    """Class of a node. int64[nodes]"""
    repeated: np.ndarray
    """Whether the options of a node are for shared parameters. bool[nodes]"""
    enter_s: np.ndarray
    """float64[nodes, 2]"""
    leave_s: np.ndarray
    """float64[nodes, 2]"""
    first: int
    """Options of its first use."""

    @classmethod
    def of(cls, first: StageOptions, repeat: StageOptions | None) -> _Layer:
        parts = [first] if repeat is None else [first, repeat]
        classes = np.concatenate([part.boundary + 10**6 * number for number, part in enumerate(parts)])
        named, node = np.unique(classes, return_inverse=True)
        part, boundary = np.divmod(named, 10**6)
        edges = [
            np.stack([getattr(parts[p], name)[b] for p, b in zip(part, boundary, strict=True)])
            for name in ("enter_s", "leave_s")
        ]
        names = ("forward_s", "backward_s", "once_s", "static_bytes", "residual_bytes", "workspace_bytes")
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(
            **columns,
            node=node,
            boundary=boundary,
            repeated=part > 0,
            enter_s=edges[0],
            leave_s=edges[1],
            first=len(first),
        )


class _Formulation:
    """The program of one pipeline and a limit of bytes, which leaves out what every device holds.

    Variables are kept by place: layer and virtual stage.
    """

    def __init__(self, problem: Pipeline, limit_bytes: float) -> None:
        self.problem = problem
        self.program = _Program()
        made = {(id(x), id(y)): _Layer.of(x, y) for x, y in zip(problem.layers, problem.repeats, strict=True)}
        self.layers = [made[id(x), id(y)] for x, y in zip(problem.layers, problem.repeats, strict=True)]
        self.second = max(sum(float(x.forward_s.mean() + x.backward_s.mean()) for x in self.layers), 1e-12)
        self.second /= problem.num_stages
        """Seconds in a unit of the program."""
        self.byte = max(limit_bytes, 1.0) / _BUDGET_UNITS
        """Bytes in a unit of the program."""
        self.limit = limit_bytes / self.byte
        self.options: dict[tuple[int, int], np.ndarray] = {}
        self.begins: dict[tuple[int, int], np.ndarray] = {}
        """Per node, whether the stage begins with it."""
        self.ends: dict[tuple[int, int], np.ndarray] = {}
        """Per node, whether the stage ends with it."""
        self.moves: dict[tuple[int, int], np.ndarray] = {}
        """Flow from the nodes of the layer before in the same stage. [nodes before, nodes here]"""
        self._add_paths()
        self._cut()
        self._link()
        self._share_parameters()
        self._count_seconds()
        self._count_bytes()

    def solve(self, *, time_limit_s: float, gap: float) -> tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, float]:
        """Starts of the stages and options of the layers, if any were found; and a lower bound of the seconds."""
        values, bound = self.program.solve(time_limit_s=time_limit_s, gap=gap)
        if values is None:
            return None, bound * self.second
        starts, options = [], []
        for (layer, stage), variables in sorted(self.options.items()):
            chosen = int(np.argmax(values[variables]))
            if values[variables[chosen]] > 0.5:
                first = self.layers[layer].first
                options.append(chosen if chosen < first else chosen - first)
                if stage == len(starts):
                    starts.append(layer)
        return (tuple(starts), tuple(options)), bound * self.second

    # ------------------------------------------------------------------------------------------ path

    def _add_paths(self) -> None:
        """Variables of every place that leaves the stages before and behind it a layer each."""
        program, stages, count = self.program, self.problem.num_stages, len(self.layers)
        for index, layer in enumerate(self.layers):
            nodes = len(layer.boundary)
            for stage in range(max(0, stages - count + index), min(stages - 1, index) + 1):
                place = index, stage
                self.options[place] = program.add(len(layer.node), whole=True, upper=1.0)
                if stage or not index:
                    self.begins[place] = program.add(nodes, upper=1.0)
                if stage < stages - 1 or index == count - 1:
                    self.ends[place] = program.add(nodes, upper=1.0)
                if (index - 1, stage) in self.options:
                    self.moves[place] = program.add(len(self.layers[index - 1].boundary), nodes, upper=1.0)

    def _cut(self) -> None:
        """Lets a stage begin, with a binary of its own, where the one before ends: at the first layer, to the last."""
        program = self.program
        one = _sum(program.add(1, whole=True, upper=1.0))
        program.rows.append((one, 1.0, 1.0))
        for (index, stage), begins in self.begins.items():
            cut = _sum(program.add(1, whole=True, upper=1.0)) if index else one
            program.equal(_sum(begins), cut)
            if index:
                program.equal(_sum(self.ends[index - 1, stage - 1]), cut)
            # A stage's first layer shares its parameters with none before it.
            program.at_most(_sum(begins[self.layers[index].repeated]))
        program.equal(_sum(self.ends[len(self.layers) - 1, self.problem.num_stages - 1]), one)

    def _link(self) -> None:
        """What comes into a node goes through one of its options, and on."""
        for (index, stage), options in self.options.items():
            layer, place, behind = self.layers[index], (index, stage), (index + 1, stage)
            for node in range(len(layer.boundary)):
                through = _sum(options[layer.node == node])
                inward = [_sum(self.moves[place][:, node])] if place in self.moves else []
                inward += [_sum(self.begins[place][node])] if place in self.begins else []
                outward = [_sum(self.moves[behind][node])] if behind in self.moves else []
                outward += [_sum(self.ends[place][node])] if place in self.ends else []
                self.program.equal(_joined(inward), through)
                self.program.equal(_joined(outward), through)

    def _share_parameters(self) -> None:
        """Lets the layers of a tie use the options for shared parameters exactly where another is in their stage."""
        for (index, stage), options in self.options.items():
            first = self.layers[index].first
            if first == len(options):
                continue
            earlier = [user for tie in self.problem.ties if index in tie.users for user in tie.users if user < index]
            near = self._holds(max(earlier), stage) if earlier else _joined([])
            self.program.at_most(_sum(options[first:]), near)
            self.program.at_most(_joined([_sum(options[:first]), near]), constant=1.0)

    def _holds(self, layer: int, stage: int) -> _Sum:
        """Whether a stage holds a layer."""
        place = layer, stage
        return _sum(self.options[place]) if place in self.options else _joined([])

    def _layers_of(self, stage: int) -> list[int]:
        """Layers that may lie in a stage."""
        return [index for index, where in self.options if where == stage]

    # ------------------------------------------------------------------------------------------ sums

    def _over(self, stage: int, name: str) -> list[_Sum]:
        """A column of the options in a stage."""
        return [_sum(self.options[index, stage], getattr(self.layers[index], name)) for index in self._layers_of(stage)]

    def _count_seconds(self) -> None:
        """Seconds of the step: ticks as long as their slowest group, and the slowest group's work once a step."""
        problem, program = self.problem, self.program
        kinds = problem.kinds
        work = [self._stage_seconds(stage) for stage in range(problem.num_stages)]
        lasts = [program.add(1, cost=float(count)) for count in kinds.count]
        for kind, longest in enumerate(lasts):
            for forward, backward in zip(kinds.forward_stage[kind], kinds.backward_stage[kind], strict=True):
                parts = [work[forward][0]] if forward < problem.num_stages else []
                parts += [work[backward][1]] if backward < problem.num_stages else []
                if parts:
                    program.at_most(_joined(parts), _sum(longest))
        once = _sum(program.add(1, cost=1.0))
        for group in range(problem.degree):
            stages = range(group, problem.num_stages, problem.degree)
            program.at_most(_joined(self._once(stage) for stage in stages), once)

    def _stage_seconds(self, stage: int) -> tuple[_Sum, _Sum]:
        """Seconds forward and backward of a stage, each a variable."""
        problem = self.problem
        own, last = [self._over(stage, "forward_s"), self._over(stage, "backward_s")], problem.num_stages - 1
        away: list[list[_Sum]] = [[], []]
        for index in self._layers_of(stage):
            layer, place = self.layers[index], (index, stage)
            for way in range(2):
                if place in self.moves:
                    before = self.layers[index - 1].boundary
                    seconds = problem.moves[index - 1][np.ix_(before, layer.boundary)][..., way]
                    own[way].append(_sum(self.moves[place], seconds))
                if place in self.begins and index:
                    own[way].append(_sum(self.begins[place], layer.enter_s[:, way]))
                if place in self.ends and stage < last:
                    away[way].append(_sum(self.ends[place], layer.leave_s[:, way]))
            # A first stage is known by its end, a last one by its begin, others pass on at one and back at the other.
            if place in self.ends and stage < last:
                there, back = problem.passing[:, 0 if stage == 0 else index, index + 1].tolist()
                away[0].append(_sum(self.ends[place], there))
                away[1].append(_sum(self.ends[place], back if stage == 0 else 0.0))
            if place in self.begins and stage:
                there, back = problem.passing[:, index, len(self.layers) if stage == last else index + 1].tolist()
                away[0].append(_sum(self.begins[place], there if stage == last else 0.0))
                away[1].append(_sum(self.begins[place], back))
        again = own[0] if problem.recomputes else []
        return self._variable([*own[0], *away[0]]), self._variable([*own[1], *away[1], *again])

    def _variable(self, seconds: list[_Sum]) -> _Sum:
        total = _sum(self.program.add(1))
        self.program.equal(_joined(seconds).times(1 / self.second), total)
        return total

    def _once(self, stage: int) -> _Sum:
        """Seconds once a step; a tie costs something where the stage holds one of its users, but not all."""
        parts = self._over(stage, "once_s")
        for tie in self.problem.ties:
            split = _sum(self.program.add(1, upper=1.0))
            for one in tie.users:
                for other in tie.users:
                    if one != other:
                        both = [self._holds(one, stage), self._holds(other, stage).times(-1.0)]
                        self.program.at_most(_joined(both), split)
            parts.append(split.times(tie.exchange_s))
        return _joined(parts).times(1 / self.second)

    def _count_bytes(self) -> None:
        """Bytes of each group: what its stages hold all the time, and the most that one passes through."""
        problem, program = self.problem, self.program
        for group in range(problem.degree):
            stages = range(group, problem.num_stages, problem.degree)
            most = _sum(program.add(1))
            for stage in stages:
                passing = self._over(stage, "residual_bytes") if problem.recomputes else []
                for workspace in self._over(stage, "workspace_bytes"):
                    program.at_most(_joined([*passing, workspace]).times(1 / self.byte), most)
            held = _joined(part for stage in stages for part in self._resident(stage))
            program.at_most(_joined([held.times(1 / self.byte), most]), constant=self.limit)

    def _resident(self, stage: int) -> list[_Sum]:
        problem = self.problem
        kept = problem.residuals_kept(stage)
        parts = self._over(stage, "static_bytes")
        if not problem.recomputes:
            parts += [part.times(kept) for part in self._over(stage, "residual_bytes")]
        inputs = problem.in_flight[stage]
        for (index, where), begins in self.begins.items():
            if where == stage and index:
                parts.append(_sum(begins, inputs * problem.cuts[index].bytes))
        parts += [self._holds(held.producer, stage).times(kept * held.bytes) for held in problem.held]
        return parts
