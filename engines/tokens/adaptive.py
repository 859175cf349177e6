"""The token plans of one request, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from cinecat.engines.messages import Cat
from cinecat.engines.tokens import path
from cinecat.engines.tokens.allocation import Prices, Regions
from cinecat.engines.tokens.budget import keep_ratio_for, step_tokens
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan

FIRST_FRAME_WEIGHT = 16.0
"""On what merging loses in the first latent frame, which is known and which all others look at."""


def price(grid: Grid, clean: Tensor) -> Prices:
    """Prices clean latents [1, 16, T, H, W], float32, as requests have them priced."""
    return Prices.of(Regions.of(grid, str(clean.device)), path.to_patches(clean)[0], FIRST_FRAME_WEIGHT)


def motion_of(clean: Tensor) -> float:
    """How much clean latents [1, 16, T, H, W] change from one latent frame to the next: the mean square of it.

    The first frame, which stands for one frame of the clip and not four, counts where there are no more than two.
    """
    frames = clean[:, :, 1:] if clean.shape[2] > 2 else clean
    return float(frames.diff(dim=2).square().mean()) if frames.shape[2] > 1 else 0.0


@dataclass
class AdaptiveTokens:
    """Plans the tokens of a clip's steps from what is expected of its clean latents.

    Attributes:
        grid: of the clip's patches.
        steps: of the clip.
        keep_ratio: mean over all steps, above 0, at most 1; with a target, 1 until the first step is done.
        target_psnr_db: PSNR to the uniform result, in dB, from which the keep ratio follows after the first step, which
            has all tokens; None where the keep ratio is given.
        spent: tokens of each step so far.
        seconds: spent on planning.
    """

    grid: Grid
    steps: int
    keep_ratio: float = 1.0
    target_psnr_db: float | None = None
    spent: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def of(cls, cat: Cat, grid: Grid, steps: int) -> AdaptiveTokens:
        """As a request asks for them."""
        return cls(grid, steps, 1.0 if cat.keep_ratio is None else cat.keep_ratio, cat.target_psnr_db)

    @property
    def coming(self) -> int:
        """Tokens of the coming step."""
        return step_tokens(self.grid, self.steps, self.keep_ratio)[len(self.spent)]

    @property
    def merges(self) -> bool:
        """Whether patches share tokens in the coming step; in the first they never do."""
        return self.coming < self.grid.count

    def plan(self, expected: Tensor) -> TokenPlan | None:
        """The plan of the coming step; None where every patch is a token.

        Args:
            expected: of the clean latents, float32 [1, 16, T, H, W].
        """
        if not self.merges:
            return None
        with self._timed():
            return price(self.grid, expected).allocate(self.coming)

    def observed(self, clean: Tensor, tokens: int) -> AdaptiveTokens:
        """What `observe` makes of it, which itself stays as it is."""
        later = replace(self, spent=list(self.spent))
        later.observe(clean, tokens)
        return later

    def observe(self, clean: Tensor, tokens: int) -> None:
        """Learns from a step that is done.

        Args:
            clean: latents as the last step at full tokens predicted them, after guidance, float32 [1, 16, T, H, W].
            tokens: that it spent.
        """
        self.spent.append(tokens)
        if self.target_psnr_db is not None and len(self.spent) == 1:
            with self._timed():
                self.keep_ratio = keep_ratio_for(self.grid, self.steps, self.target_psnr_db, motion_of(clean))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
