"""The estimate of what serving takes, against loaded modules and the figures known of the 14B model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cinecat.engines.backends.stack import WanStack
from cinecat.engines.checkpoint import Checkpoint, find_checkpoint
from cinecat.engines.context import Branch
from cinecat.engines.memory_plan import WORDS, Clip, ModelSizes, plan_memory
from cinecat.engines.messages import StorageDtype
from cinecat.engines.model import load_model
from cinecat.engines.placement import HOST, matrices, place
from cinecat.engines.slots import StyleSlots

SMALL = Clip(64, 64, 9)
PUBLISHED = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"


@pytest.fixture(scope="module")
def checkpoint(micro: Path) -> Checkpoint:
    return find_checkpoint(str(micro))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_that_are_loaded(checkpoint: Checkpoint, dtype: str) -> None:
    model = load_model(checkpoint, "cpu", dtype)
    memory = plan_memory(ModelSizes.of(checkpoint), SMALL, getattr(torch, dtype), 2, 8)
    assert memory.transformer == sum(parameter.nbytes for parameter in model.transformer.parameters())
    assert memory.weights == pytest.approx(
        sum(p.nbytes for module in model.modules for p in module.parameters()), rel=0.01
    )


def test_banks_and_context_are_those_that_are_made(checkpoint: Checkpoint) -> None:
    transformer = load_model(checkpoint, "cpu", "float32").transformer
    memory = plan_memory(ModelSizes.of(checkpoint), SMALL, torch.float32, 2, 8)
    dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    branch = Branch(torch.zeros(1, ModelSizes.of(checkpoint).image_tokens, dim), torch.zeros(1, WORDS, dim), 0)
    with torch.inference_mode():
        slots = StyleSlots(transformer.blocks, 2, 8, torch.float32)
        keys = branch.keys(transformer.blocks, None, slots.wear({}, dict[str, dict].__getitem__))  # type: ignore[type-arg]
    assert memory.context == 2 * sum(
        tensor.nbytes for tensor in (keys.text_keys, keys.text_values, keys.image_keys, keys.image_values)
    )
    banks = [bank for pair in slots._banks.values() for bank in pair]
    assert memory.style_banks == sum(bank.nbytes for bank in banks)


def test_14b_serves_480p_on_one_80_gb_card_in_bfloat16_and_not_on_24() -> None:
    sizes = ModelSizes.published(PUBLISHED)
    assert sizes is not None
    memory = plan_memory(sizes, Clip(832, 480, 81), torch.bfloat16, style_slots=8, max_rank=32)
    assert memory.transformer / 2**30 == pytest.approx(30.6, abs=0.05)
    assert memory.weights / 1e9 == pytest.approx(47.2, abs=0.3)
    assert memory.style_banks / 2**30 == pytest.approx(3.0, abs=0.05)
    assert 24e9 < memory.needed < 78 * 2**30


def test_14b_720p_fits_an_80_gb_card_too() -> None:
    sizes = ModelSizes.published(PUBLISHED)
    assert sizes is not None
    assert plan_memory(sizes, Clip(1280, 720, 81), torch.bfloat16, 8, 32).needed < 78 * 2**30


def test_14b_serves_480p_on_24_gib_and_720p_on_48_by_offloading_and_float8() -> None:
    sizes = ModelSizes.published(PUBLISHED)
    assert sizes is not None
    small, large = Clip(832, 480, 81), Clip(1280, 720, 81)
    blocks = plan_memory(sizes, small, torch.bfloat16, 2, 32, "blocks")
    assert blocks.needed < 23 * 2**30
    assert blocks.host / 2**30 == pytest.approx(35.2, abs=0.1)
    narrow = plan_memory(sizes, large, torch.bfloat16, 8, 32, "encoders", "float8_e4m3fn")
    assert narrow.needed < 44 * 2**30
    assert narrow.visiting / 2**30 == pytest.approx(10.6, abs=0.1)


@pytest.mark.parametrize("storage_dtype", ["none", "float8_e4m3fn"])
def test_weights_on_the_device_are_those_that_are_placed(checkpoint: Checkpoint, storage_dtype: StorageDtype) -> None:
    transformer = load_model(checkpoint, "cpu", "bfloat16").transformer
    stack = WanStack(transformer)
    wide = sum(weight.nbytes for weight in matrices(stack.blocks[0])) if storage_dtype != "none" else 0
    place(transformer, stack, HOST, "blocks", storage_dtype)
    placed = sum(parameter.nbytes for parameter in transformer.parameters())
    fused = sum(p.nbytes for block in stack.blocks for n, p in block.named_parameters() if n.startswith("qkv"))
    sizes = ModelSizes.of(checkpoint)
    memory = plan_memory(sizes, SMALL, torch.bfloat16, 2, 8, "none", storage_dtype)
    assert memory.transformer == placed + fused + wide
    assert plan_memory(sizes, SMALL, torch.bfloat16, 2, 8, "blocks", storage_dtype).host > stack.size_bytes


def test_what_is_not_published_is_not_known() -> None:
    assert ModelSizes.published("somebody/else") is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [((65, 64, 9), "size: 65x64"), ((64, 64, 8), "frames: 8"), ((64, 64, 9, 3), "guidance-rows: 3")],
)
def test_a_clip_that_no_model_makes_is_refused(wrong: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clip(*wrong)


def test_activations_grow_with_the_tokens_and_shrink_with_the_dtype(checkpoint: Checkpoint) -> None:
    sizes = ModelSizes.of(checkpoint)
    wide, tall = (plan_memory(sizes, clip, torch.float32, 2, 8) for clip in (SMALL, Clip(64, 128, 9)))
    assert tall.activations == 2 * wide.activations
    assert plan_memory(sizes, SMALL, torch.bfloat16, 2, 8).activations < wide.activations
