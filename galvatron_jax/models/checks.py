"""Checks that the configurations share."""

from __future__ import annotations


def check_divides(owner: str, name: str, value: int, by_name: str, by: int) -> None:
    """Raises ``ValueError`` unless ``by`` divides ``value``.

    Example:
        >>> check_divides("GPT2Config", "width", 768, "num_heads", 12)
    """
    if by < 1 or value % by:
        raise ValueError(
            f"{owner}: {name}={value} is not divisible by {by_name}={by}. Choose a {by_name} that divides {name}."
        )
