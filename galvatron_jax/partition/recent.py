"""A memo that forgets what was asked for longest ago."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Recent(Generic[Result]):
    """Results by key, at most `limit` of them.

    Example:
        >>> squares = Recent[int](2)
        >>> [squares.get(n, lambda n=n: n * n) for n in (1, 2, 1, 3)], list(squares)
        ([1, 4, 1, 9], [1, 3])
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._results: dict[Hashable, Result] = {}

    def __iter__(self):
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """The result of a key, made if it is not at hand."""
        found = self._results.pop(key) if key in self._results else make()
        self._results[key] = found
        if len(self._results) > self.limit:
            del self._results[next(iter(self._results))]
        return found
