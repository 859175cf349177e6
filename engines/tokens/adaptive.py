"""The token plans of one request, step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cinecat.engines.tokens import path
from cinecat.engines.tokens.allocation import Prices, Regions
from cinecat.engines.tokens.plan import Grid, TokenPlan
from cinecat.engines.tokens.schedule import rung_tokens, step_rungs

FIRST_FRAME_WEIGHT = 4.0
"""On what merging loses in the first latent frame, which is known and which all others look at."""


@dataclass
class AdaptiveTokens:
    """Plans the tokens of a clip's steps from its running clean prediction.

    Attributes:
        grid: of the clip's patches.
        steps: of the clip.
        keep_ratio: mean over all steps, above 0, at most 1.
        prediction: of the clean latents by the last step, float32 [1, 16, T, H, W]; None before the first.
        spent: tokens of each step so far.
        seconds: spent on planning.
    """

    grid: Grid
    steps: int
    keep_ratio: float
    prediction: Tensor | None = None
    spent: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def plan(self) -> TokenPlan | None:
        """The plan of the coming step; None where every patch is a token."""
        rung = step_rungs(self.steps, self.keep_ratio)[len(self.spent)]
        if rung >= 1.0 or self.prediction is None:
            return None
        started = time.perf_counter()
        regions = Regions.of(self.grid, str(self.prediction.device))
        prices = Prices.of(regions, path.to_patches(self.prediction)[0], FIRST_FRAME_WEIGHT)
        plan = prices.allocate(max(prices.least, rung_tokens(self.grid, rung)))
        self.seconds += time.perf_counter() - started
        return None if plan.is_uniform else plan

    def observe(self, latents: Tensor, velocity: Tensor, sigma: float, tokens: int) -> None:
        """Learns from a step that is done.

        Args:
            latents: before the step, [1, 16, T, H, W].
            velocity: of the step, after guidance.
            sigma: of the step.
            tokens: that it spent.
        """
        self.prediction = (latents - sigma * velocity).to(torch.float32)
        self.spent.append(tokens)
