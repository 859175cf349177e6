"""What requests wear, with the CAT adapter and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cinecat.engines.errors import NoFreeSlot
from cinecat.engines.messages import StyleUse
from cinecat.engines.slots import NO_STYLE, StyleSlots
from cinecat.engines.wardrobe import CatAdapter, Wardrobe
from cinecat.plugins.fingerprint import fingerprint
from tests.engines.samples import DIM, small_transformer


def lora(path: Path, rank: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    factors = {"A": torch.ones(rank, DIM), "B": torch.full((DIM, rank), float(rank))}
    save_file({f"transformer.blocks.0.attn2.to_q.lora_{name}.weight": value for name, value in factors.items()}, path)
    return path


@pytest.fixture
def dusk(tmp_path: Path) -> StyleUse:
    path = lora(tmp_path / "dusk.safetensors", rank=2)
    return StyleUse(str(path), fingerprint(path), 0.5)


@pytest.fixture
def adapter(tmp_path: Path) -> CatAdapter:
    lora(tmp_path / "cat_adapter" / "cat_adapter.safetensors", rank=3)
    found = CatAdapter.beside(tmp_path)
    assert found is not None
    return found


def wardrobe(adapter: CatAdapter | None, slots: int = 2, max_rank: int = 8) -> Wardrobe:
    return Wardrobe(StyleSlots(small_transformer().blocks, slots, max_rank, torch.float32), 2**20, adapter)


def test_a_checkpoint_without_an_adapter_has_none(tmp_path: Path) -> None:
    assert CatAdapter.beside(tmp_path) is None


def test_the_adapter_is_worn_in_merged_steps_alone(adapter: CatAdapter, dusk: StyleUse) -> None:
    worn = wardrobe(adapter)
    outfit = worn.dress((dusk,), merging=True)
    assert [set(style.fingerprints) for style in worn.residency()] == [
        {dusk.fingerprint},
        {dusk.fingerprint, adapter.fingerprint},
    ]
    assert (outfit.whole.strength, outfit.merged.strength, outfit.note) == (0.5, 1.0, "")


def test_without_a_style_whole_steps_wear_nothing(adapter: CatAdapter) -> None:
    outfit = wardrobe(adapter).dress((), merging=True)
    assert outfit.whole == NO_STYLE
    assert outfit.merged.slot


@pytest.mark.parametrize("merging", [True, False])
def test_without_an_adapter_or_merged_steps_both_are_the_same(
    adapter: CatAdapter, dusk: StyleUse, merging: bool
) -> None:
    outfit = wardrobe(None if merging else adapter).dress((dusk,), merging)
    assert outfit.merged is outfit.whole


def test_a_style_that_leaves_it_no_rank_is_worn_without_it(adapter: CatAdapter, dusk: StyleUse) -> None:
    outfit = wardrobe(adapter, max_rank=4).dress((dusk,), merging=True)
    assert outfit.merged is outfit.whole
    assert outfit.note.startswith("tokenization: without the CAT adapter: styles: ")
    assert "a slot holds 4" in outfit.note


def test_one_slot_alone_does_not_make_a_styled_request_wait_for_ever(adapter: CatAdapter, dusk: StyleUse) -> None:
    outfit = wardrobe(adapter, slots=1).dress((dusk,), merging=True)
    assert outfit.merged is outfit.whole
    assert "one style slot" in outfit.note


def test_undressing_frees_both_places(adapter: CatAdapter, dusk: StyleUse, tmp_path: Path) -> None:
    other = StyleUse(str(path := lora(tmp_path / "dawn.safetensors", rank=1)), fingerprint(path), 1.0)
    worn = wardrobe(adapter)
    outfit = worn.dress((dusk,), merging=True)
    with pytest.raises(NoFreeSlot):
        worn.dress((other,), merging=False)
    worn.undress(outfit)
    worn.undress(worn.dress((other,), merging=True))


def test_a_request_that_finds_one_place_of_two_pins_none(adapter: CatAdapter, dusk: StyleUse, tmp_path: Path) -> None:
    other = StyleUse(str(path := lora(tmp_path / "dawn.safetensors", rank=1)), fingerprint(path), 1.0)
    worn = wardrobe(adapter)
    first = worn.dress((other,), merging=False)
    with pytest.raises(NoFreeSlot):
        worn.dress((dusk,), merging=True)
    worn.undress(first)
    worn.undress(worn.dress((dusk,), merging=True))
