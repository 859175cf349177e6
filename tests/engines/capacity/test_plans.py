"""Which layouts there are for some cards, and where doubling them stops paying."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.capacity.memory import MemoryModel
from cinecat.engines.capacity.plans import Plan, Planner, Stop, families, layouts
from cinecat.engines.capacity.speeds import Speeds
from cinecat.engines.capacity.work import clip_work
from cinecat.engines.memory_plan import Clip, ModelSizes
from cinecat.engines.sharding.layout import MOST_RANKS, Layout
from tests.engines.capacity.samples import SPEEDS, WORK

CARD = 80 * 2**30


@pytest.fixture(scope="module")
def memory() -> MemoryModel:
    return MemoryModel(_sizes(), Clip(832, 480, 81), WORK, torch.bfloat16, 8, 32)


@cache
def _sizes() -> ModelSizes:
    sizes = ModelSizes.published("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
    assert sizes is not None
    return sizes


def planner(memory: MemoryModel, speeds: Speeds = SPEEDS, cards: int = 8, spread: bool = False) -> Planner:
    return Planner(WORK, memory, speeds, cards, CARD, spread)


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 12, 40]), st.sampled_from([1, 2]))
def test_layouts_share_out_the_cards_and_suit_the_heads(cards: int, heads: int, rows: int) -> None:
    found = list(layouts(cards, heads, rows))
    assert Layout() in found
    assert len(set(found)) == len(found)
    for layout in found:
        assert cards % layout.ranks == 0
        assert heads % layout.ulysses == 0
        assert layout.cfg <= rows


def test_eight_cards_and_forty_heads() -> None:
    found = {str(layout) for layout in layouts(8, 40, 2) if layout.ranks == 8}
    assert found == {
        *("ulysses=8", "ring=8", "ulysses=4,ring=2", "ulysses=2,ring=4"),
        *("ulysses=4,cfg=2", "ring=4,cfg=2", "ulysses=2,ring=2,cfg=2"),
    }


@given(st.sampled_from([1, 2, 3, 4, 12, 40]), st.sampled_from([1, 2]))
def test_families_double_from_one_rank_as_far_as_heads_allow(heads: int, rows: int) -> None:
    for _, chain in families(heads, rows):
        assert [layout.ranks for layout in chain] == [2**power for power in range(len(chain))]
        assert chain[-1].ranks <= MOST_RANKS
        assert all(heads % layout.ulysses == 0 and layout.cfg <= rows for layout in chain)


def stop(stops: list[Stop], family: str) -> Stop:
    return next(each for each in stops if each.family == family)


def test_a_ring_on_slow_links_stops_paying_and_says_where(memory: MemoryModel) -> None:
    # Its traffic stays as it is however many ranks there are, so the gain must end.
    ring = stop(planner(memory, replace(SPEEDS, link_bytes=10e9)).stops(), "ring")
    assert ring.next_gain is not None
    assert ring.next_gain < 1.3
    assert f"ring={2 * ring.layout.ranks} gains {ring.next_gain:.2f}x" == ring.reason
    before, last, after = (
        planner(memory, replace(SPEEDS, link_bytes=10e9)).plan(Layout(ring=ranks)).clip.total
        for ranks in (ring.layout.ring // 2, ring.layout.ring, ring.layout.ring * 2)
    )
    assert before / last >= 1.3
    assert last / after == pytest.approx(ring.next_gain)


def test_ulysses_ends_where_heads_do(memory: MemoryModel) -> None:
    fast = replace(SPEEDS, link_bytes=1e15)
    ulysses = stop(planner(memory, fast).stops(), "ulysses")
    assert (ulysses.layout, ulysses.next_gain) == (Layout(ulysses=8), None)
    assert ulysses.reason == "ulysses=16 does not divide 40 heads"


def test_plans_are_told_of_all_replicas(memory: MemoryModel) -> None:
    plans = planner(memory).plans()
    assert [plan.layout.ranks for plan in plans] == sorted(plan.layout.ranks for plan in plans)
    assert all(plan.replicas * plan.layout.ranks == 8 for plan in plans)
    alone = plans[0]
    assert alone.layout == Layout()
    assert alone.efficiency == pytest.approx(1.0)
    assert alone.clips_per_hour == pytest.approx(8 * 3600 / alone.clip.total)
    assert alone.tokens_per_second == pytest.approx(2 * 32760 / alone.step.total)
    assert alone.memory.follower is None
    for plan in plans[1:]:
        assert plan.efficiency < 1.0
        assert 0.0 < plan.communicating < 1.0
        assert_traffic_has_its_kinds(plan)


def assert_traffic_has_its_kinds(plan: Plan) -> None:
    assert (plan.traffic.all_to_all > 0) == (plan.layout.ulysses > 1)
    assert (plan.traffic.ring > 0) == (plan.layout.ring > 1)
    assert plan.traffic.weights == 0


def test_more_ranks_leave_each_with_less_to_hold(memory: MemoryModel) -> None:
    followers = [memory.of(Layout(ulysses=ranks)).follower for ranks in (2, 4, 8)]
    held = [follower.needed for follower in followers if follower is not None]
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 3


def test_spread_weights_take_less_the_more_ranks_share_a_sequence(memory: MemoryModel) -> None:
    whole = memory.of(Layout(ulysses=8)).leader.weights
    spread = [memory.of(Layout(ulysses=ranks), True).leader.weights for ranks in (2, 4, 8)]
    assert [whole, *spread] == sorted([whole, *spread], reverse=True)
    assert memory.of(Layout(cfg=2), True) == memory.of(Layout(cfg=2))
    assert planner(memory, spread=True).plan(Layout(ulysses=8)).traffic.weights == 21 * 10**9


def test_larger_clips_take_more_on_every_layout() -> None:
    needed = []
    for width, height, frames in ((832, 480, 17), (832, 480, 81), (1280, 720, 81)):
        clip = Clip(width, height, frames)
        model = MemoryModel(_sizes(), clip, replace(WORK, latent_rows=height // 8), torch.bfloat16, 8, 32)
        memories = [model.of(layout) for layout in (Layout(ulysses=4), Layout(ring=4), Layout(2, 2, 2))]
        needed.append([rank.floor for each in memories for rank in each.ranks] + [model.of(Layout()).leader.floor])
    for smaller, larger in pairwise(needed):
        assert all(before < after for before, after in zip(smaller, larger, strict=True))


def test_a_card_that_is_too_small_for_the_vae_alone_has_it_work_in_tiles(memory: MemoryModel) -> None:
    alone = memory.of(Layout())
    leader = alone.leader
    assert leader.floor <= leader.needed
    assert not alone.fits(leader.floor - 1)
    assert alone.fits(leader.floor)
    assert alone.tiles(leader.needed - 1) == (leader.floor < leader.needed)
    assert not alone.tiles(leader.needed)


def test_the_work_of_a_clip_is_counted_from_its_configs() -> None:
    sizes = _sizes()
    work = clip_work(sizes, Clip(832, 480, 5), 12, 0.5, torch.bfloat16)
    assert (work.model.dim, work.model.layers, work.model.ffn_dim, work.heads) == (5120, 40, 13824, 40)
    assert work.step_count == 12
    assert (work.steps[0].tokens, work.steps[0].merged) == (3120, False)
    assert all(each.merged and each.tokens < 3120 for each in work.steps[1:])
    assert sum(each.count * each.tokens for each in work.steps) <= 0.51 * 12 * 3120
    assert work.block_bytes == pytest.approx(23.9e9, rel=0.01)
    # A frame of the second chunk costs four times and more than the first alone, which comes before any other.
    first = clip_work(sizes, Clip(832, 480, 1), 1, 1.0, torch.bfloat16)
    assert work.decode_flops > 5 * first.decode_flops
