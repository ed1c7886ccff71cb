"""How a model's layers hang together: who hands what to whom, who owns a parameter, what must be held.

A layer output that only the next layer reads goes straight from one layout to the other: the one thing that
couples neighbouring strategies. A value that crosses more than one layer or has several readers (skips, encoder
output, masks), like a leaf of the batch, is held in the plan-wide layout (batch dim over `Plan.batch_axes`), and
producer and readers convert to and from that, each by itself. State is held whole on every device.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from galvatron_jax.spec.model import Layer, LayerKind, ModelSpec, Parameter, PortRole

_SLICE = re.compile(r"\[\d+\]$")
"""Which layer's part of a stacked parameter."""


@dataclass(frozen=True)
class Hop:
    """A value handed from the layer before to this one."""

    output: int
    """Output port of the layer before."""
    input: int
    """Input port of this layer."""
    differentiable: bool
    """Whether a gradient flows back."""


@dataclass(frozen=True)
class Held:
    """An input read from, or an output left in, the plan-wide layout."""

    port: int
    differentiable: bool
    batched: bool
    """Batch dim over `Plan.batch_axes`; otherwise whole on every device."""


@dataclass(frozen=True)
class LayerWiring:
    """The connections of one layer. Layers of one kind with equal wiring cost the same under equal strategies."""

    kind: int
    hops: tuple[Hop, ...]
    """From the layer before."""
    reads: tuple[Held, ...]
    writes: tuple[Held, ...]
    owned: tuple[int, ...]
    """Input ports of the parameters that this layer is the first to use: it accounts for their memory."""
    tied: tuple[tuple[str, int], ...]
    """Parameters used by several layers, with this layer's input port: all must agree on their storage."""
    looped: bool = False
    """Whether a layer beside it is of its kind: the executor runs such layers in a loop, if their strategies agree."""

    @property
    def held_ports(self) -> frozenset[int]:
        """Input ports that read what waits in the plan-wide layout."""
        return frozenset([held.port for held in self.reads])


@dataclass(frozen=True)
class Wiring:
    """The connections of a model."""

    layers: tuple[LayerWiring, ...]
    batch: tuple[tuple[int, int], ...]
    """Leaves of the batch, each as (layer, input port) of its first reader."""
    held: tuple[tuple[int, int], ...]
    """Values held in the plan-wide layout, as (layer, output port) of their producer."""
    unread: tuple[Parameter, ...]
    """Parameters that no layer uses: whole on every device, with all the optimizer keeps for them."""

    @property
    def tied(self) -> tuple[str, ...]:
        """References of parameters that several layers use."""
        return tuple(dict.fromkeys(name for layer in self.layers for name, _ in layer.tied))


def wire(model: ModelSpec) -> Wiring:
    """Reads the connections off a model's layers."""
    producers = dict(_ports(model, "outputs"))
    readers: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for reference, place in _ports(model, "inputs"):
        readers[reference].append(place)
    layers = tuple(_wire_layer(model, index, producers, readers) for index in range(len(model.layers)))
    batch = tuple(places[0] for reference, places in readers.items() if reference.startswith("batch:"))
    held = tuple((index, write.port) for index, layer in enumerate(layers) for write in layer.writes if write.batched)
    read = {_SLICE.sub("", reference) for reference in readers} | set(readers)
    unread = tuple(parameter for parameter in model.parameters if f"param:{parameter.path}" not in read)
    return Wiring(layers, batch, held, unread)


def _ports(model: ModelSpec, side: str) -> Iterator[tuple[str, tuple[int, int]]]:
    for index, layer in enumerate(model.layers):
        for port, reference in enumerate(getattr(layer, side)):
            yield reference, (index, port)


def _wire_layer(model: ModelSpec, index: int, producers: dict, readers: dict) -> LayerWiring:
    layer = model.layers[index]
    kind = model.kinds[layer.kind]
    hops, reads, owned, tied = [], [], [], []
    for port, reference in enumerate(layer.inputs):
        users = {place[0] for place in readers[reference]}
        if reference.startswith("param:"):
            if readers[reference][0] == (index, port):
                owned.append(port)
            if len(users) > 1 and all(name != reference for name, _ in tied):
                tied.append((reference, port))
        elif reference.startswith("value:") and reference in producers:
            source, output = producers[reference]
            differentiable = _flows(model, producers[reference], kind, port)
            if users == {source + 1}:
                hops.append(Hop(output, port, differentiable))
            else:
                reads.append(Held(port, differentiable, batched=True))
        elif reference.startswith(("batch:", "state:")):
            reads.append(Held(port, differentiable=False, batched=reference.startswith("batch:")))
    writes = _writes(layer, kind, index, readers)
    beside = [model.layers[other].kind for other in (index - 1, index + 1) if 0 <= other < len(model.layers)]
    looped = layer.kind in beside
    return LayerWiring(layer.kind, tuple(hops), tuple(reads), writes, tuple(owned), tuple(tied), looped)


def _flows(model: ModelSpec, producer: tuple[int, int], kind: LayerKind, port: int) -> bool:
    source = model.kinds[model.layers[producer[0]].kind]
    return source.outputs[producer[1]].cotangent is not None and kind.inputs[port].gradient is not None


def _writes(layer: Layer, kind: LayerKind, index: int, readers: dict) -> tuple[Held, ...]:
    writes = []
    for port, reference in enumerate(layer.outputs):
        users = {place[0] for place in readers.get(reference, ())}
        if reference.startswith("value:") and users and users != {index + 1}:
            writes.append(Held(port, kind.outputs[port].cotangent is not None, batched=True))
        elif reference.startswith("state:") and kind.outputs[port].role is PortRole.STATE:
            writes.append(Held(port, differentiable=False, batched=False))
    return tuple(writes)
