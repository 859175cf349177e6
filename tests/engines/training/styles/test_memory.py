"""The estimate of a training's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cinecat.engines.checkpoint import Checkpoint, find_checkpoint
from cinecat.engines.errors import OutOfMemory
from cinecat.engines.model import load_encoders, load_transformer, load_vae_decoder
from cinecat.engines.training.styles.clips import ClipShape
from cinecat.engines.training.styles.memory import TrainingMemory, check_memory, estimate_memory
from cinecat.engines.training.styles.recipe import StyleRecipe
from cinecat.engines.training.styles.trainer import add_lora

SHAPE = ClipShape(64, 64, 9, 8.0)
MEMORY = TrainingMemory(encoders=2**30, encoding=2**30, transformer=2**31, lora=2**29, activations=2**29)


@pytest.fixture(scope="module")
def checkpoint(micro: Path) -> Checkpoint:
    return find_checkpoint(str(micro))


def estimate(
    checkpoint: Checkpoint, shape: ClipShape = SHAPE, shards: int = 1, lpips: bool = False, **changes: object
) -> TrainingMemory:
    recipe = StyleRecipe(**changes)  # type: ignore[arg-type]
    return estimate_memory(checkpoint, shape, recipe, torch.float32, shards, lpips)


def test_weights_are_counted_exactly(checkpoint: Checkpoint) -> None:
    memory = estimate(checkpoint)
    encoders = load_encoders(checkpoint, "cpu", "float32")
    modules = (encoders.text_encoder, encoders.image_encoder, encoders.vae)
    assert memory.encoders == pytest.approx(
        sum(p.numel() * 4 for module in modules for p in module.parameters()), rel=0.01
    )
    transformer = load_transformer(checkpoint, "cpu", "float32")
    assert memory.transformer == sum(p.numel() * 4 for p in transformer.parameters())
    assert memory.lora == sum(p.numel() for p in add_lora(transformer, StyleRecipe())) * 16


def test_the_decoder_is_counted_where_lpips_needs_it(checkpoint: Checkpoint) -> None:
    without, memory = estimate(checkpoint), estimate(checkpoint, lpips=True)
    decoder = load_vae_decoder(checkpoint, "cpu")
    assert memory.decoder == sum(p.numel() * 4 for p in decoder.parameters())
    assert memory.decoding > memory.activations
    assert memory.training_phase - without.training_phase == memory.decoder + memory.decoding - memory.activations
    assert (without.decoder, without.decoding) == (0, 0)
    assert "LPIPS" in str(memory)
    assert "LPIPS" not in str(without)


def test_half_precision_halves_all_but_the_islands(checkpoint: Checkpoint) -> None:
    half = estimate_memory(checkpoint, SHAPE, StyleRecipe(), torch.bfloat16)
    loaded = load_transformer(checkpoint, "cpu", "bfloat16")
    assert half.transformer == sum(p.numel() * p.element_size() for p in loaded.parameters())


def test_activations_grow_with_the_clip_and_shrink_when_computed_again(checkpoint: Checkpoint) -> None:
    large = replace(SHAPE, width=512, height=512)
    again, kept = estimate(checkpoint, large), estimate(checkpoint, large, checkpoint_activations=False)
    assert again.activations < kept.activations
    wide = estimate(checkpoint, replace(large, width=1024))
    # The context's share does not grow with the clip.
    assert 1.9 * again.activations < wide.activations <= 2 * again.activations


def test_attention_keeps_no_table_of_all_pairs(checkpoint: Checkpoint) -> None:
    small, large = (estimate(checkpoint, replace(SHAPE, width=64 * n, height=64 * n)) for n in (2, 8))
    assert large.activations < 17 * small.activations


def test_shards_divide_the_transformer(checkpoint: Checkpoint) -> None:
    whole, half = estimate(checkpoint), estimate(checkpoint, shards=2)
    assert whole.transformer / 2 < half.transformer < whole.transformer


def test_the_larger_phase_decides() -> None:
    assert MEMORY.needed == 3 * 2**30
    assert replace(MEMORY, encoding=5 * 2**30).needed == 6 * 2**30


def test_too_little_memory_is_refused_with_what_to_lower() -> None:
    with pytest.raises(
        OutOfMemory, match=r"3\.00 GiB are needed, cuda:0 has 2\.00 GiB left; lower width, height or frames, checkpoint"
    ):
        check_memory(MEMORY, 2**31, "cuda:0")
    with pytest.raises(OutOfMemory, match="lower width or height, or free memory for the encoders"):
        check_memory(replace(MEMORY, encoding=2**32), 2**31, "cuda:0")
    with pytest.raises(OutOfMemory, match="lower width or height, leave out lpips-weights"):
        check_memory(replace(MEMORY, decoder=2**20, decoding=2**30), 2**31, "cuda:0")
    with pytest.raises(OutOfMemory, match=r"6\.00 GiB for 2 processes are needed"):
        check_memory(MEMORY, 2**32, "cpu", processes=2)


@pytest.mark.parametrize("available", [3 * 2**30, None])
def test_what_fits_or_cannot_be_judged_is_tried(available: int | None) -> None:
    check_memory(MEMORY, available, "cpu")
