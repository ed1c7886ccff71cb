"""Families of plans that people know by name: the best of each is what a search's winner is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel


@dataclass(frozen=True)
class Family:
    """Plans all of whose layers use strategies of one sort (layers that offer none of them use any)."""

    name: str
    allows: Callable[[LayerStrategy], bool]


def _data_only(strategy: LayerStrategy) -> bool:
    return not strategy.tp and not strategy.sp


FAMILIES = (
    Family("data parallel", lambda s: _data_only(s) and s.zero == 0 and s.remat is Remat.NONE),
    Family("data parallel, rematerialised", lambda s: _data_only(s) and s.zero == 0 and s.remat is Remat.FULL),
    Family("ZeRO 1 and 2", lambda s: _data_only(s) and s.zero in (1, 2)),
    Family("ZeRO 3", lambda s: _data_only(s) and s.zero == 3),
    Family("tensor parallel", lambda s: bool(s.tp) and s.sp_kind is SequenceParallel.NONE),
    Family("Megatron sequence parallel", lambda s: s.sp_kind is SequenceParallel.MEGATRON),
    Family("Ulysses", lambda s: s.sp_kind is SequenceParallel.ULYSSES),
    Family("no rematerialisation", lambda s: s.remat is Remat.NONE),
    Family("full rematerialisation", lambda s: s.remat is Remat.FULL),
)
