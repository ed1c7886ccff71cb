"""Every layer's options on one mesh, priced once: what chains and pipelines are made of."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from galvatron_jax.cost.layer_costs import PhaseCosts, layer_costs, phase_costs
from galvatron_jax.cost.memory import SAME, Flat, stored_bytes
from galvatron_jax.cost.model import Batching, CostModel
from galvatron_jax.cost.step import signatures
from galvatron_jax.cost.wiring import LayerWiring
from galvatron_jax.partition.layer_plan import ParameterPlan
from galvatron_jax.partition.series import LayerSeries
from galvatron_jax.search.space import SearchSpace
from galvatron_jax.spec.strategy import LayerStrategy, Remat

FlatArray = tuple[str, str]
"""What lies in a flat array of a pipeline's stage, and its dtype. Slots of the optimizer that are alike are one."""
Allowed = Callable[[LayerStrategy], bool]
"""Which strategies a search is restricted to."""


@dataclass(frozen=True, eq=False)
class Slot:
    """What a layer's options depend on: layers alike share one slot, see `TableBuilder.slot`."""

    wiring: LayerWiring
    handed_on: tuple[int, ...]
    """Output ports that only the next layer reads."""


COLUMNS = ("forward_s", "backward_s", "once_s", "static_bytes", "residual_bytes", "workspace_bytes")


@dataclass(frozen=True, eq=False)
class Table:
    """A slot's options."""

    strategies: tuple[LayerStrategy, ...]
    forward_s: np.ndarray
    """Per micro-batch. float64[options]"""
    backward_s: np.ndarray
    """Per micro-batch. float64[options]"""
    once_s: np.ndarray
    """Per step. float64[options]"""
    static_bytes: np.ndarray
    """Parameters, optimizer state, gradients. int64[options]"""
    residual_bytes: np.ndarray
    """Per micro-batch in flight. int64[options]"""
    workspace_bytes: np.ndarray
    """int64[options]"""
    boundary: np.ndarray
    """Class of the layouts at the layer's boundary. int64[options]"""
    examples: tuple[LayerSeries, ...]
    """Plans of each class."""
    stored: np.ndarray
    """Way to keep the parameters. int64[options]"""
    ties: tuple[dict[str, tuple], ...]
    """Per way, the signature of each tied parameter."""
    tied_bytes: tuple[dict[str, int], ...]
    """Per way, bytes of each tied parameter's gradient as the optimizer sees it."""
    flat_bytes: np.ndarray | None = None
    """Per way, for pipelines: bytes in each of a stage's flat arrays. int64[ways, arrays]"""
    estimated: int = 0
    """Options whose computation time was not measured."""

    def __len__(self) -> int:
        return len(self.strategies)

    @cached_property
    def offered_ties(self) -> tuple[int, ...]:
        """Ways to keep the parameters that some option takes, in order of appearance."""
        return tuple(dict.fromkeys(self.stored.tolist()))

    def admitted(self, variant: dict[str, tuple]) -> np.ndarray:
        """Which options a joint layout of tied parameters allows. bool[options]."""
        key = tuple(variant.items())
        if key not in self._admitted:
            fits = [all(variant[name] == layout for name, layout in tie.items()) for tie in self.ties]
            self._admitted[key] = np.array(fits, bool)[self.stored]
        return self._admitted[key]

    @cached_property
    def _admitted(self) -> dict[tuple, np.ndarray]:
        return {}

    def take(self, index: np.ndarray) -> Table:
        """Some of the options; the classes stay as they are."""
        columns = {name: getattr(self, name)[index] for name in (*COLUMNS, "boundary", "stored")}
        return replace(self, strategies=tuple([self.strategies[i] for i in index.tolist()]), **columns)

    def allowing(self, allowed: Allowed) -> Table:
        """The options with some strategies; all when there are none."""
        index = np.flatnonzero([allowed(strategy) for strategy in self.strategies])
        return self.take(index) if len(index) else self

    def flat(self) -> np.ndarray:
        """Bytes of the options in a stage's flat arrays. int64[options, arrays]."""
        assert self.flat_bytes is not None, "not of a pipeline"
        return np.asarray(self.flat_bytes[self.stored])

    def undominated(self, columns: Sequence[np.ndarray]) -> Table:
        """Without the options that others make superfluous by some columns."""
        groups: dict[tuple, int] = {}
        group = np.array([groups.setdefault(tuple(sorted(tie.items())), len(groups)) for tie in self.ties])
        return self.take(np.flatnonzero(~dominated(columns, self.boundary, group[self.stored])))


def dominated(columns: Sequence[np.ndarray], boundary: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Options that another one with equal boundary and ties makes superfluous; of equals the first stays.

    Args:
        columns: what counts, all to be small. float64[options] each
        boundary: per option, its class. int64[options]
        group: per option, its class of ties. int64[options]
    """
    same = (boundary[:, None] == boundary) & (group[:, None] == group)
    no_worse = same & np.logical_and.reduce([column[:, None] <= column for column in columns])
    better = np.logical_or.reduce([column[:, None] < column for column in columns])
    earlier = np.arange(len(group))[:, None] < np.arange(len(group))
    return (no_worse & (better | earlier)).any(axis=0)


@dataclass
class TableBuilder:
    """Prices layers on one mesh. Prices are kept, so that what differs in the batch layout alone shares them."""

    costs: CostModel
    space: SearchSpace
    pruned: Counter[str] = field(default_factory=Counter)
    _priced: dict[tuple, Table] = field(default_factory=dict, repr=False)
    _kinds: dict[tuple[int, int], PhaseCosts] = field(default_factory=dict, repr=False)
    _strategies: dict[tuple, tuple[LayerStrategy, ...]] = field(default_factory=dict, repr=False)
    _moves: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)
    _repeating: set[tuple[int, int]] = field(default_factory=set, repr=False)
    """Kinds and micro-batches that may repeat their work."""
    _slots: dict[tuple[LayerWiring, tuple[int, ...]], Slot] = field(default_factory=dict, repr=False)
    _flat: dict[tuple[LayerWiring, int], tuple[tuple[ParameterPlan, ...], tuple[int, ...]]] = field(
        default_factory=dict, repr=False
    )
    """Bytes in `flat_arrays`, with the parameters that the key's identity stands for."""

    def with_equals(self, kind: int, allowed: Allowed) -> Allowed:
        """Some strategies of a layer kind, and those under which it does the same: of these only one is offered."""
        layer, planner = self.costs.model.kinds[kind], self.costs.table.planner
        same = {p: [q for q in Remat if q is p or len(planner.distinct_remats(layer, (p, q))) == 1] for p in Remat}
        return lambda strategy: any(
            allowed(strategy.model_copy(update={"remat": policy})) for policy in same[strategy.remat]
        )

    def priced(self, beside: TableBuilder | None = None) -> tuple[int, int]:
        """Options priced, and those of them whose computation time was not measured.

        Args:
            beside: what was priced there too does not count.
        """
        known = {} if beside is None else beside._priced
        tables = [table for key, table in self._priced.items() if key not in known]
        return sum([len(table) for table in tables]), sum([table.estimated for table in tables])

    def knows(self, kind: int, microbatch: int) -> bool:
        """Whether a layer kind was asked about at a micro-batch."""
        return (kind, microbatch) in self._strategies

    def offers(self, allowed: Allowed) -> bool:
        """Whether any layer can use any of some strategies."""
        return any(allowed(strategy) for found in self._strategies.values() for strategy in found)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """One per layer."""
        layers = self.costs.wiring.layers
        following = [tuple(hop.output for hop in layer.hops) for layer in layers[1:]]
        return tuple(self.slot(layer, ports) for layer, ports in zip(layers, [*following, ()], strict=True))

    def slot(self, wiring: LayerWiring, handed_on: tuple[int, ...]) -> Slot:
        """The one slot of layers with these connections."""
        key = wiring, handed_on
        if key not in self._slots:
            self._slots[key] = Slot(wiring, handed_on)
        return self._slots[key]

    def key(self, slot: Slot, batching: Batching) -> tuple:
        """What the prices of a slot depend on."""
        held = any(place.batched for place in slot.wiring.reads + slot.wiring.writes)
        return slot, batching.num_microbatches, batching.axes if held else None

    def table(self, slot: Slot, batching: Batching) -> Table:
        """A slot's options, none pruned but by the space's rules."""
        key = self.key(slot, batching)
        if key not in self._priced:
            self._priced[key] = self._price(slot, batching)
        return self._priced[key]

    def _price(self, slot: Slot, batching: Batching) -> Table:
        wiring, phases = slot.wiring, self._phases(slot.wiring.kind, batching)
        priced = layer_costs(self.costs, wiring, phases, batching)
        classes: dict[tuple, int] = {}
        examples: list[LayerSeries] = []
        class_of = []
        for plan in phases.ports:
            layouts = (
                tuple([plan.inputs[hop.input] for hop in wiring.hops]),
                tuple([plan.outputs[port] for port in slot.handed_on]),
            )
            if layouts not in classes:
                classes[layouts] = len(classes)
                examples.append(plan)
            class_of.append(classes[layouts])
        flat = None
        if self.costs.staged:
            flat = np.array([self.flat_bytes(wiring, each) for each in phases.parameters], np.int64)
        ties = [signatures(each, wiring.tied) for each in phases.parameters]
        sizes = [_tied_bytes(each, wiring.tied) for each in phases.parameters]
        return Table(
            self.candidates(wiring.kind, batching),
            *(getattr(priced, name) for name in COLUMNS),
            boundary=np.array(class_of)[phases.ports_of],
            examples=tuple(examples),
            stored=phases.parameters_of,
            ties=tuple(ties),
            tied_bytes=tuple(sizes),
            flat_bytes=flat,
            estimated=int(phases.estimated.sum()),
        )

    @cached_property
    def flat_arrays(self) -> tuple[FlatArray, ...]:
        """All that a stage may have."""
        found: dict[FlatArray, None] = {}
        for dtype in dict.fromkeys(parameter.dtype for parameter in self.costs.model.parameters):
            found |= dict.fromkeys([("parameters", dtype), ("gradients", dtype)])
            found |= {(slot, dtype if slot == SAME else slot): None for slot in self.costs.optimizer.param_like_slots}
        return tuple(found)

    def flat_bytes(self, wiring: LayerWiring, parameters: tuple[ParameterPlan, ...]) -> tuple[int, ...]:
        """Bytes of a layer in `flat_arrays`."""
        key = wiring, id(parameters)
        if key not in self._flat:
            kind, optimizer = self.costs.model.kinds[wiring.kind], self.costs.optimizer
            found = self._in_flat(*stored_bytes(kind, parameters, owned=wiring.owned, optimizer=optimizer))
            self._flat[key] = parameters, found
        return self._flat[key][1]

    def unread_bytes(self) -> tuple[int, ...]:
        """Bytes in `flat_arrays` of parameters that no layer reads."""
        return self._in_flat(self.costs.unread_state(), Counter())

    def _in_flat(self, state: Counter[Flat], gradients: Counter[str]) -> tuple[int, ...]:
        found: Counter[FlatArray] = Counter()
        for (slot, dtype), size in state.items():
            found["parameters" if slot < 0 else self.costs.optimizer.param_like_slots[slot], dtype] += size
        for dtype, size in gradients.items():
            found["gradients", dtype] += size
        return tuple(found[array] for array in self.flat_arrays)

    def _phases(self, kind: int, batching: Batching) -> PhaseCosts:
        """Costs of a layer kind's strategies."""
        key = (kind, batching.microbatch)
        if key not in self._kinds:
            self._kinds[key] = phase_costs(
                self.costs, kind, self.candidates(kind, batching), microbatch=batching.microbatch
            )
        return self._kinds[key]

    def candidates(self, kind: int, batching: Batching) -> tuple[LayerStrategy, ...]:
        """Strategies of a layer kind."""
        key = (kind, batching.microbatch)
        if key not in self._strategies:
            layer, table = self.costs.model.kinds[kind], self.costs.table
            about = {"mesh": table.mesh, "microbatch": key[1], "distinct": table.planner.distinct_remats}
            found = self.space.strategies(layer, pruned=self.pruned, **about)
            more = self.space.repeating(layer, **about) if key in self._repeating else ()
            self._strategies[key] = tuple(dict.fromkeys((*found, *more)))
        return self._strategies[key]

    def let_tied_repeat(self, batching: Batching) -> bool:
        """Lets layers that share parameters repeat their work, where otherwise no layouts of those agree.

        Sharing out one of them may be best by another dim of the parameter than sharing out the other.

        Returns:
            Whether that is new for this micro-batch: then tables must be asked for again.
        """
        tied = {layer.kind for layer in self.costs.wiring.layers if layer.tied}
        new = {(kind, batching.microbatch) for kind in tied} - self._repeating
        self._repeating |= new
        for key in new:
            self._strategies.pop(key, None)
        self.forget({kind for kind, _ in new})
        return bool(new)

    def forget(self, kinds: set[int]) -> None:
        """Forgets what some layer kinds cost."""
        for key in [key for key in self._kinds if key[0] in kinds]:
            del self._kinds[key]
        for key in [key for key in self._priced if key[0].wiring.kind in kinds]:
            del self._priced[key]
        for key in [key for key in self._moves if kinds & {key[0].wiring.kind, key[1].wiring.kind}]:
            del self._moves[key]

    def moves(self, before: Slot, here: Slot, batching: Batching) -> np.ndarray:
        """Seconds per micro-batch, forward and backward, between neighbours' classes.

        Returns:
            float64[classes before, classes here, 2]
        """
        key = (before, here, batching.num_microbatches)
        if key not in self._moves:
            sources, targets = (self.table(slot, batching).examples for slot in (before, here))
            self._moves[key] = np.array(
                [
                    [
                        self.costs.transition_seconds(
                            before.wiring.kind, here.wiring, source, target, microbatch=batching.microbatch
                        )
                        for target in targets
                    ]
                    for source in sources
                ]
            )
        return self._moves[key]


def _tied_bytes(parameters: Sequence[ParameterPlan], tied: tuple[tuple[str, int], ...]) -> dict[str, int]:
    by_port = {parameter.port: parameter.optimizer_bytes for parameter in parameters} if tied else {}
    return {name: by_port[port] for name, port in tied if port in by_port}


def tie_variants(tables: Iterable[Table], tied: tuple[str, ...]) -> list[dict[str, tuple]]:
    """Joint layouts of the tied parameters that every layer using them offers.

    Args:
        tables: of the layers, those of like layers once.
        tied: names of the parameters.
    """
    choices = []
    for name in tied:
        offers = [
            dict.fromkeys(table.ties[way][name] for way in table.offered_ties)
            for table in tables
            if name in table.ties[0]
        ]
        choices.append([layout for layout in offers[0] if all(layout in offer for offer in offers)] if offers else [()])
    return [dict(zip(tied, layouts, strict=True)) for layouts in itertools.product(*choices)]
