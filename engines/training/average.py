"""Weights averaged over steps, and the best of them."""

from __future__ import annotations

import copy
import math
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class BestAverage(Generic[Model]):
    """A model's weights averaged exponentially over its steps, and the best average so far by held-out loss.

    Args:
        decay: longest memory; the first steps forget faster, so that the start weighs nothing.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        self._best = math.inf
        self._best_weights = copy.deepcopy(self.model.state_dict())

    @torch.no_grad()
    def follow(self, model: Model, step: int) -> None:
        """Takes in the weights after `step` steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for kept, new in zip(self.model.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)

    def offer(self, loss: float) -> None:
        """Keeps the current average if no earlier one had a lower held-out loss."""
        if loss < self._best:
            self._best, self._best_weights = loss, copy.deepcopy(self.model.state_dict())

    def give(self, model: Model) -> None:
        """Puts the best average into a model."""
        model.load_state_dict(self._best_weights)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.model.state_dict(), "best": self._best, "best_weights": self._best_weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["average"])
        self._best, self._best_weights = float(state["best"]), state["best_weights"]
