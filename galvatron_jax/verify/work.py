"""FLOPs and memory traffic of one instruction of a compiled program: what a roofline needs of a kernel.

A kernel reads its operands and writes its results once, but for what it only takes a slice of, or changes a slice of in
place: of the parameters of all layers, stacked, the kernels of a loop's turn touch one layer's.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from galvatron_jax.verify.hlo import Computation, Instruction, Module, Shape

FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "opt-barrier", "async-update", "copy-done", "add-dependency", "domain", "get-dimension-size",
    }
)  # fmt: skip
"""Instructions that launch no kernel."""

_SLICES = ("dynamic-slice", "slice", "gather")
_THROUGH = ("bitcast", "reshape", "get-tuple-element")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CUBLAS = ("__cublas$gemm", "__cublas$lt$")
_ATTENTION, _ATTENTION_BACKWARD = "__cudnn$fmha", "Backward"
_SPATIAL = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


@dataclass(frozen=True)
class Work:
    """Of one kernel, or of several."""

    flops: Mapping[str, float] = field(default_factory=dict)
    """Of matrix products and convolutions by element type, a multiply-add being two."""
    bytes: int = 0
    """Read from and written to the device's memory."""

    @property
    def total_flops(self) -> float:
        """Of all types."""
        return sum(self.flops.values())


def instruction_work(module: Module, computation: Computation, instruction: Instruction) -> Work:
    """Work of one instruction that is neither free, nor a collective, nor runs other kernels.

    Args:
        module: the program.
        computation: where the instruction stands.
        instruction: a fusion, a library call, or an operation on its own.
    """
    operands = computation.operands_of(instruction)
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called[0]]
        return Work(_flops(module, inner), _fusion_bytes(module, inner))
    flops: defaultdict[str, float] = defaultdict(float)
    _add_flops(flops, computation, instruction)
    if instruction.opcode in _SLICES:
        return Work(flops, 2 * instruction.bytes + sum(o.bytes for o in operands[1:]))
    if instruction.opcode == "dynamic-update-slice":
        return Work(flops, 2 * operands[1].bytes)
    return Work(flops, instruction.bytes + sum(o.bytes for o in operands))


# ------------------------------------------------------------------------------------------------ FLOPs


def _flops(module: Module, computation: Computation) -> dict[str, float]:
    """Of a fused computation, and those that it calls."""
    found: defaultdict[str, float] = defaultdict(float)
    for instruction in computation.instructions:
        _add_flops(found, computation, instruction)
        if instruction.opcode in ("fusion", "call"):
            for name in instruction.called:
                for element, flops in _flops(module, module.computations[name]).items():
                    found[element] += flops
    return found


def _add_flops(found: defaultdict[str, float], computation: Computation, instruction: Instruction) -> None:
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return
    operands = [o.shapes[0] for o in computation.operands_of(instruction) if o.shapes]
    if instruction.opcode == "dot":
        found[operands[0].element] += 2 * instruction.shapes[0].elements * _contracted(instruction, operands[0])
    elif instruction.opcode == "convolution":
        found[operands[0].element] += _convolution(instruction, operands[1])
    elif instruction.opcode == "custom-call":
        target = _TARGET.search(instruction.attributes)
        name = target[1] if target else ""
        if name.startswith(_CUBLAS):
            contracted = _contracted(instruction, operands[0], quoted=True)
            found[operands[0].element] += 2 * instruction.shapes[0].elements * contracted
        elif name.startswith(_ATTENTION):
            found[operands[0].element] += _attention(operands, backward=_ATTENTION_BACKWARD in name)


def _contracted(instruction: Instruction, left: Shape, *, quoted: bool = False) -> int:
    """Product of the dims that a matrix product sums over."""
    if quoted:
        listed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        dims = [int(n) for n in re.findall(r"\d+", listed[1])] if listed else [len(left.dims) - 1]
    else:
        dims = list(instruction.numbers("lhs_contracting_dims"))
    return math.prod(left.dims[d] for d in dims)


def _convolution(instruction: Instruction, kernel: Shape) -> float:
    """Each element of the result sums over the kernel's elements but its output channels."""
    labels = _SPATIAL.search(instruction.attributes)
    outputs = kernel.dims[labels[2].index("o")] if labels else kernel.dims[-1]
    return 2.0 * instruction.shapes[0].elements * kernel.elements / outputs


def _attention(operands: list[Shape], *, backward: bool) -> float:
    """Scores and weighted values: two products forward, five backward (Dao et al., "FlashAttention", 2022).

    Queries and keys are `[batch, seq, heads, head]`.
    """
    batch, queries, heads, head = operands[0].dims
    return (5 if backward else 2) * 2.0 * batch * heads * queries * operands[1].dims[1] * head


# ------------------------------------------------------------------------------------------------ bytes


def _fusion_bytes(module: Module, inner: Computation) -> int:
    read = sum(_read_bytes(inner, parameter) for parameter in inner.parameters)
    root = inner.root
    written = inner.operands_of(root) if root.opcode == "tuple" else [root]
    return read + sum(_written_bytes(inner, result) for result in written)


def _read_bytes(inner: Computation, parameter: Instruction) -> int:
    """Bytes of an argument that a fused computation reads."""
    total, todo, seen = 0, [parameter], set()
    while todo:
        value = todo.pop()
        for reader in inner.readers.get(value.name, ()):
            if reader.name in seen:
                continue
            seen.add(reader.name)
            first = reader.operands[0] == value.name
            if reader.opcode in _SLICES and first:
                total += reader.bytes
            elif reader.opcode == "dynamic-update-slice" and first:
                continue  # Changed in place: nothing of it is read.
            elif reader.opcode in _THROUGH:
                todo.append(reader)
            else:
                return parameter.bytes
    return min(total, parameter.bytes)


def _written_bytes(inner: Computation, result: Instruction) -> int:
    """Bytes of a result that a fused computation writes."""
    while result.opcode in (*_THROUGH, "copy", "convert") and result.operands:
        before = inner.by_name[result.operands[0]]
        if before.opcode not in (*_THROUGH, "copy", "convert", "dynamic-update-slice"):
            break
        result = before
    if result.opcode == "dynamic-update-slice":
        return inner.by_name[result.operands[1]].bytes
    return result.bytes
