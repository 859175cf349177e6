"""What the setting `shard` may say, and where that puts each rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.errors import SettingError
from cinecat.engines.sharding.layout import Layout, Place, check_layout, choose_layout, parse_layout


@pytest.mark.parametrize(
    ("word", "layout"),
    [
        ("none", Layout()),
        ("ulysses=4", Layout(ulysses=4)),
        ("ring=2,cfg=2", Layout(ring=2, cfg=2)),
        ("cfg=2, ulysses=4", Layout(ulysses=4, cfg=2)),
        ("ulysses=1", Layout()),
        ("auto", None),
    ],
)
def test_words_that_are_layouts(word: str, layout: Layout | None) -> None:
    assert parse_layout(word) == layout


@pytest.mark.parametrize(
    "word", ["", "ulysses", "ulysses=0", "ulysses=-2", "ulysses=2,ulysses=4", "tensor=2", "2", "²"]
)
def test_words_that_are_none_are_told_what_would_be(word: str) -> None:
    with pytest.raises(ValueError, match="ulysses=N, ring=N and cfg=N"):
        parse_layout(word)


def test_more_sides_of_guidance_than_there_are() -> None:
    with pytest.raises(ValueError, match="cfg is 1 or 2"):
        parse_layout("cfg=3")


def test_more_ranks_than_a_machine_has() -> None:
    with pytest.raises(ValueError, match="128 ranks; one replica has 64"):
        parse_layout("ulysses=8,ring=8,cfg=2")


def test_heads_that_do_not_divide_name_the_degrees_that_do() -> None:
    with pytest.raises(
        SettingError, match="ulysses=3 does not divide the model's 40 heads; 1, 2, 4, 5, 8, 10, 20, 40 do"
    ):
        check_layout(Layout(ulysses=3), 40, None)


def test_too_few_cards() -> None:
    with pytest.raises(SettingError, match="ulysses=4,cfg=2 takes 8 GPUs, and there are 4"):
        check_layout(Layout(ulysses=4, cfg=2), 40, 4)
    assert check_layout(Layout(ulysses=4, cfg=2), 40, None)


layouts = st.builds(Layout, ulysses=st.integers(1, 5), ring=st.integers(1, 4), cfg=st.integers(1, 2))


@given(layouts)
def test_every_place_is_one_rank(layout: Layout) -> None:
    places = [layout.place(rank) for rank in range(layout.ranks)]
    expected = [
        Place(cfg, ring, ulysses)
        for cfg in range(layout.cfg)
        for ring in range(layout.ring)
        for ulysses in range(layout.ulysses)
    ]
    assert places == expected


@given(layouts)
def test_a_layout_reads_as_it_is_written(layout: Layout) -> None:
    assert parse_layout(str(layout)) == layout


@given(layouts, st.integers(1, 100_000))
def test_shards_hold_all_tokens_and_are_equal(layout: Layout, tokens: int) -> None:
    size = layout.shard_tokens(tokens)
    assert size * layout.sequence >= tokens
    assert (size - 1) * layout.sequence < tokens


@given(st.integers(1, 16), st.sampled_from([4, 12, 40]), st.integers(1, 700_000), st.booleans())
def test_what_is_chosen_suits_the_model_and_the_machine(cards: int, heads: int, tokens: int, linked: bool) -> None:
    layout = choose_layout(cards, heads, tokens, linked)
    check_layout(layout, heads, cards)
    assert linked or layout.ulysses == 1


@pytest.mark.parametrize(
    ("cards", "tokens", "linked", "layout"),
    [
        (1, 75_600, True, Layout()),
        (2, 75_600, True, Layout(cfg=2)),
        (8, 75_600, True, Layout(ulysses=4, cfg=2)),
        (8, 75_600, False, Layout(ring=4, cfg=2)),
        (6, 75_600, True, Layout(ring=3, cfg=2)),
        (5, 75_600, True, Layout(ulysses=5)),
        (8, 2_100, True, Layout(ulysses=2, cfg=2)),
        (8, 320, True, Layout(cfg=2)),
    ],
)
def test_what_is_chosen_for_14b(cards: int, tokens: int, linked: bool, layout: Layout) -> None:
    assert choose_layout(cards, 40, tokens, linked) == layout
