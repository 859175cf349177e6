"""Results kept by the content they were computed from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor


class ContentCache:
    """Least-recently-used tensors by key, bounded by the bytes they hold.

    A tensor larger than the bound is returned but not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._tensors: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """Returns the tensor and whether it was already known. The caller must not write to it."""
        known = self._tensors.get(key)
        if known is not None:
            self._tensors.move_to_end(key)
            return known, True
        tensor = compute()
        size = tensor.numel() * tensor.element_size()
        if size <= self._max_bytes:
            self._tensors[key] = tensor
            self._bytes += size
            while self._bytes > self._max_bytes:
                _, dropped = self._tensors.popitem(last=False)
                self._bytes -= dropped.numel() * dropped.element_size()
        return tensor, False

    def __len__(self) -> int:
        return len(self._tensors)
