from __future__ import annotations

import torch

from cinecat.plugins.lora import LoraShape, load_lora
from cinecat.plugins.registry import BUNDLED, StyleRegistry

_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


def test_noir_and_amber_are_offered() -> None:
    registry = StyleRegistry([BUNDLED])

    assert [style.manifest.name for style in registry.styles()] == ["amber", "noir"]
    assert registry.problems() == ()


def test_bundled_styles_change_every_cross_attention_of_wan_tiny() -> None:
    targets = {f"blocks.{n}.attn2.{linear}": LoraShape(8, 256, 256) for n in range(6) for linear in _LINEARS}

    assert [style.header.targets for style in StyleRegistry([BUNDLED]).styles()] == [targets, targets]


def test_bundled_styles_are_as_large_as_the_weights_they_change() -> None:
    fresh = torch.nn.Linear(256, 256).weight.norm().item()

    for style in StyleRegistry([BUNDLED]).styles():
        norms = [torch.linalg.norm(b @ a).item() / fresh for a, b in load_lora(style.weights_path).values()]
        assert 0.9 < min(norms) <= max(norms) < 1.1
