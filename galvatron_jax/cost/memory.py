"""Bytes per device: what a layer holds, as the one-stage executor runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from galvatron_jax.cost.sizes import itemsize
from galvatron_jax.partition.layer_plan import LayerPlan, ParameterPlan
from galvatron_jax.spec.model import LayerKind

SAME = "same"


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


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one layer adds to a device: they add up over layers, except the workspace, whose largest counts."""

    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    residual_bytes: int
    workspace_bytes: int

    @property
    def static_bytes(self) -> int:
        """What stays from step to step, and gradients."""
        return self.parameter_bytes + self.optimizer_bytes + self.gradient_bytes

    @property
    def resident_bytes(self) -> int:
        """What adds up over layers."""
        return self.static_bytes + self.residual_bytes


def layer_memory(
    kind: LayerKind, plan: LayerPlan, *, owned: tuple[int, ...], optimizer: OptimizerMemory
) -> LayerMemory:
    """Memory of one layer under a plan, one micro-batch in flight.

    Args:
        kind: the layer's kind.
        plan: its plan.
        owned: input ports of the parameters to account for; another layer does it for tied ones, whose gradients are
            added up only once each layer has synchronised its own.
        optimizer: state per parameter.
    """
    return replace(
        parameter_memory(kind, plan.parameters, owned=owned, optimizer=optimizer),
        residual_bytes=plan.residual_bytes,
        workspace_bytes=max(plan.forward.peak_bytes, plan.backward.peak_bytes),
    )


def parameter_memory(
    kind: LayerKind, parameters: Sequence[ParameterPlan], *, owned: tuple[int, ...], optimizer: OptimizerMemory
) -> LayerMemory:
    """What a layer's parameters take; arguments as `layer_memory`."""
    mine = [parameter for parameter in parameters if parameter.port in owned]
    dtypes = {parameter.port: parameter_dtype(kind, parameter.port) for parameter in mine}
    return LayerMemory(
        parameter_bytes=sum(parameter.storage_bytes for parameter in mine),
        optimizer_bytes=sum(optimizer.slot_bytes(p.optimizer_bytes, dtypes[p.port]) for p in mine),
        gradient_bytes=sum(parameter.accumulator_bytes for parameter in parameters),
        residual_bytes=0,
        workspace_bytes=0,
    )


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
