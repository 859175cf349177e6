"""The bytes that ranks send, by formula."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.volume import ForwardShape, Sent, group_rows, sent_bytes

SHAPE = ForwardShape(layers=2, heads=4, dim=32, rows=2, tokens=10, text=3, image=5, value_bytes=4)

shapes = st.builds(
    ForwardShape,
    layers=st.integers(1, 4),
    heads=st.just(8),
    dim=st.just(64),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 300),
    text=st.integers(1, 64),
    image=st.integers(1, 20),
    value_bytes=st.sampled_from([2, 4]),
    biased=st.booleans(),
    styled=st.booleans(),
)
layouts = st.builds(
    Layout, ulysses=st.sampled_from([1, 2, 4, 8]), ring=st.sampled_from([1, 2, 3, 4]), cfg=st.sampled_from([1, 2])
)


def test_a_forward_reckoned_by_hand() -> None:
    layout = Layout(ulysses=2, ring=2)
    states = 2 * 3 * 32 * 4  # 2 rows, 3 tokens of a rank with padding, 32 channels, 4 bytes
    exchanges = {"all_to_all": 2 * 4 * states // 2, "ring": 2 * 2 * states}
    rotations, modulation = 2 * (2 * 3 * 4 * 4), 2 * 6 * 32 * 4
    context = 2 * (2 * 2 * (3 + 5) * 32 + 3) * 4
    scatter = states + rotations + modulation
    assert sent_bytes(SHAPE, layout, 0).kinds() == {**exchanges, "scatter": 3 * scatter}
    assert sent_bytes(SHAPE, layout, 0, fresh=True).kinds()["context"] == 3 * context
    assert sent_bytes(SHAPE, layout, 3, fresh=True).kinds() == {**exchanges, "gather": states}


def test_a_bias_for_every_token_and_a_style_for_every_row_go_to_every_other_rank() -> None:
    layout = Layout(ulysses=2, cfg=2)
    plain = sent_bytes(SHAPE, layout, 0).scatter
    assert sent_bytes(replace(SHAPE, biased=True), layout, 0).scatter == plain + 3 * 10 * 4
    assert sent_bytes(replace(SHAPE, styled=True), layout, 0).scatter == plain + 3 * (8 + 4)


@given(shapes)
def test_one_rank_sends_nothing(shape: ForwardShape) -> None:
    assert sent_bytes(shape, Layout(), 0, fresh=True) == Sent()


@given(shapes, st.sampled_from([2, 4, 8]), st.integers(1, 40))
def test_all_to_all_falls_as_ranks_share_it(shape: ForwardShape, ulysses: int, each: int) -> None:
    shape = replace(shape, tokens=8 * each)
    whole = shape.rows * shape.tokens * shape.dim * shape.value_bytes
    sent = sent_bytes(shape, Layout(ulysses=ulysses), 0)
    assert sent.all_to_all * ulysses**2 == 4 * shape.layers * whole * (ulysses - 1)
    assert sent.ring == 0


@given(shapes, st.sampled_from([2, 4, 8]), st.integers(1, 40))
def test_a_ring_sends_all_keys_and_values_but_a_share(shape: ForwardShape, ring: int, each: int) -> None:
    shape = replace(shape, tokens=8 * each)
    whole = shape.rows * shape.tokens * shape.dim * shape.value_bytes
    sent = sent_bytes(shape, Layout(ring=ring), 0)
    assert sent.ring * ring == 2 * shape.layers * whole * (ring - 1)
    assert sent.all_to_all == 0


@given(shapes, layouts)
def test_padding_is_sent_like_tokens(shape: ForwardShape, layout: Layout) -> None:
    full = replace(shape, tokens=layout.shard_tokens(shape.tokens) * layout.sequence)
    for rank in range(layout.ranks):
        padded, even = sent_bytes(shape, layout, rank, fresh=True), sent_bytes(full, layout, rank, fresh=True)
        assert replace(padded, scatter=0) == replace(even, scatter=0)
        assert padded.scatter <= even.scatter
        if not shape.biased:
            assert padded == even


@given(shapes, layouts)
def test_what_the_leader_sends_is_for_all_others_and_theirs_is_for_it(shape: ForwardShape, layout: Layout) -> None:
    for rank in range(1, layout.ranks):
        sent = sent_bytes(shape, layout, rank, fresh=True)
        assert sent.scatter == sent.context == 0
        busy = group_rows(shape.rows, layout, layout.place(rank).cfg) > 0
        assert (sent.gather > 0) == busy
    leader = sent_bytes(shape, layout, 0, fresh=True)
    assert leader.gather == 0
    others = [rank for rank in range(1, layout.ranks) if group_rows(shape.rows, layout, layout.place(rank).cfg)]
    assert (leader.scatter > 0) == (leader.context > 0) == bool(others)


@given(shapes, layouts)
def test_rows_are_shared_out_among_the_groups(shape: ForwardShape, layout: Layout) -> None:
    assert sum(group_rows(shape.rows, layout, cfg) for cfg in range(layout.cfg)) == shape.rows


def test_a_group_without_rows_takes_no_part() -> None:
    alone = replace(SHAPE, rows=1)
    layout = Layout(ulysses=2, cfg=2)
    assert sent_bytes(alone, layout, 2, fresh=True) == sent_bytes(alone, layout, 3, fresh=True) == Sent()
    assert sent_bytes(alone, layout, 0) == sent_bytes(alone, Layout(ulysses=2), 0)
