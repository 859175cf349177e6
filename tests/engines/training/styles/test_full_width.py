"""The layout of the 14B checkpoint at its full width, with one layer."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from cinecat.engines.memory import in_words
from cinecat.engines.training.progress import Journal
from cinecat.engines.training.styles import trainer
from cinecat.engines.training.styles.encoded import EncodedClip
from cinecat.engines.training.styles.recipe import StyleRecipe
from cinecat.engines.training.styles.trainer import train_style


@pytest.mark.slow
def test_one_step_at_the_width_of_14b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_LEVELS", 1)
    transformer = WanTransformer3DModel(
        num_attention_heads=40,
        attention_head_dim=128,
        in_channels=36,
        out_channels=16,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=13824,
        num_layers=1,
        cross_attn_norm=True,
        image_dim=1280,
        added_kv_proj_dim=5120,
    )
    draw = torch.Generator().manual_seed(0)
    shapes = ((16, 2, 8, 8), (20, 2, 8, 8), (7, 4096), (257, 1280))
    clips = [EncodedClip(*(torch.randn(shape, generator=draw) for shape in shapes)) for _ in range(2)]
    recipe = StyleRecipe(steps=1, accumulation=1, learning_rate=1e-2)
    style = train_style(transformer, clips[:1], clips[1:], recipe, 5.0, Journal(tmp_path, "run"), cpu=True)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert len(style.factors) == 12
    assert style.factors["blocks.0.attn2.add_k_proj.lora_A.weight"].shape == (8, 5120)
    moved = [weight.abs().max() for name, weight in state["weights"].items() if ".lora_B." in name]
    assert len(moved) == 6
    assert min(moved) > 0
    weights = sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"weights {in_words(weights)}, peak of the process {in_words(peak)}")
