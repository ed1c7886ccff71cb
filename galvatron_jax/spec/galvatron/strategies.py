"""Hetu-Galvatron's words for a layer's strategy, and what they mean on a mesh.

`2-4*-1f-c` says: 2 pipeline stages, 4 devices that share a layer's hidden dims (`*`: the sequence too, Megatron's way;
`-sp` at the end: by Ulysses instead), 1 data-parallel replica, ZeRO-3 (`f`), full recomputation (`-c`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from galvatron_jax.spec.galvatron.reading import Faults
from galvatron_jax.spec.mesh import prime_factors
from galvatron_jax.spec.plan import MeshAxis
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel

DP_TYPES = {"ddp": 0, "zero2": 2, "zero3": 3}
"""ZeRO stages by its names."""

_NOTATION = re.compile(r"(\d+)-(\d+)(\*?)-(\d+)(f?)((?:-c|-sp)*)(?:\|(\w+))?")
_NAMES = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Degrees:
    """One layer's strategy as degrees."""

    pp: int
    group: int
    """Devices that share the layer: tensor-parallel, or Ulysses."""
    kind: SequenceParallel
    """How they split the sequence."""
    dp: int
    zero: int
    checkpoint: bool


def parse_notation(text: str, *, default_zero: int, place: str, faults: Faults) -> Degrees | None:
    """Reads a strategy such as ``4-2*-1-c|ddp``; None, and a fault, for anything else.

    Args:
        text: The strategy; what follows `|` names its data parallelism.
        default_zero: ZeRO stage where neither `f` nor `|` names one.
        place: Where it stands in the file, for messages.
        faults: Gathers what is wrong.
    """
    match = _NOTATION.fullmatch(text)
    if not match or "0" in (match[1], match[2], match[4]):
        faults.add(place, f"found {text!r}; expected pp-tp-dp such as '2-4*-1f-c' or '1-4-2-sp|zero2'.")
        return None
    pp, group, dp = (int(match[index]) for index in (1, 2, 4))
    if match[7] and match[7] not in DP_TYPES:
        faults.add(place, f"found {match[7]!r} after '|' in {text!r}; expected ddp, zero2 or zero3.")
        return None
    if match[5] and match[7] in ("ddp", "zero2"):
        faults.add(place, f"{text!r} says ZeRO-3 by its f, but {match[7]} after '|'; keep one of them.")
        return None
    zero = DP_TYPES[match[7]] if match[7] else 3 if match[5] else default_zero
    kind = SequenceParallel.NONE
    if group > 1 and "-sp" in match[6]:
        kind = SequenceParallel.ULYSSES
    elif group > 1 and match[3]:
        kind = SequenceParallel.MEGATRON
    return Degrees(pp, group, kind, dp, zero if dp > 1 else 0, "-c" in match[6])


def make_mesh(num_devices: int, devices_per_node: int, pp: int, *, faults: Faults) -> tuple[MeshAxis, ...]:
    """Prime axes a, b, c, ...: those of the pipeline first, then those of a stage; those between nodes outermost."""
    nodes = max(1, num_devices // devices_per_node)
    shared = math.gcd(pp, nodes)
    inter_stages, intra_stages, inter_layers = shared, pp // shared, nodes // shared
    if intra_stages > 1 and inter_layers > 1:
        faults.add(
            "pp_deg",
            f"{pp} stages on {nodes} nodes of {devices_per_node}: stages would lie partly within and partly between "
            "nodes; make the number of stages divide the number of nodes, or be a multiple of it.",
        )
    parts = (
        (inter_stages, "inter"), (intra_stages, "intra"), (inter_layers, "inter"),
        (num_devices // (pp * inter_layers), "intra"),
    )  # fmt: skip
    sizes = [(size, level) for degree, level in parts for size in prime_factors(degree)]
    return tuple(
        MeshAxis(name=name, size=size, level=level) for name, (size, level) in zip(_NAMES, sizes, strict=False)
    )


def make_strategy(degrees: Degrees, stage_mesh: tuple[MeshAxis, ...], *, place: str, faults: Faults) -> LayerStrategy:
    """The strategy on a stage's axes: data parallelism on a prefix, the group that shares a layer on the suffix."""
    split = 0
    while split < len(stage_mesh) and math.prod(axis.size for axis in stage_mesh[:split]) < degrees.dp:
        split += 1
    outer, inner = stage_mesh[:split], stage_mesh[split:]
    have = math.prod(axis.size for axis in outer), math.prod(axis.size for axis in inner)
    if have != (degrees.dp, degrees.group):
        sizes = " x ".join(f"{axis.name}={axis.size}" for axis in stage_mesh) or "no axes"
        faults.add(
            place,
            f"dp {degrees.dp} x tp {degrees.group} does not fit the stage's axes {sizes}: data parallelism takes the "
            "first of them, tensor parallelism the rest.",
        )
        return LayerStrategy()
    dp, group = tuple(axis.name for axis in outer), tuple(axis.name for axis in inner)
    ulysses = degrees.kind is SequenceParallel.ULYSSES
    return LayerStrategy(
        dp=dp,
        tp=() if ulysses else group,
        sp=group if degrees.kind is not SequenceParallel.NONE else (),
        sp_kind=degrees.kind,
        zero=degrees.zero,
        remat=Remat.FULL if degrees.checkpoint else Remat.NONE,
    )
