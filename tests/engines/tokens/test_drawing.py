"""A plan drawn over its frame."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cinecat.engines.tokens.drawing import draw_plan
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan

GRID = Grid(3, 2, 2)
GREY = np.full((64, 64, 3), 100, np.uint8)

# The first latent frame fine, then all of both later ones but the lower right column in one token.
PLAN = TokenPlan.from_labels(GRID, torch.tensor([0, 1, 2, 3, 4, 4, 4, 5, 4, 4, 4, 5]))


def test_two_latent_frames_lie_side_by_side_with_white_between() -> None:
    picture = draw_plan(PLAN, GREY, (0, 2))
    assert (picture.shape, picture.dtype) == ((64, 64 + 8 + 64, 3), np.uint8)
    assert (picture[:, 64:72] == 255).all()


def test_a_patch_of_its_own_keeps_its_colour_and_merged_ones_are_tinted_by_size() -> None:
    fine, merged = draw_plan(PLAN, GREY, (0,)), draw_plan(PLAN, GREY, (1,))
    assert (fine[10, 10] == 100).all()
    assert (merged[10, 10] != 100).any()
    assert (merged[50, 50] != 100).any()
    assert (merged[10, 10] != merged[50, 50]).any()
    assert (merged[10, 10] == merged[50, 10]).all()


def test_lines_part_tokens_and_nothing_else() -> None:
    fine, merged = draw_plan(PLAN, GREY, (0,)), draw_plan(PLAN, GREY, (1,))
    assert (fine[32] == 255).all()
    assert (fine[:, 32] == 255).all()
    assert (merged[32, 32:] == 255).all()
    assert (merged[32, :32] != 255).any()


def test_small_patches_are_enlarged() -> None:
    assert draw_plan(PLAN, GREY[:32, :32], (0,)).shape == (64, 64, 3)


def test_a_frame_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="64x63 does not fit 2x2 patches"):
        draw_plan(PLAN, GREY[:63], (0,))
