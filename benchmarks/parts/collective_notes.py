"""Why XLA's GPU compiler moves fewer bytes than planned in some pairs of `memory_accuracy.py`.

Inferred from the operations, element types, sizes and counts of planned and compiled collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_TOKENS = "the batch's tokens, gathered in forward and again in the embedding's backward, are gathered once"
_NARROWED = "what a product reads in bfloat16, or a mask as booleans, is narrowed before it is gathered, not after"
_ADDED = "gradients of what several layers read are added up before they are summed, not after"
_TABLE = "the table that encoder, decoder and head share is gathered once for all"
_ENTERS = "what the last stage's layers read whole is gathered once for its forward, run again, and its backward"

NOTES: Mapping[str, tuple[str, ...]] = {
    "gpt2-f32-8-dp[a,b,c]·zero3-m2x2": (_TOKENS,),
    "gpt2-bf16-8-dp[a,b,c]·zero3·remat:full-m1x4": (_TOKENS,),
    "gpt2-bf16-8-dp[a]·ulysses[b,c]·zero3-m1x4": (_TOKENS, _NARROWED),
    "llama-bf16-8-dp[a,b,c]·zero3-m1x1": (_TOKENS,),
    "llama-bf16-8-dp[a]·ulysses[b,c]·zero3·remat:full-m2x2": (_TOKENS,),
    "llama-bf16-8-dp[b]·tp[c]·sp-pp2-1f1b-m4x2": (_ENTERS,),
    "t5-bf16-8-dp[a,b,c]·zero3-m2x4": (_TOKENS, _ADDED),
    "t5-bf16-8-dp[a,b]·tp[c]·remat:attention-m1x8": (_ADDED,),
    "t5-bf16-64-dp[a,b,c,d,e,f]·zero3·remat:dots-m1x4": (_TABLE,),
    "vit-f32-8-dp[a]·tp[b,c]·sp·remat:full-m1x32": (_ADDED,),
    "vit-bf16-8-dp[a,b]·ulysses[c]·zero3-m2x16": (_NARROWED, _ADDED),
    "moe-bf16-8-dp[a,b,c]·zero3-m1x2": (_TOKENS,),
    "moe-bf16-8-dp[a,b,c]·zero3·remat:full-m2x2": (_TOKENS, _ADDED),
    "moe-bf16-8-dp[a]·tp[b,c]·sp·zero1-m1x2": (_NARROWED,),
    "moe-bf16-8-dp[a,b]·ulysses[c]·zero1·remat:dots-m1x2": (_NARROWED,),
}
"""By pair, with jax 0.10.2."""


def unlike(collectives: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of a pair's operations and groups that move other bytes than planned."""
    return [each for each in collectives if each["planned_bytes"] != each["bytes"]]


def explained(pair: str, collectives: Iterable[Mapping[str, Any]]) -> str | None:
    """Why a pair's differ: None where they do not, or nobody knows."""
    return "; ".join(NOTES.get(pair, ())) or None if unlike(collectives) else None
