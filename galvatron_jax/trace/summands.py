"""Values of which layers make parts of the gradient that need not be summed over devices one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from galvatron_jax.spec.model import Layer, LayerKind, PortRole
from galvatron_jax.spec.program import FactorRole

Place = tuple[str, int, int]
"""`inputs` or `outputs`, kind, port."""


def mark_summands(kinds: Sequence[LayerKind], layers: Sequence[Layer]) -> tuple[LayerKind, ...]:
    """Marks the ports at which gradients pass as summands, such as those of relative positions that all layers share.

    These are of arrays without a batch that a layer makes and several read. Each device has a summand of the gradient
    there, for examples, heads or positions of its own; marked, they are added up layer by layer, and summed over
    devices once by the layer that made the value. A port is not marked if another layer of its kind has anything else
    there.
    """
    places = _places(layers)
    passed = {
        reference
        for reference, at in places.items()
        if any(side == "outputs" for side, _, _ in at) and all(_is_whole_array(kinds, place) for place in at)
    }
    while astray := {r for r in passed if places[r] & _of(places, places.keys() - passed)}:
        passed -= astray
    found = {r for r in passed if len({i for i, layer in enumerate(layers) if r in layer.inputs}) > 1}
    while beside := {r for r in passed - found if places[r] & _of(places, found)}:
        found |= beside
    return tuple(_marked(kind, number, _of(places, found)) for number, kind in enumerate(kinds))


def _places(layers: Sequence[Layer]) -> dict[str, set[Place]]:
    """By reference, where layers make and read it."""
    places: dict[str, set[Place]] = defaultdict(set)
    for layer in layers:
        for side in ("inputs", "outputs"):
            for port, reference in enumerate(getattr(layer, side)):
                places[reference].add((side, layer.kind, port))
    return places


def _of(places: dict[str, set[Place]], references: AbstractSet[str]) -> set[Place]:
    return {place for reference in references for place in places[reference]}


def _is_whole_array(kinds: Sequence[LayerKind], place: Place) -> bool:
    """Whether an activation passes that has dims, none of them the batch's."""
    side, kind, number = place
    port, program = getattr(kinds[kind], side)[number], kinds[kind].program
    dims = program.values[port.value].dims
    roles = {program.factors[factor].role for dim in dims for factor in dim}
    return port.role is PortRole.ACTIVATION and bool(dims) and FactorRole.BATCH not in roles


def _marked(kind: LayerKind, number: int, places: AbstractSet[Place]) -> LayerKind:
    inputs = tuple(
        port.model_copy(update={"summands": port.gradient is not None and ("inputs", number, i) in places})
        for i, port in enumerate(kind.inputs)
    )
    outputs = tuple(
        port.model_copy(update={"summands": port.cotangent is not None and ("outputs", number, i) in places})
        for i, port in enumerate(kind.outputs)
    )
    return kind.model_copy(update={"inputs": inputs, "outputs": outputs})
