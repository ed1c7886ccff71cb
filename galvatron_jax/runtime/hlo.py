"""Compiled programs as text, and what one must not contain.

A permute waits for every device. Inside a branch that only one group of devices takes it waits for ever: on one process
with several devices the program hangs, while a test over several processes may pass.
"""

from __future__ import annotations

import re

from galvatron_jax.errors import DeadlockError

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_PERMUTE = re.compile(r" collective-permute(?:-start)?\(")


def hlo_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a compiled module, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            lines = computations[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return computations, entry


def permutes_in_branches(text: str) -> list[str]:
    """The permutes that stand inside a branch of a conditional, a line of the module each.

    Args:
        text: a compiled module as XLA prints it.
    """
    computations, _ = hlo_computations(text)
    todo = [name for lines in computations.values() for line in lines for name in _branches(line)]
    seen: set[str] = set()
    found = []
    while todo:
        name = todo.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        for line in computations[name]:
            if _PERMUTE.search(line):
                found.append(line.strip())
            todo += [*_CALLED.findall(line), *_branches(line)]
    return found


def _branches(line: str) -> list[str]:
    named = [name.strip().lstrip("%") for group in _BRANCHES.findall(line) for name in group.split(",")]
    return named + _TWO_BRANCHES.findall(line)


def check_deadlocks(text: str) -> None:
    """Makes sure that a compiled program cannot wait for ever.

    Args:
        text: a compiled module as XLA prints it.

    Raises:
        DeadlockError: when a permute stands inside a branch.
    """
    found = permutes_in_branches(text)
    if found:
        raise DeadlockError(
            f"The compiled step has {len(found)} collective-permute(s) inside branches that only some devices take; it "
            f"would hang. Please report this with the plan and the model. The first one: {found[0][:300]}"
        )
