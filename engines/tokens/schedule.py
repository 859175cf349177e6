"""How many tokens each step of a clip may spend."""

from __future__ import annotations

import math

from cinecat.engines.tokens.grid import Grid

RUNGS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
"""Keep ratios of single steps: engines are built for these sequence lengths and no others.

Requests come to 1, MERGED_RUNG and the lowest; the others are for the training of adapters.
"""

MULTIPLE = 8
"""What a merged step's tokens are rounded up to a multiple of: kernels and shards divide it."""

LEAST_KEEP_RATIO = 0.125

MERGED_RUNG = 0.25
"""Of merged steps where many are whole, so that there is something to allocate (docs/token-allocation.md)."""


def spread_steps(steps: int, runs: int) -> frozenset[int]:
    """`runs` of the steps: the first, the last two, and the others as evenly spread as they can be.

    What an approximate step spoils, later exact ones mend, and so the last two are exact: leaving out one of those
    alone costs wan-tiny's clips more than leaving out three others (docs/step-caching.md).

    Args:
        runs: 1 to `steps`; a single one is the first, two are the first and the last.
    """
    if runs == 1:
        return frozenset([0])
    if runs == 2:
        return frozenset([0, steps - 1])
    spread = (round(number * (steps - 2) / (runs - 2)) for number in range(runs - 1))
    return frozenset([*spread, steps - 1])


def rung_tokens(grid: Grid, rung: float) -> int:
    """Tokens of a step at a rung, within what the grid allows."""
    return min(grid.count, max(grid.least, math.ceil(grid.count * rung / MULTIPLE) * MULTIPLE))


def step_rungs(grid: Grid, steps: int, keep_ratio: float) -> tuple[float, ...]:
    """The rung of every step, so that their mean comes near to the keep ratio without exceeding it.

    Steps at full tokens are spread as those that run under step caching, so that between two of them few are merged: a
    merged one begins with what is carried on from the last two whole ones. All others are at MERGED_RUNG where that
    leaves half of the steps whole, rounded down, and else at the lowest rung: a whole step is worth more than tokens
    between, and where there is no whole step to be had for them, wan-tiny's clips are still no worse with fewer.

    Args:
        keep_ratio: above 0, at most 1, over all steps of the clip. Where it cannot be held, since the first step alone
            spends more, all other steps are at the lowest rung.
    """
    for rung in (MERGED_RUNG, RUNGS[-1]):
        # whole + (steps - whole) x merged <= keep_ratio x steps
        merged = rung_tokens(grid, rung) / grid.count
        whole = steps if merged == 1.0 else math.floor(steps * (keep_ratio - merged) / (1.0 - merged) + 1e-9)
        if whole >= steps // 2:
            break
    chosen = spread_steps(steps, min(steps, max(1, whole)))
    return tuple(1.0 if step in chosen else rung for step in range(steps))
