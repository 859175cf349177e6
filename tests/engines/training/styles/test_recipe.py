"""What a recipe trains can be worn."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from cinecat.engines.slots import StyleSlots
from cinecat.engines.training.styles.recipe import TARGETS, StyleRecipe
from cinecat.engines.training.styles.trainer import add_lora
from tests.engines.samples import slot_targets, small_transformer

_LAYERS = 2


def layers_of_14b() -> WanTransformer3DModel:
    """Two of its 40 layers, which are alike, at its width and without memory."""
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=40,
            attention_head_dim=128,
            in_channels=36,
            out_channels=16,
            text_dim=4096,
            ffn_dim=13824,
            num_layers=_LAYERS,
            image_dim=1280,
            added_kv_proj_dim=5120,
            cross_attn_norm=True,
        )


@pytest.mark.parametrize("targets", TARGETS)
def test_every_target_is_one_that_slots_serve(targets: str) -> None:
    recipe = StyleRecipe(targets=targets)
    assert set(recipe.lora_config(2).target_modules) <= set(slot_targets(small_transformer()))


def test_all_targets_are_all_that_slots_serve() -> None:
    assert set(StyleRecipe(targets="all").lora_config(2).target_modules) == set(slot_targets(small_transformer()))


@pytest.mark.parametrize("targets", TARGETS)
def test_a_style_of_14b_fits_its_slots(targets: str) -> None:
    recipe = StyleRecipe(targets=targets, rank=8)
    transformer = layers_of_14b()
    with torch.device("meta"):
        slots = StyleSlots(transformer.blocks, 1, 8, torch.bfloat16).targets
        trained = layers_of_14b()
        add_lora(trained, recipe)
    shapes = {
        name.removesuffix(".lora_A.default"): (module.in_features, trained.get_submodule(_other(name)).out_features)
        for name, module in trained.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert len(shapes) == _LAYERS * len(TARGETS[targets])
    assert shapes == {path: slots.get(path) for path in shapes}


def _other(name: str) -> str:
    return name.replace("lora_A", "lora_B")


def test_the_scale_is_alpha_over_rank() -> None:
    transformer = small_transformer()
    add_lora(transformer, StyleRecipe(rank=4, alpha=6.0))
    assert transformer.blocks[0].attn2.to_q.scaling == {"default": 1.5}
