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
    """The permutes that only some devices may reach, a line of the module each.

    All devices run the entry, and turn equally often the loops whose trips are known. What stands in a conditional, or
    in a loop that turns as often as the data says, may be some devices' own.

    Args:
        text: a compiled module as XLA prints it.
    """
    computations, entry = hlo_computations(text)
    todo, seen, found = [(entry, False)], set(), []
    while todo:
        name, alone = todo.pop()
        if (name, alone) in seen or name not in computations:
            continue
        seen.add((name, alone))
        for line in computations[name]:
            if alone and _PERMUTE.search(line):
                found.append(line.strip())
            inside = alone or (" while(" in line and "known_trip_count" not in line)
            todo += [(called, inside) for called in _CALLED.findall(line)]
            todo += [(branch, True) for branch in _branches(line)]
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
