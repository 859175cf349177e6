"""The token plans of one request, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cinecat.engines.messages import Cat
from cinecat.engines.tokens import path
from cinecat.engines.tokens.allocation import Prices, Regions
from cinecat.engines.tokens.budget import keep_ratio_for, step_tokens
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan

FIRST_FRAME_WEIGHT = 4.0
"""On what merging loses in the first latent frame, which is known and which all others look at."""

_PRICE_BYTES = 200
"""Of a region's `Prices`: four levels, tokens and distortions, and three halvings with what they have spent and lost.
"""


def price(grid: Grid, clean: Tensor) -> Prices:
    """Prices clean latents [1, 16, T, H, W], float32, as requests have them priced."""
    return Prices.of(Regions.of(grid, str(clean.device)), path.to_patches(clean)[0], FIRST_FRAME_WEIGHT)


@dataclass
class AdaptiveTokens:
    """Plans the tokens of a clip's steps from its running clean prediction.

    Attributes:
        grid: of the clip's patches.
        steps: of the clip.
        keep_ratio: mean over all steps, above 0, at most 1; with a target, 1 until the first step is done.
        target_psnr_db: PSNR to the uniform result, in dB, from which the keep ratio follows after the first step, which
            has all tokens; None where the keep ratio is given.
        prediction: of the clean latents by the last step, float32 [1, 16, T, H, W]; None before the first.
        spent: tokens of each step so far.
        seconds: spent on planning.
    """

    grid: Grid
    steps: int
    keep_ratio: float = 1.0
    target_psnr_db: float | None = None
    prediction: Tensor | None = None
    spent: list[int] = field(default_factory=list)
    seconds: float = 0.0
    _prices: Prices | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, cat: Cat, grid: Grid, steps: int) -> AdaptiveTokens:
        """As a request asks for them."""
        return cls(grid, steps, 1.0 if cat.keep_ratio is None else cat.keep_ratio, cat.target_psnr_db)

    @property
    def coming(self) -> int:
        """Tokens of the coming step."""
        return step_tokens(self.grid, self.steps, self.keep_ratio)[len(self.spent)]

    def state_bytes(self, latents: Tensor) -> int:
        """What is held between two steps, for latents of a size: the prediction and its prices."""
        regions = len(Regions.of(self.grid, str(latents.device)).patches)
        return latents.numel() * torch.float32.itemsize + regions * _PRICE_BYTES

    def plan(self) -> TokenPlan | None:
        """The plan of the coming step; None where every patch is a token."""
        tokens = self.coming
        if tokens >= self.grid.count or self.prediction is None:
            return None
        with self._timed():
            return self._priced(self.prediction).allocate(tokens)

    def observed(self, latents: Tensor, velocity: Tensor, sigma: float, tokens: int) -> AdaptiveTokens:
        """What `observe` makes of it, which itself stays as it is."""
        later = AdaptiveTokens(
            self.grid, self.steps, self.keep_ratio, self.target_psnr_db, None, list(self.spent), self.seconds
        )
        later.observe(latents, velocity, sigma, tokens)
        return later

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
        self._prices = None
        if self.target_psnr_db is not None and len(self.spent) == 1:
            with self._timed():
                prices = self._priced(self.prediction)
                self.keep_ratio = keep_ratio_for(self.grid, self.steps, self.target_psnr_db, prices.distortion_at)

    def _priced(self, prediction: Tensor) -> Prices:
        """Of the last prediction; the choice of a keep ratio and the plan after it share them."""
        if self._prices is None:
            self._prices = price(self.grid, prediction)
        return self._prices

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
