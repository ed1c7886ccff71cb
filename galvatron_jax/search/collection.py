"""Python's garbage collector during a search."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keeps the collector of cycles from running; counted references free memory all the same.

    A search makes many small objects that it keeps to the end, and hardly a cycle. The collector would go through
    all of them, and through what else the process holds (a loaded JAX is a million objects), time and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
