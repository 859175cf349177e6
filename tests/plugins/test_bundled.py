"""The styles that come with Cinecat."""

from __future__ import annotations

from cinecat.plugins.lora import LoraShape
from cinecat.plugins.registry import BUNDLED, StyleRegistry

_SIZES = {
    **{f"attn1.{linear}": (256, 256) for linear in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"attn2.{linear}": (256, 256) for linear in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")},
    "ffn.net.0.proj": (256, 768),
    "ffn.net.2": (768, 256),
}


def test_three_styles_are_offered() -> None:
    registry = StyleRegistry([BUNDLED])
    assert [style.manifest.name for style in registry.styles()] == ["amber", "blueprint", "noir"]
    assert registry.problems() == ()


def test_bundled_styles_change_every_linear_of_wan_tiny() -> None:
    targets = {f"blocks.{n}.{linear}": LoraShape(8, *size) for n in range(6) for linear, size in _SIZES.items()}
    assert all(style.header.targets == targets for style in StyleRegistry([BUNDLED]).styles())


def test_bundled_styles_come_with_a_preview_and_the_card_of_their_training() -> None:
    for style in StyleRegistry([BUNDLED]).styles():
        assert style.manifest.preview is not None
        assert {"README.md", "training.csv", "training.png"} <= {path.name for path in style.folder.iterdir()}
