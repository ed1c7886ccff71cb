"""`ModelSpec`: the sequence of layers of a model, each distinct layer kind once with its operations. Made by trace."""

from __future__ import annotations

from enum import StrEnum

from galvatron_jax.spec.document import Document, Record
from galvatron_jax.spec.program import Program


class PortRole(StrEnum):
    """What crosses a layer's boundary at a port."""

    PARAMETER = "parameter"
    ACTIVATION = "activation"
    STATE = "state"
    """Non-trained variables: random keys and counters, batch statistics."""
    BATCH = "batch"
    """A leaf of the input batch."""
    CONSTANT = "constant"
    """A literal that differs between layers of one kind, or an array constant of the trace."""
    LOSS = "loss"
    WEIGHT = "weight"
    """The batch's weight in a weighted mean, from the loss function's aux."""
    AUX = "aux"


class InputPort(Record):
    """One input of a layer kind."""

    role: PortRole
    name: str
    """Path of the parameter inside the layer, or a label of the activation."""
    value: int
    """Value in `LayerKind.program`."""
    gradient: int | None = None
    """Value of its gradient in the program; None where no gradient flows."""
    summands: bool = False
    """Whether the gradient is handed back as summands, one a device: see `OutputPort.summands`."""


class OutputPort(Record):
    """One output of a layer kind."""

    role: PortRole
    name: str
    value: int
    cotangent: int | None = None
    """Value of its cotangent, an input of the program; None where no gradient flows."""
    summands: bool = False
    """Whether the cotangent arrives as summands, one a device, for this layer to sum up: of values without a batch that
    several layers read, such as relative positions."""


class LayerKind(Record):
    """A distinct layer program: forward and backward traced together at `ModelSpec.microbatch` examples."""

    name: str
    """Readable, such as `Block` or `embedding`."""
    fingerprint: str
    """Hash of structure, shapes (batch excepted) and dtypes: equal for layers that one program serves."""
    program: Program
    inputs: tuple[InputPort, ...]
    outputs: tuple[OutputPort, ...]
    batch_factor: int | None
    """Factor of the program that grows with the micro-batch; None when the layer has no batch."""
    notes: tuple[str, ...] = ()
    """What could not be sharded, and why."""


class Layer(Record):
    """One layer of the model: a kind applied to named parameters and values."""

    kind: int
    """Index into `ModelSpec.kinds`."""
    name: str
    """Path in the model, such as `blocks/3`."""
    inputs: tuple[str, ...]
    """Per input port: `param:PATH`, `param:PATH[i]` (slice i of a stacked parameter), `state:PATH`, `state:PATH[i]`,
    `batch:PATH`, `const:ID` or `value:ID`."""
    outputs: tuple[str, ...]
    """Per output port, `value:ID`."""


class Variable(Record):
    """A leaf of the model."""

    path: str
    shape: tuple[int, ...]
    dtype: str


class Parameter(Variable):
    """A trained leaf of the model."""


class ModelSpec(Document):
    """A model as the planner sees it.

    `layers[0]` holds what precedes the first repeated block (embedding) and `layers[-1]` what follows the
    last (final norm, head, loss); a model without repeated blocks is a single layer.
    """

    version: int = 1
    name: str
    fingerprint: str
    """Hash of the kinds' fingerprints, the layers and the parameters; independent of the micro-batch."""
    microbatch: int
    """Examples in the micro-batch at which the kinds were traced."""
    kinds: tuple[LayerKind, ...]
    layers: tuple[Layer, ...]
    parameters: tuple[Parameter, ...]
    state: tuple[Variable, ...] = ()
    """Non-trained leaves: random keys and counters, batch statistics. Every device holds them whole."""
    results: tuple[tuple[str, str], ...] = ()
    """What the model yields: pairs of `loss`, `weight`, `aux:PATH`, `state:PATH` or `state:PATH[i]`, and the
    `value:ID` (or unchanged input, `state:PATH`) that holds it."""
    notes: tuple[str, ...] = ()
    """What the tracer wants the user to know: unsharded operations, models without repeated blocks."""
