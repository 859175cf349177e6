"""Everything that decides what comes out of a style's training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft import LoraConfig

from cinecat.engines.errors import SettingError
from cinecat.plugins.adapter_file import LoraShape

_CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "attn2.add_k_proj", "attn2.add_v_proj")
_SELF = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
_FEED_FORWARD = ("ffn.net.0.proj", "ffn.net.2")

TARGETS: dict[str, tuple[str, ...]] = {
    "cross-attention": _CROSS,
    "attention": (*_CROSS, *_SELF),
    "all": (*_CROSS, *_SELF, *_FEED_FORWARD),
}
"""Linears of every block that a style may change, by the word that chooses them."""


@dataclass(frozen=True)
class StyleRecipe:
    """How a style is trained; the defaults are those of arXiv 2510.27364 where it names them.

    Attributes:
        targets: a key of TARGETS.
        steps: optimiser steps at most, of `accumulation` clips each (on every process).
        learning_rate: its peak, after a warm-up of `warmup` of the steps; a cosine follows.
        held_out: part of the clips that is only measured on, at least one clip.
        evaluate_every: steps between two measurements on them.
        patience: measurements without a new best after which the training stops.
        prompt_template: what becomes of each caption, as it will of each prompt; empty leaves them as they are.
        checkpoint_activations: computes each block again on the way back rather than keep what is inside.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "cross-attention"
    steps: int = 500
    accumulation: int = 4
    learning_rate: float = 1e-4
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    held_out: float = 0.15
    evaluate_every: int = 25
    patience: int = 6
    prompt_template: str = ""
    checkpoint_activations: bool = True
    seed: int = 0

    def lora_config(self, layers: int) -> LoraConfig:
        """peft's configuration, with the targets of `layers` blocks named one by one."""
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self._modules(layers))

    def check_start(self, shapes: Mapping[str, LoraShape], layers: int) -> None:
        """Raises SettingError for a LoRA that this recipe cannot train further: of other layers, or another rank."""
        if shapes.keys() != set(self._modules(layers)):
            raise SettingError(
                f"start: it changes {len(shapes)} layers, which are not the {len(self._modules(layers))} of "
                f"targets {self.targets!r}; choose the targets that it was trained with"
            )
        ranks = sorted({shape.rank for shape in shapes.values()})
        if ranks != [self.rank]:
            raise SettingError(f"start: its rank is {', '.join(map(str, ranks))}, and rank is {self.rank}")

    def _modules(self, layers: int) -> list[str]:
        return [f"blocks.{layer}.{target}" for layer in range(layers) for target in TARGETS[self.targets]]
