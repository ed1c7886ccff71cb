"""Which gradients of a layer wait for the next layer's work before they are scattered."""

from __future__ import annotations

from collections.abc import Mapping


def scattered_late(sizes: Mapping[int, int]) -> frozenset[int]:
    """Parameters whose gradients are scattered while the next layer works backward; others are while their own does.

    Those made last, up to half of all bytes, at least one: nothing of their own layer is left to overlap with. Which of
    them are small enough to stay whole, or shared between layers, is not looked at.

    Args:
        sizes: local bytes of gradients by port, in the order in which they are made.
    """
    room, late = sum(sizes.values()) // 2, list[int]()
    for port, size in reversed(list(sizes.items())):
        room -= size
        if late and room < 0:
            break
        late.append(port)
    return frozenset(late)
