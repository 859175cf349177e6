"""Styles are inputs: what rows get, what slots hold, and what no sequence of swaps can leave behind."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cinecat.engines.errors import EngineError
from cinecat.engines.slots import NO_STYLE, Factors, StyleSlots

DIM, FFN, LAYERS, MAX_RANK, SLOTS = 24, 40, 2, 6, 2


def bare_blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    block = {"dim": DIM, "ffn_dim": FFN, "num_heads": 2, "cross_attn_norm": True, "added_kv_proj_dim": DIM}
    return nn.ModuleList(WanTransformerBlock(**block) for _ in range(LAYERS)).requires_grad_(False)


def style(seed: int, rank: int, targets: list[str]) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    features = {
        target: (FFN if target.endswith("net.2") else DIM, FFN if "proj" in target and "ffn" in target else DIM)
        for target in targets
    }
    return {
        target: (torch.randn(rank, n, generator=draw), torch.randn(m, rank, generator=draw))
        for target, (n, m) in features.items()
    }


TARGETS = sorted(StyleSlots(bare_blocks(), 1, 1, torch.float32).targets)

styles = st.builds(
    style,
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 3),
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, max_size=len(TARGETS), unique=True),
)
strengths = st.floats(-2, 2, allow_nan=False).filter(bool)


def forward(blocks: nn.ModuleList, rows: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 5, DIM, generator=draw).expand(rows, -1, -1)
    context = torch.randn(1, 3 + 512, DIM, generator=draw).expand(rows, -1, -1)
    modulation = torch.randn(1, 6, DIM, generator=draw).expand(rows, -1, -1)
    rope = (torch.ones(1, 5, 1, DIM // 2), torch.zeros(1, 5, 1, DIM // 2))
    for block in blocks:
        hidden = block(hidden, context, modulation, rope)
    return hidden


def merged(worn: list[tuple[Factors, float]]) -> Tensor:
    """The reference: strengths times B A added to the weights themselves."""
    blocks = bare_blocks()
    for factors, strength in worn:
        for target, (a, b) in factors.items():
            _, layer, path = target.split(".", 2)
            linear = blocks[int(layer)].get_submodule(path)
            assert isinstance(linear, nn.Linear)
            linear.weight += strength * (b @ a)
    return forward(blocks, 1)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@settings(max_examples=25, deadline=None)
@given(first=styles, second=styles, strength=strengths, other=strengths)
def test_one_forward_gives_each_row_its_own_style(
    first: Factors, second: Factors, strength: float, other: float
) -> None:
    blocks = bare_blocks()
    slots = StyleSlots(blocks, SLOTS, MAX_RANK, torch.float32)
    library = {"first": first, "second": second}
    worn = [slots.wear({"first": strength}, library.__getitem__), slots.wear({"second": other}, library.__getitem__)]
    slots.dress([NO_STYLE, *worn])
    mixed = forward(blocks, 3)
    assert_equal(mixed[0:1], merged([]))
    assert_equal(mixed[1:2], merged([(first, strength)]))
    assert_equal(mixed[2:3], merged([(second, other)]))


@settings(max_examples=25, deadline=None)
@given(first=styles, second=styles, strength=strengths, other=strengths)
def test_styles_worn_together_add_up_exactly(first: Factors, second: Factors, strength: float, other: float) -> None:
    blocks = bare_blocks()
    slots = StyleSlots(blocks, SLOTS, MAX_RANK, torch.float32)
    worn = slots.wear({"first": strength, "second": other}, {"first": first, "second": second}.__getitem__)
    slots.dress([worn])
    assert_equal(forward(blocks, 1), merged([(first, strength), (second, other)]))


@settings(max_examples=25, deadline=None)
@given(history=st.lists(st.integers(0, 5), max_size=12), last=st.integers(0, 5))
def test_any_sequence_of_swaps_leaves_what_the_last_style_alone_gives(history: list[int], last: int) -> None:
    library = {str(n): style(n, 1 + n % 3, TARGETS[n :: n + 1]) for n in range(6)}
    blocks = bare_blocks()
    slots = StyleSlots(blocks, SLOTS, MAX_RANK, torch.float32)
    for number in history:
        slots.take_off(slots.wear({str(number): 1.0}, library.__getitem__))
    slots.dress([slots.wear({str(last): 0.5}, library.__getitem__)])
    assert_equal(forward(blocks, 1), merged([(library[str(last)], 0.5)]))


@pytest.fixture
def library() -> dict[str, Factors]:
    return {name: style(ord(name), 2, TARGETS) for name in "abc"}


@pytest.fixture
def slots() -> StyleSlots:
    return StyleSlots(bare_blocks(), SLOTS, MAX_RANK, torch.float32)


def test_a_resident_style_is_not_read_again_whatever_its_strength(
    slots: StyleSlots, library: dict[str, Factors]
) -> None:
    reads: list[str] = []

    def load(name: str) -> Factors:
        reads.append(name)
        return library[name]

    first = slots.wear({"a": 1.0}, load)
    second = slots.wear({"a": 0.3}, load)
    assert (first.slot, reads) == (second.slot, ["a"])
    assert (first.strength, second.strength) == (1.0, 0.3)


def test_the_least_recently_used_idle_style_gives_way(slots: StyleSlots, library: dict[str, Factors]) -> None:
    a = slots.wear({"a": 1.0}, library.__getitem__)
    b = slots.wear({"b": 1.0}, library.__getitem__)
    slots.take_off(a)
    slots.take_off(b)
    slots.take_off(slots.wear({"a": 1.0}, library.__getitem__))
    assert slots.wear({"c": 1.0}, library.__getitem__).slot == b.slot


def test_a_style_in_use_never_gives_way(slots: StyleSlots, library: dict[str, Factors]) -> None:
    slots.wear({"a": 1.0}, library.__getitem__)
    slots.wear({"b": 1.0}, library.__getitem__)
    with pytest.raises(EngineError, match="all 2 style slots are in use"):
        slots.wear({"c": 1.0}, library.__getitem__)


def test_strength_zero_is_no_style(slots: StyleSlots, library: dict[str, Factors]) -> None:
    assert slots.wear({"a": 0.0}, library.__getitem__) == NO_STYLE


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"blocks.7.attn2.to_q": (torch.ones(1, DIM), torch.ones(DIM, 1))}, "no layer 'blocks.7.attn2.to_q'"),
        ({"blocks.0.attn2.to_q": (torch.ones(1, 8), torch.ones(DIM, 1))}, "do not fit a 24 -> 24 layer"),
        ({"blocks.0.attn2.to_q": (torch.ones(7, DIM), torch.ones(DIM, 7))}, "add up to 7, a slot holds 6"),
    ],
)
def test_a_style_that_does_not_fit_leaves_everything_as_it_was(
    slots: StyleSlots, library: dict[str, Factors], factors: Factors, says: str
) -> None:
    worn = slots.wear({"a": 1.0}, library.__getitem__)
    with pytest.raises(EngineError, match=says):
        slots.wear({"bad": 1.0}, lambda _: factors)
    slots.take_off(worn)
    assert slots.wear({"a": 1.0}, library.__getitem__) == worn
    assert slots.wear({"b": 1.0}, library.__getitem__).slot != worn.slot
