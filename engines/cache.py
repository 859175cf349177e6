"""Results kept by the content they were computed from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class ContentCache(Generic[V]):
    """Least-recently-used values by key, bounded by the bytes they hold.

    A value larger than the bound is returned but not kept.
    """

    def __init__(self, max_bytes: int, size: Callable[[V], int]) -> None:
        """`size` tells the bytes of a value."""
        self._max_bytes = max_bytes
        self._size = size
        self._bytes = 0
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], V]) -> tuple[V, bool]:
        """Returns the value and whether it was already known. The caller must not write to it."""
        known = self._values.get(key)
        if known is not None:
            self._values.move_to_end(key)
            return known, True
        value = compute()
        size = self._size(value)
        if size <= self._max_bytes:
            self._values[key] = value
            self._bytes += size
            while self._bytes > self._max_bytes:
                _, dropped = self._values.popitem(last=False)
                self._bytes -= self._size(dropped)
        return value, False

    def __len__(self) -> int:
        return len(self._values)
