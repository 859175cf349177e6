"""How many tokens a clip spends, by a keep ratio or by the quality to hold. Free of torch."""

from __future__ import annotations

import math

from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.schedule import LEAST_KEEP_RATIO, rung_tokens, spread_steps, step_rungs

KEEP_RATIOS = (0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Of clips that hold a quality, one of these."""

PSNR_DB_AT_UNIT_MOTION = 34.7
PSNR_DB_PER_DECADE_OF_MOTION = 14.5
PSNR_DB_PER_DECADE_OF_GAP = 28.8
PSNR_DB_OFF = 7.3
"""PSNR of wan-tiny's clips to the uniform ones at the same seed, over how much moves in them and how far their whole
steps lie apart, and the standard deviation of what that misses: fitted by `cinecat bench tokens` (docs/benchmarks). It
cannot see in a first prediction what will enter later on: a target is a wish, not a promise.
"""


def step_tokens(grid: Grid, steps: int, keep_ratio: float, run_steps: int | None = None) -> tuple[int, ...]:
    """Tokens of every step of a clip, per row.

    Args:
        run_steps: how many steps run the model, the others spend none; None for all.
    """
    runs = spread_steps(steps, steps if run_steps is None else run_steps)
    rungs = enumerate(step_rungs(grid, steps, keep_ratio))
    return tuple(rung_tokens(grid, rung) if step in runs else 0 for step, rung in rungs)


def least_keep_ratio(grid: Grid) -> float:
    """Of any single step."""
    return rung_tokens(grid, LEAST_KEEP_RATIO) / grid.count


def expected_psnr_db(grid: Grid, steps: int, keep_ratio: float, motion: float) -> float:
    """PSNR to the uniform result, in dB, that is to be expected of a clip.

    What a merged step begins with is carried on over the gap between whole steps, and goes wrong where things move;
    detail that stands still costs nothing, however fine.

    Args:
        motion: as of `adaptive.motion_of`.
    """
    whole = step_rungs(grid, steps, keep_ratio).count(1.0)
    if motion <= 0.0 or whole == steps:
        return math.inf
    gap = PSNR_DB_PER_DECADE_OF_GAP * math.log10(steps / whole)
    return PSNR_DB_AT_UNIT_MOTION - PSNR_DB_PER_DECADE_OF_MOTION * math.log10(motion) - gap


def keep_ratio_for(grid: Grid, steps: int, target_psnr_db: float, motion: float) -> float:
    """The smallest of KEEP_RATIOS that should hold a quality, with a standard deviation to spare; else 1.

    Args:
        target_psnr_db: PSNR to the uniform result, in dB.
        motion: of the content at hand, as of `adaptive.motion_of`.
    """
    for keep_ratio in KEEP_RATIOS:
        if expected_psnr_db(grid, steps, keep_ratio, motion) >= target_psnr_db + PSNR_DB_OFF:
            return keep_ratio
    return 1.0
