"""Clips, encoded and as files, and how a training is stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cinecat.engines.training.film_set import write_video
from cinecat.engines.training.styles import trainer
from cinecat.engines.training.styles.encoded import EncodedClip
from cinecat.engines.training.styles.recipe import StyleRecipe
from tests.engines.samples import IMAGE, TEXT

RECIPE = StyleRecipe(rank=2, alpha=4.0, steps=4, accumulation=2, evaluate_every=2, learning_rate=1e-2)


def encoded_clips(count: int) -> list[EncodedClip]:
    """For tests.engines.samples.small_transformer, 2 latent frames of 4x4."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    return [EncodedClip(drawn(16, 2, 4, 4), drawn(20, 2, 4, 4), drawn(5, TEXT), drawn(3, IMAGE)) for _ in range(count)]


def picture(frames: int = 6, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    """White on the left and black on the right, brighter by the frame: uint8 [frames, height, width, 3]."""
    film = np.zeros((frames, height, width, 3), dtype=np.uint8)
    film[:, :, : width // 2] = 200
    return film + np.arange(0, 4 * frames, 4, dtype=np.uint8)[:, None, None, None]


def write_clip(path: Path, caption: str = "", frames: int = 6, fps: float = 8.0) -> Path:
    write_video(path, picture(frames), fps)
    if caption:
        path.with_suffix(".txt").write_text(caption)
    return path


@contextmanager
def killed_at(sample: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it a training dies when it draws that sample."""
    drawn = trainer._Sampler.loss

    def deadly(self: trainer._Sampler, model: object, number: int) -> torch.Tensor:
        if number == sample:
            raise Killed
        return drawn(self, model, number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Sampler, "loss", deadly)
        with pytest.raises(Killed):
            yield


class Killed(Exception):
    """Stands for a killed process."""
