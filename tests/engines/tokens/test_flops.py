"""The formula's figures are those of the design."""

from __future__ import annotations

import pytest

from cinecat.engines.tokens.flops import WAN_14B, forward_flops, grid_of, step_flops


@pytest.mark.parametrize(
    ("size", "tokens", "petaflop"),
    [((832, 480), 32_760, 1.8), ((1280, 720), 75_600, 6.8), ((3840, 2160), 680_400, 400)],
)
def test_the_14b_layout_costs_what_the_design_says(size: tuple[int, int], tokens: int, petaflop: float) -> None:
    grid = grid_of(*size, 81)
    assert grid.count == tokens
    assert step_flops(WAN_14B, tokens) / 1e15 == pytest.approx(petaflop, rel=0.07)


def test_half_the_tokens_cost_half_the_linears_and_a_quarter_of_attention() -> None:
    linear, attention = forward_flops(WAN_14B, 1000)
    assert forward_flops(WAN_14B, 500) == (linear / 2, attention / 4)


@pytest.mark.parametrize(("size", "field"), [((100, 64, 17), "size"), ((64, 64, 16), "frames"), ((0, 64, 17), "size")])
def test_a_clip_that_is_no_grid_is_refused(size: tuple[int, int, int], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        grid_of(*size)
