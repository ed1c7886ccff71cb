"""Python's garbage collector during a search."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_AT_START = gc.get_freeze_count()
"""Objects that Python itself has put aside: none before Python 3.12, some hundred since."""


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keeps the collector of cycles from running; counted references free memory all the same.

    A search makes many small objects that it keeps to the end, and hardly a cycle. The collector would go through
    all of them, and through what else the process holds (a loaded JAX is a million objects), time and again. Nor are
    those that are left at the end looked at as new ones, which most likely live no longer: they count as old.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if gc.get_freeze_count() <= _AT_START:
                # Puts all objects aside, and back among the oldest; what others have put aside stays there.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
