"""How many tokens each step of a clip may spend."""

from __future__ import annotations

import math

from cinecat.engines.tokens.grid import Grid

RUNGS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
"""Keep ratios of single steps: engines are built for these sequence lengths and no others."""

MULTIPLE = 8
"""What a merged step's tokens are rounded up to a multiple of: kernels and shards divide it."""

LEAST_KEEP_RATIO = 0.125


def spread_steps(steps: int, runs: int) -> frozenset[int]:
    """`runs` of the steps, the first and the last among them, as evenly spread as they can be.

    Args:
        runs: 1 to `steps`; a single one is the first.
    """
    if runs == 1:
        return frozenset([0])
    return frozenset(round(number * (steps - 1) / (runs - 1)) for number in range(runs))


def rung_tokens(grid: Grid, rung: float) -> int:
    """Tokens of a step at a rung, within what the grid allows."""
    return min(grid.count, max(grid.least, math.ceil(grid.count * rung / MULTIPLE) * MULTIPLE))


def step_rungs(steps: int, keep_ratio: float) -> tuple[float, ...]:
    """The rung of every step, so that their mean comes as near to the keep ratio as it can without exceeding it.

    The first step has all tokens, since there is no prediction to unmerge by before it, and the last ones have: what
    merging spoils early, later steps at full tokens mend, and what it spoils late stays (docs/token-allocation.md).
    Between them all steps are at the highest rung that leaves a quarter of the steps whole, or at the lowest of all.

    Args:
        keep_ratio: above 0, at most 1, over all steps of the clip. Where it cannot be held, since the first step alone
            spends more, all other steps are at the lowest rung.
    """
    best = [1.0] * steps
    if keep_ratio >= 1.0:
        return tuple(best)
    for rung in RUNGS[1:]:
        # merged x rung + (steps - merged) <= keep_ratio x steps
        merged = min(steps - 1, math.ceil(steps * (1.0 - keep_ratio) / (1.0 - rung) - 1e-9))
        best = [1.0] + [rung] * merged + [1.0] * (steps - 1 - merged)
        if merged <= steps - 1 - steps // 4 and sum(best) <= keep_ratio * steps + 1e-9:
            break
    return tuple(best)
