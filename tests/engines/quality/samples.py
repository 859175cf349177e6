"""Clips of which it is known how they move, folders of them, and weights for LPIPS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.filters import gaussian
from torch import Tensor

from cinecat.engines.quality.lpips import SHAPES
from cinecat.engines.training.film_set import write_video

Frames = NDArray[np.uint8]


def panned(pixels_a_frame: float = 2.0, frames: int = 4, side: int = 48, seed: int = 0) -> Frames:
    """A soft random texture that moves to the right: uint8 [frames, side, side, 3]."""
    way = round(pixels_a_frame * (frames - 1))
    wall = np.random.default_rng(seed).uniform(size=(side, side + way, 3))
    wall = gaussian(wall, 2.0, channel_axis=2)
    wall = (wall - wall.min()) / (wall.max() - wall.min()) * 255
    starts = [way - round(pixels_a_frame * index) for index in range(frames)]
    return np.stack([wall[:, start : start + side] for start in starts]).astype(np.uint8)


def noisy(clip: Frames, amount: float, seed: int = 1) -> Frames:
    """The clip with fresh noise in every frame; `amount` is its deviation in grey levels."""
    noise = np.random.default_rng(seed).normal(0, amount, clip.shape)
    return (clip + noise).clip(0, 255).astype(np.uint8)


def random_lpips_weights() -> dict[str, Tensor]:
    """The same every time; distances of different pictures are neither 0 nor alike."""
    draw = torch.Generator().manual_seed(0)
    drawn = {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()}
    return {
        key: value.abs() if key.startswith("lin") else value * (2 / max(1, value[0].numel())) ** 0.5
        for key, value in drawn.items()
    }


def write_folder(folder: Path, clips: dict[str, Frames], fps: float = 8.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, clip in clips.items():
        write_video(folder / name, clip, fps)
    return folder
