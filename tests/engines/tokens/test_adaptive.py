"""One request's plans, step by step."""

from __future__ import annotations

import torch

from cinecat.engines.messages import Cat
from cinecat.engines.tokens.adaptive import AdaptiveTokens
from cinecat.engines.tokens.budget import KEEP_RATIOS, step_tokens
from cinecat.engines.tokens.grid import Grid

GRID = Grid(5, 8, 8)
SHAPE = (1, 16, 5, 16, 16)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def after_the_first_step(tokens: AdaptiveTokens, clean: torch.Tensor) -> AdaptiveTokens:
    """Once a full step has predicted `clean`."""
    assert tokens.coming == GRID.count
    tokens.observe(clean, GRID.count)
    return tokens


def test_the_second_step_spends_its_tokens_where_the_prediction_has_detail() -> None:
    clean = torch.zeros(SHAPE)
    clean[..., :8] = NOISE[..., :8]
    tokens = after_the_first_step(AdaptiveTokens.of(Cat(keep_ratio=0.75), GRID, 8), clean)
    plan = tokens.plan(clean)
    assert plan is not None
    assert plan.tokens == step_tokens(GRID, 8, 0.75)[1]
    sizes = plan.sizes[plan.token_of].view(5, 8, 8)
    assert sizes[..., :4].float().mean() < sizes[..., 4:].float().mean()
    assert tokens.seconds > 0


def test_a_still_flat_clip_gets_fewer_tokens_for_a_quality_than_a_busy_one() -> None:
    flat, busy = (
        after_the_first_step(AdaptiveTokens.of(Cat(target_psnr_db=30.0), GRID, 8), clean)
        for clean in (torch.zeros(SHAPE), 100.0 * NOISE)
    )
    assert (flat.keep_ratio, busy.keep_ratio) == (KEEP_RATIOS[0], 1.0)
    assert busy.plan(NOISE) is None
    assert flat.plan(NOISE) is not None


def test_the_choice_of_a_ratio_is_made_once() -> None:
    tokens = after_the_first_step(AdaptiveTokens.of(Cat(target_psnr_db=30.0), GRID, 8), torch.zeros(SHAPE))
    chosen = tokens.keep_ratio
    tokens.observe(NOISE, 100)
    assert tokens.keep_ratio == chosen
