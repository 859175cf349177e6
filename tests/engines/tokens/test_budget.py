"""How many tokens a clip spends, by a ratio or by the quality to hold."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.tokens.allocation import Regions
from cinecat.engines.tokens.budget import (
    KEEP_RATIOS,
    PSNR_DB_PER_DECADE_OF_GAP,
    PSNR_DB_PER_DECADE_OF_MOTION,
    expected_psnr_db,
    keep_ratio_for,
    least_keep_ratio,
    step_tokens,
)
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.schedule import step_rungs

GRIDS = st.builds(Grid, st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
TINY = Grid(5, 8, 8)
LARGE = Grid(21, 30, 52)


@given(GRIDS)
def test_the_least_is_a_token_for_every_region(grid: Grid) -> None:
    assert grid.least == len(Regions.of(grid).patches)


@given(GRIDS, st.integers(1, 20), st.floats(0.05, 1.0))
def test_every_step_has_what_its_grid_takes(grid: Grid, steps: int, keep_ratio: float) -> None:
    tokens = step_tokens(grid, steps, keep_ratio)
    assert len(tokens) == steps
    assert tokens[0] == grid.count
    assert all(grid.count * least_keep_ratio(grid) <= spent <= grid.count for spent in tokens)


@given(GRIDS, st.integers(2, 20), st.floats(0.05, 1.0))
def test_a_ratio_that_can_be_held_is_not_exceeded(grid: Grid, steps: int, keep_ratio: float) -> None:
    spent = step_tokens(grid, steps, keep_ratio)
    least = grid.count + (steps - 1) * round(grid.count * least_keep_ratio(grid))
    assert sum(spent) <= max(least, keep_ratio * steps * grid.count + 1e-6)


def test_a_grid_is_never_merged_below_its_regions() -> None:
    assert min(step_tokens(TINY, 8, 0.1)) == TINY.least == 48
    assert least_keep_ratio(TINY) == 0.15
    assert least_keep_ratio(Grid(1, 2, 2)) == 1.0


def test_what_moves_and_what_lies_apart_costs_as_many_decibels_as_fitted() -> None:
    def expected(keep_ratio: float, motion: float) -> float:
        return expected_psnr_db(LARGE, 12, keep_ratio, motion)

    assert expected(0.5, 0.1) - expected(0.5, 1.0) == pytest.approx(PSNR_DB_PER_DECADE_OF_MOTION)
    wider = math.log10(step_rungs(LARGE, 12, 0.75).count(1.0) / step_rungs(LARGE, 12, 0.375).count(1.0))
    assert expected(0.75, 0.1) - expected(0.375, 0.1) == pytest.approx(PSNR_DB_PER_DECADE_OF_GAP * wider)
    assert expected(0.5, 0.0) == expected(1.0, 0.1) == math.inf


def test_a_higher_target_and_more_motion_take_a_higher_ratio_until_nothing_is_merged() -> None:
    ratios = [keep_ratio_for(LARGE, 12, target, 0.03) for target in (15.0, 35.0, 40.0, 45.0, 60.0)]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (KEEP_RATIOS[0], 1.0)
    assert len(set(ratios)) > 2
    assert keep_ratio_for(LARGE, 12, 40.0, 0.0) == KEEP_RATIOS[0]
    assert keep_ratio_for(LARGE, 12, 40.0, 0.003) < keep_ratio_for(LARGE, 12, 40.0, 0.3)


def test_the_front_reckons_without_torch() -> None:
    code = "import sys, cinecat.engines.tokens.budget; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"
