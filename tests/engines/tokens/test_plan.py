"""Token plans: partitions in a canonical form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan

GRIDS = st.builds(Grid, st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))


@st.composite
def plans(draw: st.DrawFn) -> TokenPlan:
    grid = draw(GRIDS)
    labels = draw(st.lists(st.integers(-3, 9), min_size=grid.count, max_size=grid.count))
    return TokenPlan.from_labels(grid, torch.tensor(labels))


@given(plans())
def test_every_patch_is_in_exactly_one_token(plan: TokenPlan) -> None:
    members = plan.members.flatten()
    assert sorted(members[members < plan.grid.count].tolist()) == list(range(plan.grid.count))
    assert int(plan.sizes.sum()) == plan.grid.count
    assert sum(size * count for size, count in plan.histogram.items()) == plan.grid.count


@given(plans())
def test_tokens_count_in_the_order_of_their_first_patches(plan: TokenPlan) -> None:
    firsts = plan.members[:, 0]
    assert torch.equal(firsts, firsts.sort().values)
    assert torch.equal(plan.leaders, firsts[plan.token_of])


@given(plans(), st.integers(1, 50))
def test_renamed_labels_give_an_equal_plan(plan: TokenPlan, factor: int) -> None:
    again = TokenPlan.from_labels(plan.grid, -factor * plan.token_of)
    assert again == plan
    assert hash(again) == hash(plan)


@given(plans())
def test_a_plan_survives_its_bytes(plan: TokenPlan) -> None:
    assert TokenPlan.from_bytes(plan.to_bytes()) == plan


@given(plans())
def test_means_and_positions_are_those_of_the_members(plan: TokenPlan) -> None:
    token = plan.tokens // 2
    expected = plan.grid.positions()[plan.token_of == token].mean(dim=0)
    torch.testing.assert_close(plan.positions[token], expected)


@given(plans())
def test_spread_means_have_themselves_as_means(plan: TokenPlan) -> None:
    values = torch.randn(2, plan.grid.count, 3, generator=torch.Generator().manual_seed(0))
    mean = plan.mean(values)
    torch.testing.assert_close(plan.mean(plan.spread(mean)), mean)


@given(GRIDS)
def test_the_uniform_plan_is_the_identity(grid: Grid) -> None:
    plan = TokenPlan.uniform(grid)
    assert plan.is_uniform
    assert plan.keep_ratio == 1.0
    assert torch.equal(plan.token_of, torch.arange(grid.count))
    assert torch.equal(plan.positions, grid.positions())


def test_different_partitions_differ() -> None:
    grid = Grid(1, 2, 2)
    assert TokenPlan.from_labels(grid, torch.tensor([0, 0, 1, 1])) != TokenPlan.from_labels(
        grid, torch.tensor([0, 1, 0, 1])
    )
    assert TokenPlan.uniform(Grid(1, 2, 2)) != TokenPlan.uniform(Grid(2, 1, 2))


@pytest.mark.parametrize("leaders", [[0, 0, 5, 0], [0, 2, 2, 0], [1, 1, 1, 1], [-1, 1, 2, 3], [0, 0, 1, 1], [0, 1, 2]])
def test_bytes_that_hold_no_partition_are_refused(leaders: list[int]) -> None:
    plan = TokenPlan(Grid(1, 2, 2), torch.tensor(leaders))
    with pytest.raises(ValueError, match="no partition"):
        TokenPlan.from_bytes(plan.to_bytes())


def test_bytes_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        TokenPlan.from_bytes(b"not a plan")


def test_labels_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        TokenPlan.from_labels(Grid(1, 2, 2), torch.zeros(5, dtype=torch.long))


def test_a_grid_without_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="grid"):
        Grid(0, 2, 2)
