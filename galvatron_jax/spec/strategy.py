"""`LayerStrategy`: how one layer is spread over the mesh, the one type that search, cost, files and runtime share."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from galvatron_jax.spec.document import Record


class SequenceParallel(StrEnum):
    """Which way a layer shards its sequence dimension."""

    NONE = "none"
    MEGATRON = "megatron"
    """Outside the tensor-parallel regions, over the `tp` axes themselves (Korthikanti et al., 2022)."""
    ULYSSES = "ulysses"
    """Over axes of its own, heads inside attention, by all-to-all (Jacobs et al., 2023)."""


class Remat(StrEnum):
    """Which forward values a layer computes again in the backward pass instead of keeping them."""

    NONE = "none"
    """Keep all: backward repeats no computation and no communication."""
    GATHERS = "gathers"
    """Keep all, each value in its smallest layout: backward repeats communication, as Megatron-LM does for sequence
    parallelism (Korthikanti et al., 2022, section 4.2.2)."""
    ATTENTION = "attention"
    """Recompute what is quadratic in the sequence (attention scores and weights); keep the rest."""
    DOTS = "dots"
    """Keep results of matrix products and convolutions; recompute the rest."""
    FULL = "full"
    """Keep the layer's inputs only."""


class LayerStrategy(Record):
    """Which mesh axes serve which kind of parallelism in one layer.

    With a mesh `{"a": 2, "b": 2, "c": 2}`, `LayerStrategy(dp=("a",), tp=("b", "c"))` splits the
    batch in two and the layer's hidden dims (heads, MLP, experts, vocabulary) in four. An axis that
    serves nothing repeats the layer's work.
    """

    dp: tuple[str, ...] = ()
    """Mesh axes over which the batch is split."""
    tp: tuple[str, ...] = ()
    """Mesh axes over which hidden dims, and so parameters, are split."""
    sp: tuple[str, ...] = ()
    """Mesh axes over which the sequence is split: equal to `tp` for Megatron's kind, disjoint from it for Ulysses."""
    sp_kind: SequenceParallel = SequenceParallel.NONE
    """Which sequence parallelism `sp` means."""
    zero: int = Field(default=0, ge=0, le=3)
    """ZeRO stage over the `dp` and Ulysses `sp` axes: 1 shards optimizer state, 2 also gradients, 3 also parameters."""
    remat: Remat = Remat.NONE
    """What the backward pass recomputes."""

    @model_validator(mode="after")
    def _check(self) -> LayerStrategy:
        if set(self.dp) & (set(self.tp) | set(self.sp)) or (
            self.sp_kind is SequenceParallel.ULYSSES and set(self.sp) & set(self.tp)
        ):
            raise ValueError(f"one mesh axis serves two kinds of parallelism in {self.short()}")
        if self.sp_kind is SequenceParallel.MEGATRON and self.sp != self.tp:
            raise ValueError("Megatron sequence parallelism uses the tp axes: set sp equal to tp")
        if (self.sp_kind is SequenceParallel.NONE) != (not self.sp):
            raise ValueError("sp axes and sp_kind must be given together")
        return self

    @property
    def replicas(self) -> tuple[str, ...]:
        """Mesh axes over which the layer's parameters are repeated, so that ZeRO can shard them."""
        return self.dp + (self.sp if self.sp_kind is SequenceParallel.ULYSSES else ())

    def short(self) -> str:
        """A compact name such as ``dp[a]·tp[b,c]·sp·zero3·full``."""
        parts = []
        if self.dp:
            parts.append(f"dp[{','.join(self.dp)}]")
        if self.tp:
            parts.append(f"tp[{','.join(self.tp)}]")
        if self.sp_kind is SequenceParallel.MEGATRON:
            parts.append("sp")
        if self.sp_kind is SequenceParallel.ULYSSES:
            parts.append(f"ulysses[{','.join(self.sp)}]")
        if self.zero:
            parts.append(f"zero{self.zero}")
        if self.remat is not Remat.NONE:
            parts.append(f"remat:{self.remat}")
        return "·".join(parts) or "replicated"
