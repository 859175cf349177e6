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
    PSNR_DB_AT_UNIT_DISTORTION,
    PSNR_DB_PER_DECADE,
    expected_psnr_db,
    keep_ratio_for,
    least_keep_ratio,
    step_tokens,
)
from cinecat.engines.tokens.grid import Grid

GRIDS = st.builds(Grid, st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
TINY = Grid(5, 8, 8)


@given(GRIDS)
def test_the_least_is_a_token_for_every_region(grid: Grid) -> None:
    assert grid.least == len(Regions.of(grid).patches)


@given(GRIDS, st.integers(1, 20), st.floats(0.05, 1.0))
def test_every_step_has_what_its_grid_takes(grid: Grid, steps: int, keep_ratio: float) -> None:
    tokens = step_tokens(grid, steps, keep_ratio)
    assert len(tokens) == steps
    assert tokens[0] == grid.count
    assert all(grid.count * least_keep_ratio(grid) <= spent <= grid.count for spent in tokens)


def test_a_ratio_that_can_be_held_is_not_exceeded() -> None:
    assert sum(step_tokens(TINY, 8, 0.625)) <= 0.625 * 8 * TINY.count


def test_a_grid_is_never_merged_below_its_regions() -> None:
    assert min(step_tokens(TINY, 8, 0.1)) == TINY.least == 48
    assert least_keep_ratio(TINY) == 0.15
    assert least_keep_ratio(Grid(1, 2, 2)) == 1.0


def test_ten_times_the_distortion_costs_as_many_decibels_as_fitted() -> None:
    assert expected_psnr_db(0.1) - expected_psnr_db(1.0) == pytest.approx(PSNR_DB_PER_DECADE)
    assert expected_psnr_db(1.0) == PSNR_DB_AT_UNIT_DISTORTION
    assert expected_psnr_db(0.0) == math.inf


def test_a_higher_target_takes_a_higher_ratio_until_nothing_is_merged() -> None:
    def loss(tokens: int) -> float:
        return TINY.count * (1.0 - tokens / TINY.count)

    ratios = [keep_ratio_for(TINY, 8, expected_psnr_db(lost), loss) for lost in (2.0, 0.5, 0.25, 0.01)]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (KEEP_RATIOS[0], 1.0)
    assert ratios[1] < ratios[2] < 1.0


def test_a_clip_without_redundancy_keeps_more_than_a_still_one() -> None:
    assert keep_ratio_for(TINY, 8, 30.0, lambda tokens: 0.0) == KEEP_RATIOS[0]
    assert keep_ratio_for(TINY, 8, 30.0, lambda tokens: 1e9) == 1.0


def test_the_front_reckons_without_torch() -> None:
    code = "import sys, cinecat.engines.tokens.budget; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"
