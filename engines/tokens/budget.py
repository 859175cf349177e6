"""How many tokens a clip spends, by a keep ratio or by the quality to hold. Free of torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.schedule import LEAST_KEEP_RATIO, rung_tokens, spread_steps, step_rungs

KEEP_RATIOS = (0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Of clips that hold a quality, one of these."""

PSNR_DB_AT_UNIT_DISTORTION = 30.0
PSNR_DB_PER_DECADE = 6.0
"""PSNR of merged clips to the uniform ones at the same seed, over what their plans lose. Guesses until they are fitted
to `cinecat bench tokens`, one model at a time: a target is a wish, not a promise.
"""


def step_tokens(grid: Grid, steps: int, keep_ratio: float, run_steps: int | None = None) -> tuple[int, ...]:
    """Tokens of every step of a clip, per row.

    Args:
        run_steps: how many steps run the model, the others spend none; None for all.
    """
    runs = spread_steps(steps, steps if run_steps is None else run_steps)
    rungs = enumerate(step_rungs(steps, keep_ratio))
    return tuple(rung_tokens(grid, rung) if step in runs else 0 for step, rung in rungs)


def least_keep_ratio(grid: Grid) -> float:
    """Of any single step."""
    return rung_tokens(grid, LEAST_KEEP_RATIO) / grid.count


def expected_psnr_db(distortion: float) -> float:
    """PSNR to the uniform result, in dB, that is to be expected of plans which lose that much.

    Args:
        distortion: squared deviation of the clean prediction from its tokens' means, as `Prices` weighs it, per patch;
            the mean over all steps.
    """
    if distortion <= 0.0:
        return math.inf
    return PSNR_DB_AT_UNIT_DISTORTION - PSNR_DB_PER_DECADE * math.log10(distortion)


def keep_ratio_for(grid: Grid, steps: int, target_psnr_db: float, distortion_at: Callable[[int], float]) -> float:
    """The smallest of KEEP_RATIOS that is expected to hold a quality; 1 when no other does.

    Args:
        target_psnr_db: PSNR to the uniform result, in dB.
        distortion_at: what a plan of so many tokens loses in total, for the content at hand.
    """
    for keep_ratio in KEEP_RATIOS:
        if expected_psnr_db(mean_distortion(grid, steps, keep_ratio, distortion_at)) >= target_psnr_db:
            return keep_ratio
    return 1.0


def mean_distortion(grid: Grid, steps: int, keep_ratio: float, distortion_at: Callable[[int], float]) -> float:
    """What the plans of a clip's steps lose, as `expected_psnr_db` takes it; arguments as those of `keep_ratio_for`."""
    spent = Counter(step_tokens(grid, steps, keep_ratio))
    return sum(count * distortion_at(tokens) for tokens, count in spent.items()) / (steps * grid.count)
