"""Programs that only some devices run, in one program for all.

A `lax.switch` would do, but XLA copies what goes in and out of a conditional, and what goes through stages here is most
of a device's memory: gradients, and what many micro-batches keep for their backward. A loop that turns once or not at
all changes its arrays in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax

Carry = TypeVar("Carry")


def take_turn(which: Any, programs: Mapping[int, Callable[[Carry], Carry]], carry: Carry) -> Carry:
    """Runs the one program whose number is `which`; none when there is no such.

    The programs may hold collectives among devices that agree on `which`, so no permutes: those wait for all.

    Args:
        which: a traced number.
        programs: by number, from arrays to arrays of the same shapes.
        carry: the arrays.
    """
    for number, program in programs.items():
        turns = jnp.where(which == number, 1, 0)
        carry = lax.fori_loop(0, turns, lambda _, arrays, program=program: program(arrays), carry)
    return carry
