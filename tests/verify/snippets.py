"""Small modules written by hand."""

from __future__ import annotations


def module(main: str, *others: str) -> str:
    """A scheduled module whose entry has these lines; other computations are given whole."""
    lines = ["HloModule jit_step, is_scheduled=true", ""]
    lines += [other.strip("\n") + "\n" for other in others]
    lines += ["ENTRY %main (p: f32[]) -> f32[] {", main.strip("\n"), "}", ""]
    return "\n".join(lines)
