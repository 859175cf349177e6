"""Styles are inputs: what rows get, what slots hold, and what no sequence of swaps can leave behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from cinecat.engines.errors import EngineError, NoFreeSlot
from cinecat.engines.slots import NO_STYLE, Factors, StyleSlots, bank_bytes, other_targets
from tests.engines.samples import small_transformer

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


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 5, DIM, generator=draw).expand(rows, -1, -1)
    context = torch.randn(1, 3 + 512, DIM, generator=draw).expand(rows, -1, -1)
    modulation = torch.randn(1, 6, DIM, generator=draw).expand(rows, -1, -1)
    return hidden, context, modulation, (torch.ones(1, 5, 1, DIM // 2), torch.zeros(1, 5, 1, DIM // 2))


def forward(blocks: nn.ModuleList, rows: int) -> Tensor:
    hidden, context, modulation, rope = inputs(rows)
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


# Six styles that fit, one by one and in pairs, and three that are refused: by rank, by layer, and on the disk.
LIBRARY: dict[str, Factors] = {str(n): style(n, 1 + n % 3, TARGETS[n :: n + 1]) for n in range(6)}
LIBRARY["too high"] = style(6, MAX_RANK + 1, TARGETS)
LIBRARY["another model's"] = {**style(7, 1, TARGETS), "blocks.7.attn2.to_q": (torch.ones(1, DIM), torch.ones(DIM, 1))}


def read(name: str) -> Factors:
    if name not in LIBRARY:
        raise EngineError(f"styles: {name} cannot be read any more")
    return LIBRARY[name]


def wear_or_be_refused(slots: StyleSlots, wish: dict[str, float]) -> None:
    with contextlib.suppress(EngineError):
        slots.take_off(slots.wear(wish, read))


fitting = st.dictionaries(st.sampled_from("012345"), strengths, min_size=1, max_size=2)
wishes = fitting | st.sampled_from(
    [{"too high": 1.0}, {"another model's": 1.0}, {"gone": 1.0}, {"0": 1.0, "gone": 1.0}]
)


@settings(max_examples=40, deadline=None)
@given(history=st.lists(wishes, max_size=12), last=fitting)
def test_any_sequence_of_swaps_leaves_exactly_what_the_last_one_alone_gives(
    history: list[dict[str, float]], last: dict[str, float]
) -> None:
    blocks, fresh = bare_blocks(), bare_blocks()
    slots, alone = (StyleSlots(each, SLOTS, MAX_RANK, torch.float32) for each in (blocks, fresh))
    for wish in history:
        wear_or_be_refused(slots, wish)
    for each in (slots, alone):
        each.dress([each.wear(last, read)])
    swapped = forward(blocks, 1)
    assert torch.equal(swapped, forward(fresh, 1))
    assert_equal(swapped, merged([(LIBRARY[name], strength) for name, strength in last.items()]))


@pytest.fixture
def library() -> dict[str, Factors]:
    return {name: style(ord(name), 2, TARGETS) for name in "abc"}


@pytest.fixture
def slots() -> StyleSlots:
    return StyleSlots(bare_blocks(), SLOTS, MAX_RANK, torch.float32, ignored={"proj_out"})


def unread(name: str) -> Factors:
    raise AssertionError(f"{name} was read")


def written(slots: StyleSlots) -> list[int]:
    """How often each bank has been written to."""
    return [bank._version for pair in slots._banks.values() for bank in pair]


def held(slots: StyleSlots, slot: int) -> list[Tensor]:
    """A copy of what is in a slot."""
    return [bank[:, slot].clone() for pair in slots._banks.values() for bank in pair]


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
    with pytest.raises(NoFreeSlot, match="no style slot is free: 2 of 2 are worn by running clips"):
        slots.wear({"c": 1.0}, unread)


def test_a_style_that_found_no_slot_gets_the_one_that_is_taken_off(
    slots: StyleSlots, library: dict[str, Factors]
) -> None:
    a = slots.wear({"a": 1.0}, library.__getitem__)
    again = slots.wear({"a": 0.5}, library.__getitem__)
    slots.wear({"b": 1.0}, library.__getitem__)
    slots.take_off(a)
    with pytest.raises(NoFreeSlot):
        slots.wear({"c": 1.0}, unread)
    slots.take_off(again)
    assert slots.wear({"c": 1.0}, library.__getitem__).slot == a.slot


def test_strength_zero_is_no_style(slots: StyleSlots, library: dict[str, Factors]) -> None:
    assert slots.wear({"a": 0.0}, library.__getitem__) == NO_STYLE


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"blocks.7.attn2.to_q": (torch.ones(1, DIM), torch.ones(DIM, 1))}, "no layer 'blocks.7.attn2.to_q'"),
        ({"blocks.0.attn2.to_q": (torch.ones(1, 8), torch.ones(DIM, 1))}, "do not fit a 24 -> 24 layer"),
        (
            {"blocks.0.attn2.to_q": (torch.ones(7, DIM), torch.ones(DIM, 7))},
            r"bad \(rank 7\) add up to rank 7 at blocks.0.attn2.to_q, a slot holds 6",
        ),
        ({"proj_out": (torch.ones(1, DIM), torch.ones(DIM, 1))}, "bad changes only layers outside the blocks"),
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


def test_ranks_that_do_not_fit_together_are_named_with_the_setting_before_anything_is_written(
    slots: StyleSlots,
) -> None:
    library = {"one": style(1, 4, TARGETS), "two": style(2, 3, TARGETS[:1])}
    before = written(slots)
    with pytest.raises(
        EngineError,
        match=r"one \(rank 4\) and two \(rank 3\) add up to rank 7 at \S+, a slot holds 6; .* setting max_rank to 7",
    ):
        slots.wear({"one": 1.0, "two": 1.0}, library.__getitem__)
    assert written(slots) == before
    assert slots.residency() == ()


def test_styles_whose_ranks_fill_a_slot_to_the_last_are_worn_exactly() -> None:
    one, two = style(1, MAX_RANK - 1, TARGETS), style(2, 1, TARGETS)
    blocks = bare_blocks()
    slots = StyleSlots(blocks, SLOTS, MAX_RANK, torch.float32)
    slots.dress([slots.wear({"one": 0.7, "two": -1.2}, {"one": one, "two": two}.__getitem__)])
    assert_equal(forward(blocks, 1), merged([(one, 0.7), (two, -1.2)]))


def test_layers_that_the_new_style_leaves_out_keep_nothing_of_the_old_one(library: dict[str, Factors]) -> None:
    blocks = bare_blocks()
    slots = StyleSlots(blocks, 1, MAX_RANK, torch.float32)
    slots.take_off(slots.wear({"a": 1.0}, library.__getitem__))
    partial = style(9, 1, TARGETS[:1])
    slots.dress([slots.wear({"partial": 1.0}, lambda _: partial)])
    assert sum(int(values.count_nonzero() > 0) for values in held(slots, 1)) == 2
    assert_equal(forward(blocks, 1), merged([(partial, 1.0)]))


def test_a_lower_rank_keeps_no_row_of_a_higher_one() -> None:
    slots = StyleSlots(bare_blocks(), 1, MAX_RANK, torch.float32)
    slots.take_off(slots.wear({"high": 1.0}, lambda _: style(1, MAX_RANK, TARGETS)))
    slots.wear({"low": 1.0}, lambda _: style(2, 2, TARGETS))
    bank_a, bank_b = next(iter(slots._banks.values()))
    assert bank_a[:, 1, 2:].count_nonzero() == bank_b[:, 1, :, 2:].count_nonzero() == 0
    assert bank_a[:, 1, :2].count_nonzero() > 0


def test_from_one_style_to_another_and_back_leaves_no_mixture(library: dict[str, Factors]) -> None:
    slots = StyleSlots(bare_blocks(), 1, MAX_RANK, torch.float32)
    slots.take_off(slots.wear({"a": 1.0}, library.__getitem__))
    first = held(slots, 1)
    slots.take_off(slots.wear({"b": 1.0}, library.__getitem__))
    assert not all(map(torch.equal, held(slots, 1), first))
    slots.take_off(slots.wear({"a": 1.0}, library.__getitem__))
    assert all(map(torch.equal, held(slots, 1), first))


def test_slot_zero_stays_zero_whatever_is_worn(slots: StyleSlots, library: dict[str, Factors]) -> None:
    for name in "abcabc":
        slots.take_off(slots.wear({name: 1.0}, library.__getitem__))
    assert not any(values.any() for values in held(slots, 0))


def test_another_strength_writes_nothing(slots: StyleSlots, library: dict[str, Factors]) -> None:
    slots.wear({"a": 1.0}, library.__getitem__)
    before = written(slots)
    assert slots.wear({"a": -0.4}, unread).strength == -0.4
    assert written(slots) == before


def test_a_style_that_cannot_be_read_is_refused_and_the_previous_one_is_not_worn_for_it(
    slots: StyleSlots, library: dict[str, Factors]
) -> None:
    slots.take_off(slots.wear({"a": 1.0}, library.__getitem__))
    before, writes = slots.residency(), written(slots)
    with pytest.raises(EngineError, match="gone cannot be read"):
        slots.wear({"gone": 1.0}, read)
    assert (slots.residency(), written(slots)) == (before, writes)


def test_layers_outside_the_blocks_are_left_out(slots: StyleSlots) -> None:
    outside = (torch.ones(99, 5), torch.ones(7, 99))
    worn = slots.wear({"a": 1.0}, lambda _: {**style(1, 2, TARGETS), "proj_out": outside})
    slots.take_off(worn)
    kept = held(slots, worn.slot)
    slots.wear({"b": 1.0}, lambda _: style(1, 2, TARGETS))
    assert all(map(torch.equal, held(slots, 2), kept))


def test_the_layers_outside_the_blocks_are_those_of_wan() -> None:
    outside = other_targets(small_transformer())
    assert {path: size for path, size in outside.items() if not path.startswith("condition_embedder.")} == {
        "patch_embedding": (36 * 4, DIM),
        "proj_out": (DIM, 64),
    }
    assert len(outside) == 9


def test_the_memory_of_the_banks_is_known_before_it_is_taken(slots: StyleSlots) -> None:
    taken = sum(bank.nbytes for pair in slots._banks.values() for bank in pair)
    assert bank_bytes(bare_blocks(), SLOTS, MAX_RANK, torch.float32) == taken


def test_eight_slots_of_rank_32_take_three_gib_at_14b() -> None:
    with torch.device("meta"):
        block = WanTransformerBlock(5120, 13824, 40, cross_attn_norm=True, added_kv_proj_dim=5120)
    assert bank_bytes(nn.ModuleList([block] * 40), 8, 32, torch.bfloat16) / 2**30 == pytest.approx(3.01, abs=0.01)


Stack = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]


def compiled(blocks: nn.ModuleList, counter: CompileCounterWithBackend) -> Stack:
    def stack(hidden: Tensor, context: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        for block in blocks:
            hidden = block(hidden, context, modulation, rope)
        return hidden

    return torch.compile(stack, backend=counter, fullgraph=True, dynamic=False)


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_swaps_reach_compiled_code_and_compile_nothing(library: dict[str, Factors], backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    blocks = bare_blocks()
    slots = StyleSlots(blocks, 1, MAX_RANK, torch.float32)
    stack = compiled(blocks, counter)
    with torch.no_grad():
        for number, (name, strength) in enumerate([("a", 1.0), ("b", 1.0), ("b", 0.3), ("a", -1.0), ("c", 0.5)]):
            worn = slots.wear({name: strength}, library.__getitem__)
            slots.dress([NO_STYLE, worn])
            plain, styled = stack(*inputs(2)).split(1)
            slots.take_off(worn)
            assert_equal(plain, merged([]))
            assert_equal(styled, merged([(library[name], strength)]))
            assert counter.frame_count == 1, number
    torch._dynamo.reset()
