"""How long steps and clips are reckoned to take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.capacity.times import clip_seconds, spread_bytes, step_seconds
from cinecat.engines.capacity.work import Steps
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.tokens.flops import forward_flops
from tests.engines.capacity.samples import SPEEDS, WORK

STEPS = WORK.steps[0]

layouts = st.builds(
    Layout, ulysses=st.sampled_from([1, 2, 4, 8]), ring=st.sampled_from([1, 2, 4]), cfg=st.sampled_from([1, 2])
)


def test_a_guided_step_on_one_card_is_two_forwards_and_sends_nothing() -> None:
    linear, attention = forward_flops(WORK.model, 32760)
    step = step_seconds(WORK, STEPS, Layout(), SPEEDS)
    assert step.linear == pytest.approx(2 * linear / 400e12)
    assert step.attention == pytest.approx(2 * attention / 200e12)
    assert step.layers == pytest.approx(2 * 40 * 1e-3)
    assert step.communicating == 0.0
    assert step.total == step.computing


def test_a_step_on_eight_cards_reckoned_by_hand() -> None:
    linear, attention = forward_flops(WORK.model, 32760)
    step = step_seconds(WORK, STEPS, Layout(ulysses=4, cfg=2), SPEEDS)
    states = 8190 * 5120 * 2  # of one row's tokens on a rank
    assert step.linear == pytest.approx(linear / 4 / 400e12)
    assert step.attention == pytest.approx(attention / 4 / 200e12)
    assert step.layers == pytest.approx(40 * 1e-3)
    assert step.all_to_all == pytest.approx(40 * 4 * states * 3 / 4 / 100e9 + 2 * 40 * 1e-5)
    assert step.ring == step.weights == 0.0
    inputs = states + 2 * 8190 * 64 * 4 + 6 * 5120 * 2
    assert step.scatter == pytest.approx(7 * inputs / 100e9 + 1e-5)
    assert step.gather == pytest.approx(7 * states / 100e9 + 1e-5)


def test_merged_tokens_take_less_and_bring_a_bias() -> None:
    layout = Layout(ulysses=2)
    whole, merged = (step_seconds(WORK, Steps(1, 16384, merged), layout, SPEEDS) for merged in (False, True))
    assert merged.scatter - whole.scatter == pytest.approx(2 * 16384 * 2 / 100e9)
    assert merged.total < step_seconds(WORK, STEPS, layout, SPEEDS).total


def test_spread_weights_are_gathered_by_the_ranks_of_a_sequence() -> None:
    layout = Layout(ulysses=4, cfg=2)
    assert spread_bytes(WORK, layout) == 18 * 10**9
    assert step_seconds(WORK, STEPS, layout, SPEEDS, True).weights == pytest.approx(0.18 + 40 * 1e-5)
    assert step_seconds(WORK, STEPS, Layout(cfg=2), SPEEDS, True).weights == 0.0


@given(layouts, st.integers(1, 40000))
def test_ranks_never_do_less_than_their_share(layout: Layout, tokens: int) -> None:
    steps = Steps(1, tokens, False)
    speeds = replace(SPEEDS, layer_seconds=0.0)
    alone, shared = (step_seconds(WORK, steps, each, speeds) for each in (Layout(), layout))
    assert shared.computing >= alone.computing / layout.ranks * (1 - 1e-9)
    if tokens % layout.sequence == 0:
        assert shared.computing == pytest.approx(alone.computing / layout.ranks)


@given(layouts, st.floats(1e9, 1e12))
def test_a_faster_link_never_makes_a_clip_slower(layout: Layout, link: float) -> None:
    slow, fast = (replace(SPEEDS, link_bytes=each) for each in (link, 2 * link))
    assert clip_seconds(WORK, layout, fast).total <= clip_seconds(WORK, layout, slow).total


def test_encoders_and_vae_encode_are_the_leader_s_alone_and_decoding_is_shared() -> None:
    alone, shared = (clip_seconds(WORK, layout, SPEEDS) for layout in (Layout(), Layout(ulysses=8)))
    assert shared.encoders == alone.encoders == pytest.approx(0.03)
    assert shared.vae_encode == alone.vae_encode == pytest.approx(1.0)
    assert alone.vae_decode == pytest.approx(6.5)
    band = 8 / 60  # of 60 rows of latents, the highest of 8 bands has 8
    assert shared.vae_decode == pytest.approx(6.5 * band + 388177920 * (1 - band) / 100e9)
    assert alone.steps == pytest.approx(10 * step_seconds(WORK, STEPS, Layout(), SPEEDS).total)
