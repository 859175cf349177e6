"""Rival partitions: valid, exact in their budget, the same every time, and each what its name says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan
from cinecat.engines.tokens.rivals import EQUAL_TOKENS, StaticThenClusters, fixed_grid, random_regions, similarity

GRIDS = st.builds(Grid, st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
NAMES = st.sampled_from(sorted(EQUAL_TOKENS))
KINDS = st.sampled_from(["noise", "flat", "still"])


def content(grid: Grid, kind: str) -> Tensor:
    """Clean content of every patch, [grid.count, 4]."""
    noise = torch.randn(grid.frames, grid.frame_count, 4, generator=torch.Generator().manual_seed(grid.count))
    match kind:
        case "flat":
            noise = torch.ones_like(noise)
        case "still":
            noise = noise[:1].expand(grid.frames, -1, -1)
    return noise.reshape(-1, 4)


def loss(plan: TokenPlan, values: Tensor) -> float:
    return float((values - plan.spread(plan.mean(values[None]))[0]).square().sum())


@given(GRIDS, NAMES, KINDS, st.floats(0, 1))
@settings(max_examples=60)
def test_every_budget_is_spent_exactly_on_a_partition(grid: Grid, name: str, kind: str, share: float) -> None:
    least = max(grid.frames + 2, grid.frames * -(-grid.height // 2) * -(-grid.width // 2))
    budget = min(grid.count, least + round(share * (grid.count - least)))
    values = content(grid, kind)
    first, second = (EQUAL_TOKENS[name](grid, values.clone(), budget) for _ in range(2))
    assert first.tokens == budget
    assert TokenPlan.from_bytes(first.to_bytes()) == second


@pytest.mark.parametrize("name", sorted(EQUAL_TOKENS))
def test_the_first_frame_stays_fine_where_the_budget_lets_it(name: str) -> None:
    grid = Grid(5, 4, 4)
    plan = EQUAL_TOKENS[name](grid, content(grid, "noise"), 40)
    assert plan.sizes[:16].tolist() == [1] * 16


def test_the_fixed_grid_is_blind_and_even() -> None:
    grid = Grid(5, 8, 8)
    one, other = (fixed_grid(grid, content(grid, kind), 192) for kind in ("noise", "flat"))
    assert one == other
    assert one.sizes[64:].tolist() == [2] * 128  # pairs over time


def test_random_regions_follow_their_seed() -> None:
    grid = Grid(5, 8, 8)
    values = content(grid, "noise")
    assert random_regions(0)(grid, values, 160) != random_regions(1)(grid, values, 160)


def test_similarity_merges_what_is_alike_wherever_it_is() -> None:
    grid = Grid(1, 1, 6)
    values = torch.tensor([0.0, 5.0, 9.0, 0.1, 20.0, 30.0])[:, None]
    assert similarity(grid, values, 5).leaders.tolist() == [0, 1, 2, 0, 4, 5]


def test_similarity_halves_again_until_the_budget_is_met() -> None:
    grid = Grid(1, 4, 4)
    assert similarity(grid, content(grid, "noise"), 3).tokens == 3


def test_static_places_merge_over_time_at_no_loss() -> None:
    grid = Grid(5, 4, 4)
    values = content(grid, "still")
    assert loss(StaticThenClusters()(grid, values, 32), values) == pytest.approx(0.0, abs=1e-4)


def test_moving_places_cluster_within_their_frame() -> None:
    grid = Grid(5, 4, 4)
    plan = StaticThenClusters(still=-1.0)(grid, content(grid, "noise"), 40)
    frame = torch.arange(grid.count) // 16
    assert all(len(frame[plan.token_of == token].unique()) == 1 for token in range(plan.tokens))


@pytest.mark.parametrize("name", sorted(EQUAL_TOKENS))
@pytest.mark.parametrize("budget", [0, 321])
def test_a_budget_out_of_reach_is_refused(name: str, budget: int) -> None:
    grid = Grid(5, 8, 8)
    with pytest.raises(ValueError, match="budget"):
        EQUAL_TOKENS[name](grid, content(grid, "noise"), budget)
