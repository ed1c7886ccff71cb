"""Which instructions of a local program some of its values rest on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from galvatron_jax.partition.instructions import Convert, Instruction, Version


def needed(instructions: Sequence[Instruction], versions: Iterable[Version]) -> tuple[Instruction, ...]:
    """The instructions without which some versions of values cannot be made, in order.

    Args:
        instructions: a program.
        versions: what is wanted of it.
    """
    wanted = set(versions)
    kept = []
    for instruction in reversed(instructions):
        if isinstance(instruction, Convert):
            made, read = [(instruction.value, instruction.target)], [(instruction.value, instruction.source)]
        else:
            made, read = list(instruction.results), list(instruction.operands)
        if wanted.intersection(made):
            kept.append(instruction)
            wanted.update(read)
    return tuple(kept[::-1])
