"""Everything that decides what comes out of an adapter's training."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig

from cinecat.engines.errors import SettingError
from cinecat.engines.training.styles.recipe import StyleRecipe


@dataclass(frozen=True)
class CatRecipe:
    """How a CAT adapter is distilled.

    Attributes:
        rank, alpha: of the LoRA, whose effect is multiplied by alpha / rank.
        steps: optimiser steps, of `accumulation` samples each; the learning rate's cosine ends there.
        learning_rate: its peak, after a warm-up of `warmup` of the steps.
        average: longest decay of the averaged weights.
        rungs: keep ratios that samples are drawn at, as the schedule of steps has them.
        sizes: width and height of the films in pixels, in turn.
        frames: of each film, 4k + 1.
        films: that are trained on, each with one course of the teacher.
        held_out: further films, which are only measured on.
        solver_steps: fewest and most that a course has; few are drawn more often.
        whole_steps: least and greatest share of them that are on all tokens.
        prompt_dropout: part of the courses that see an empty prompt, as the second branch of guidance does.
        evaluate_every: steps between two measurements, each with a checkpoint.
    """

    rank: int = 16
    alpha: float = 16.0
    steps: int = 160
    accumulation: int = 8
    learning_rate: float = 2e-3
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    average: float = 0.98
    rungs: tuple[float, ...] = (0.5, 0.375, 0.25, 0.125)
    sizes: tuple[tuple[int, int], ...] = ((128, 128), (256, 256))
    frames: int = 17
    films: int = 96
    held_out: int = 12
    solver_steps: tuple[int, int] = (8, 30)
    whole_steps: tuple[float, float] = (0.15, 0.7)
    prompt_dropout: float = 0.1
    evaluate_every: int = 20
    seed: int = 0

    @property
    def lora(self) -> StyleRecipe:
        """The LoRA's own part: it changes every linear that a style may."""
        return StyleRecipe(rank=self.rank, alpha=self.alpha, targets="all", seed=self.seed)

    def lora_config(self, layers: int) -> LoraConfig:
        """peft's configuration for `layers` blocks."""
        return self.lora.lora_config(layers)


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Sizes as a command takes them, e.g. "128x128,256x256".

    Raises:
        SettingError: it is none.
    """
    sizes = []
    for word in text.split(","):
        width, _, height = word.strip().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise SettingError(f"sizes: {word.strip()!r} is not WIDTHxHEIGHT, such as 128x128")
        sizes.append((int(width), int(height)))
    return tuple(sizes)
