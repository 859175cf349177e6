"""The backend `torch`: the stack as it is, run eagerly. It needs no build and takes every shape."""

from __future__ import annotations

from torch import Tensor

from cinecat.engines.backends.contract import StackInputs
from cinecat.engines.backends.stack import WanStack


class TorchEngine:
    """Runs a stack eagerly."""

    name = "torch"

    def __init__(self, stack: WanStack) -> None:
        self._stack = stack

    def covers(self, inputs: StackInputs) -> bool:
        return True

    def __call__(self, inputs: StackInputs) -> Tensor:
        output: Tensor = self._stack(inputs)
        return output
