"""Bytes per device: what a layer holds, as the one-stage executor runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from galvatron_jax.cost.sizes import LINE, itemsize, lines_of
from galvatron_jax.cost.wiring import LayerWiring
from galvatron_jax.partition.layer_plan import LayerPlan, ParameterPlan
from galvatron_jax.spec.model import LayerKind

SAME = "same"
Flat = tuple[int, str]
"""A flat array of a pipeline's state: slot of the optimizer, -1 for parameters; dtype."""


def in_lines(size: int, dtype: str, held: str) -> int:
    """Bytes that an array takes in a pipeline's flat array of dtype `held`; elsewhere it takes `size` as `dtype`."""
    return lines_of(size // itemsize(dtype)) * LINE * itemsize(held)


@dataclass(frozen=True)
class OptimizerMemory:
    """The state of an optimizer, as bytes need it.

    Adam in float32 on bfloat16 parameters is `OptimizerMemory(("float32", "float32"), 4)`: two arrays shaped like
    each parameter, and a step count.
    """

    param_like_slots: tuple[str, ...] = ()
    """Dtype of each array shaped like a parameter; `same` means the parameter's own."""
    scalar_bytes: int = 0
    """What else there is, on every device."""

    def slot_bytes(self, optimizer_bytes: int, dtype: str) -> int:
        """Bytes of all slots of one parameter.

        Args:
            optimizer_bytes: of one array of the parameter's dtype in the optimizer's layout.
            dtype: the parameter's.
        """
        count = optimizer_bytes // itemsize(dtype)
        return sum(count * itemsize(dtype if slot == SAME else slot) for slot in self.param_like_slots)

    def state_bytes(self, storage_bytes: int, optimizer_bytes: int, dtype: str) -> Counter[Flat]:
        """Bytes of one parameter and of its slots, by flat array of a pipeline's state, in whole lines.

        Args:
            storage_bytes: of the parameter as stored.
            optimizer_bytes: of one array of its dtype in the optimizer's layout.
            dtype: the parameter's.
        """
        found: Counter[Flat] = Counter({(-1, dtype): in_lines(storage_bytes, dtype, dtype)})
        for number, slot in enumerate(self.param_like_slots):
            held = dtype if slot == SAME else slot
            found[number, held] += in_lines(optimizer_bytes, dtype, held)
        return found


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one layer adds to a device: they add up over layers, except the workspace, whose largest counts."""

    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    residual_bytes: int
    workspace_bytes: int
    copied_bytes: int = 0
    """Parameters once more, in the order in which they are gathered."""

    @property
    def static_bytes(self) -> int:
        """What stays from step to step, gradients, and copies of parameters."""
        return self.parameter_bytes + self.optimizer_bytes + self.gradient_bytes + self.copied_bytes

    @property
    def resident_bytes(self) -> int:
        """What adds up over layers."""
        return self.static_bytes + self.residual_bytes


def layer_memory(
    kind: LayerKind, plan: LayerPlan, *, wiring: LayerWiring, optimizer: OptimizerMemory, accumulates: bool = False
) -> LayerMemory:
    """Memory of one layer under a plan, one micro-batch in flight.

    Args:
        kind: the layer's kind.
        plan: its plan.
        wiring: its connections.
        optimizer: state per parameter.
        accumulates: whether gradients of several micro-batches are added up.
    """
    residual, workspace = passing_bytes(plan, wiring=wiring, staged=False, accumulates=accumulates)
    return replace(
        parameter_memory(kind, plan.parameters, wiring=wiring, optimizer=optimizer),
        residual_bytes=residual,
        workspace_bytes=workspace,
    )


def passing_bytes(plan: LayerPlan, *, wiring: LayerWiring, staged: bool, accumulates: bool) -> tuple[int, int]:
    """What a layer keeps from forward to backward, and what it needs beside while it works.

    Args:
        plan: the layer's.
        wiring: its connections: what it reads that waits for other layers too is counted once for all.
        staged: whether it is in a pipeline stage, where something may come between its forward and its backward even
            if it is the last layer.
        accumulates: whether its gradients are added to those of earlier micro-batches.
    """
    held = wiring.held_ports
    residual, workspace = passing(
        plan.residual_bytes - sum(size for port, size in plan.kept_inputs if port in held),
        max(plan.forward.peak_bytes, plan.backward.peak_bytes),
        plan.backward.through_peak_bytes,
        staged=staged,
    )
    waiting = plan.backward.unscattered_bytes if scatters_late(wiring, staged=staged, accumulates=accumulates) else 0
    return residual, workspace + waiting


def scatters_late(wiring: LayerWiring, *, staged: bool, accumulates: bool) -> bool:
    """Whether whole gradients of the layer before are still there while a layer works backward.

    XLA's GPU compiler puts a reduce-scatter whose result a loop only stores into the next turn, to overlap with it
    (`CollectivePipeliner`, on for GPUs by default), so that a loop's body holds two layers' gradients; the runtime
    keeps it to those made last (`partition.scatters`). It leaves alone what a turn adds to others: the gradients of
    several micro-batches, and all those in pipelines.
    """
    return wiring.looped and not staged and not accumulates


def passing(residual: int, workspace: int, through: int, *, staged: bool) -> tuple[int, int]:
    """`passing_bytes` from its parts: residuals, the larger peak, and that of both passes of a layer with the loss."""
    if not through:
        return residual, workspace
    if staged:
        return residual, max(through - residual, 0)
    # Its backward follows at once: what it keeps is part of what it works with.
    return 0, through


def parameter_memory(
    kind: LayerKind,
    parameters: Sequence[ParameterPlan],
    *,
    wiring: LayerWiring,
    optimizer: OptimizerMemory,
    staged: bool = False,
) -> LayerMemory:
    """What a layer's parameters take.

    XLA's GPU collectives want the dim that they gather first in memory (`GpuLayoutAssignment`), and what a loop gathers
    is put in that order for all its layers ahead of it; but not in a pipeline stage, whose loops read a layer's
    parameters out of the flat arrays when it is their turn. Other layers take theirs out, and make their gradients of
    one micro-batch, beside them.

    Args:
        kind: the layer's kind.
        parameters: as planned.
        wiring: the layer's connections. It accounts for the parameters that it owns; another layer does it for other
            tied ones, whose gradients are added up only once each layer has synchronised its own.
        optimizer: state per parameter.
        staged: whether it is in a pipeline stage.
    """
    mine = [parameter for parameter in parameters if parameter.port in wiring.owned]
    turned = [p for p in mine if p.turned] if wiring.looped and not staged else []
    taken_out = mine if staged and not wiring.looped else []
    dtypes = {parameter.port: parameter_dtype(kind, parameter.port) for parameter in mine}
    return LayerMemory(
        parameter_bytes=sum(parameter.storage_bytes for parameter in mine),
        optimizer_bytes=sum(optimizer.slot_bytes(p.optimizer_bytes, dtypes[p.port]) for p in mine),
        gradient_bytes=sum(parameter.accumulator_bytes for parameter in parameters),
        residual_bytes=0,
        workspace_bytes=sum(p.storage_bytes + p.accumulator_bytes for p in taken_out),
        copied_bytes=sum(p.storage_bytes for p in turned),
    )


def stored_bytes(
    kind: LayerKind, parameters: Sequence[ParameterPlan], *, owned: tuple[int, ...], optimizer: OptimizerMemory
) -> tuple[Counter[Flat], Counter[str]]:
    """Bytes of a layer in the flat arrays of a pipeline stage: of its state, and of its accumulated gradients.

    Args:
        kind: the layer's kind.
        parameters: as planned.
        owned: input ports of those that are stored for it.
        optimizer: state per parameter.

    Returns:
        State by slot and dtype, parameters being slot -1; gradients by dtype.
    """
    state: Counter[Flat] = Counter()
    gradients: Counter[str] = Counter()
    for parameter in parameters:
        dtype = parameter_dtype(kind, parameter.port)
        gradients[dtype] += in_lines(parameter.accumulator_bytes, dtype, dtype)
        if parameter.port in owned:
            state.update(optimizer.state_bytes(parameter.storage_bytes, parameter.optimizer_bytes, dtype))
    return state, gradients


def update_traffic_bytes(
    kind: LayerKind, parameters: Sequence[ParameterPlan], *, owned: tuple[int, ...], optimizer: OptimizerMemory
) -> int:
    """Bytes that the optimizer's update reads and writes: gradient once, parameter and every slot twice."""
    return sum(
        3 * parameter.optimizer_bytes
        + 2 * optimizer.slot_bytes(parameter.optimizer_bytes, parameter_dtype(kind, parameter.port))
        for parameter in parameters
        if parameter.port in owned
    )


def parameter_dtype(kind: LayerKind, port: int) -> str:
    """Dtype of the parameter at an input port."""
    return kind.program.values[kind.inputs[port].value].dtype
