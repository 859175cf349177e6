"""The allocation: exact, never worse with more tokens, and spent where the content is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cinecat.engines.tokens.allocation import Prices, Regions
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan

GRIDS = st.builds(Grid, st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
KINDS = st.sampled_from(["noise", "flat", "corner", "cut", "steps"])


def content(grid: Grid, kind: str) -> Tensor:
    """Clean content of every patch, [grid.count, 4]."""
    generator = torch.Generator().manual_seed(grid.count)
    values = torch.zeros(grid.frames, grid.height, grid.width, 4)
    noise = torch.randn(values.shape, generator=generator)
    match kind:
        case "noise":
            values = noise
        case "corner":
            values[:, : (grid.height + 1) // 2, : (grid.width + 1) // 2] = 1.0
            values[:, 0, 0] = noise[:, 0, 0]
        case "cut":
            values[grid.frames // 2 :] = noise[:1]
        case "steps":
            values = (noise * 2).round()
    return values.view(-1, 4)


def loss(plan: TokenPlan, values: Tensor) -> float:
    """Squared deviation from the tokens' means, reckoned the long way."""
    return float((values - plan.spread(plan.mean(values[None]))[0]).square().sum())


@given(GRIDS, KINDS, st.floats(0, 1))
def test_the_budget_is_spent_exactly(grid: Grid, kind: str, share: float) -> None:
    prices = Prices.of(Regions.of(grid), content(grid, kind))
    budget = prices.least + round(share * (grid.count - prices.least))
    plan = prices.allocate(budget)
    assert plan.tokens == budget
    assert TokenPlan.from_labels(grid, plan.leaders) == plan


@given(GRIDS, KINDS)
@settings(deadline=None, max_examples=25)
def test_more_tokens_never_lose_more(grid: Grid, kind: str) -> None:
    values = content(grid, kind)
    prices = Prices.of(Regions.of(grid), values)
    losses = [loss(prices.allocate(budget), values) for budget in range(prices.least, grid.count + 1)]
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(losses))
    assert losses[-1] == 0.0


@given(GRIDS, KINDS)
def test_all_tokens_are_the_uniform_plan(grid: Grid, kind: str) -> None:
    assert Prices.of(Regions.of(grid), content(grid, kind)).allocate(grid.count) == TokenPlan.uniform(grid)


@given(GRIDS, KINDS, st.floats(0, 1))
def test_the_same_content_gives_the_same_plan(grid: Grid, kind: str, share: float) -> None:
    values = content(grid, kind)
    least = Prices.of(Regions.of(grid), values).least
    budget = least + round(share * (grid.count - least))
    first, second = (Prices.of(Regions.of(grid), values.clone()).allocate(budget) for _ in range(2))
    assert first == second


@given(GRIDS, KINDS)
@settings(deadline=None, max_examples=25)
def test_a_level_loses_what_its_plan_loses(grid: Grid, kind: str) -> None:
    values = content(grid, kind)
    prices = Prices.of(Regions.of(grid), values)
    assert loss(prices.allocate(prices.least), values) == pytest.approx(
        float(prices.distortion[:, 0].sum()), rel=1e-4, abs=1e-4
    )


@given(GRIDS, KINDS)
@settings(deadline=None, max_examples=25)
def test_the_distortion_falls_with_the_budget_to_nothing(grid: Grid, kind: str) -> None:
    values = content(grid, kind)
    prices = Prices.of(Regions.of(grid), values)
    bought = sorted({prices.least, *prices._spent.tolist()})
    lost = [loss(prices.allocate(budget), values) for budget in bought]
    assert all(later <= earlier + 1e-3 for earlier, later in itertools.pairwise(lost))
    assert lost[-1] == pytest.approx(0.0, abs=1e-3)


def test_no_token_crosses_a_region_or_leaves_the_first_frame() -> None:
    grid = Grid(4, 5, 3)
    plan = Prices.of(Regions.of(grid), content(grid, "noise")).allocate(Regions.of(grid).patches.shape[0])
    expected = Regions.of(grid)
    for patches in expected.patches:
        inside = patches[patches < grid.count]
        assert len(plan.token_of[inside].unique()) == 1
    assert plan.tokens == (1 + 2) * 3 * 2
    assert set(plan.token_of[: grid.frame_count].tolist()).isdisjoint(plan.token_of[grid.frame_count :].tolist())


def test_tokens_go_where_the_detail_is() -> None:
    grid = Grid(5, 8, 8)
    values = torch.zeros(5, 8, 8, 4)
    values[1:3, :2, :2] = torch.randn(2, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    prices = Prices.of(Regions.of(grid), values.view(-1, 4))
    plan = prices.allocate(prices.least + 7)
    fine = (plan.sizes == 1)[plan.token_of].view(5, 8, 8)
    assert bool(fine[1:3, :2, :2].all())
    assert int(fine.sum()) == 8


def test_what_does_not_change_in_time_merges_over_time_first() -> None:
    grid = Grid(3, 4, 4)
    values = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).expand(3, 4, 4, 4).reshape(-1, 4)
    plan = Prices.of(Regions.of(grid), values).allocate(32)
    assert loss(plan, values) == pytest.approx(0.0, abs=1e-5)


def test_the_first_frame_keeps_its_tokens_when_its_loss_weighs_more() -> None:
    grid = Grid(5, 8, 8)
    prices = Prices.of(Regions.of(grid), content(grid, "noise"), first_frame_weight=1e6)
    assert prices.allocate(160).sizes[:64].tolist() == [1] * 64


@pytest.mark.parametrize("budget", [0, 15, 321])
def test_a_budget_out_of_reach_is_refused(budget: int) -> None:
    prices = Prices.of(Regions.of(Grid(5, 8, 8)), content(Grid(5, 8, 8), "noise"))
    with pytest.raises(ValueError, match="budget"):
        prices.allocate(budget)
