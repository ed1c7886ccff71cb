"""Writes the golden files anew: `python -m tests.golden.regenerate`. Read the change before you commit it."""

from __future__ import annotations

import tests.conftest  # noqa: F401  # The virtual devices, before JAX is asked for any.

from .records import RECORDS, path_of, text_of

if __name__ == "__main__":
    for name in RECORDS:
        path_of(name).write_text(text_of(name), encoding="utf-8")
        print(path_of(name))
