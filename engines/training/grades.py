"""Looks that are put on films by arithmetic: what the bundled styles are trained to imitate.

Each takes and returns uint8 [frames, height, width, 3], sRGB, and changes no frame by another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cinecat.engines.quality.structure import blurred

Frames = NDArray[np.uint8]
Floats = NDArray[np.float32]

_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # BT.709
_AMBER = np.array([1.0, 0.72, 0.34], dtype=np.float32)
_PAPER = np.array([0.06, 0.19, 0.46], dtype=np.float32)
_INK = np.array([0.93, 0.96, 1.0], dtype=np.float32)
_LINE = 1 / 52
"""Standard deviation of the blur whose slope is a line, in short sides; a pixel at least."""


def plain(frames: Frames) -> Frames:
    """The film as it is."""
    return frames


def noir(frames: Frames) -> Frames:
    """Contrasty monochrome that darkens towards the corners."""
    luma = _unit(frames) @ _LUMA
    steep = _smooth((luma - 0.12) / 0.76)
    height, width = luma.shape[1:]
    y = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, None]
    x = np.linspace(-1.0, 1.0, width, dtype=np.float32)[None]
    vignette = 1.0 - 0.3 * (x**2 + y**2) / 2
    return _bytes(np.repeat((steep * vignette)[..., None], 3, axis=-1))


def amber(frames: Frames) -> Frames:
    """A warm, golden light: little is left of blue, highlights are kept."""
    colour = _unit(frames)
    luma = (colour @ _LUMA)[..., None]
    warm = luma**0.9 * _AMBER + (luma**4) * (1.0 - _AMBER) * 0.5
    return _bytes(0.3 * colour * _AMBER + 0.7 * warm)


def blueprint(frames: Frames) -> Frames:
    """Soft white lines where things end, on a wash of blue that is as bright as what it shows.

    The lines are as wide for the frame at every size, and wide enough that a VAE which halves each side three times
    keeps them. What differs as little as the parts of a wall has none.
    """
    colour = _unit(frames)
    wash = _PAPER * (0.4 + 1.2 * (colour @ _LUMA)[..., None])
    sigma = max(min(frames.shape[1:3]) * _LINE, 1.0)
    reach = math.ceil(3 * sigma)
    planes = torch.from_numpy(colour).permute(0, 3, 1, 2)
    padded = functional.pad(planes, (reach, reach, reach, reach), mode="replicate")
    smooth = blurred(padded.flatten(0, 1)[:, None], sigma, reach).view(planes.shape)
    around = functional.pad(smooth, (1, 1, 1, 1), mode="replicate")
    across = (around[:, :, 1:-1, 2:] - around[:, :, 1:-1, :-2]) / 2
    down = (around[:, :, 2:, 1:-1] - around[:, :, :-2, 1:-1]) / 2
    # Of the step between two colours, whatever the width of the line.
    edge = torch.hypot(across, down).amax(dim=1).numpy() * sigma * math.sqrt(math.tau)
    ink = _smooth((edge - 0.18) / 0.24)[..., None]
    return _bytes(wash + ink * (_INK - wash))


GRADES: dict[str, Callable[[Frames], Frames]] = {"none": plain, "noir": noir, "amber": amber, "blueprint": blueprint}
"""Grades by name."""


def _unit(frames: Frames) -> Floats:
    return frames.astype(np.float32) / 255.0


def _bytes(values: NDArray[np.floating[Any]]) -> Frames:
    return (values.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)


def _smooth(values: Floats) -> Floats:
    """0 below 0, 1 above 1, and an S between."""
    inside = values.clip(0.0, 1.0)
    curve: Floats = inside * inside * (3.0 - 2.0 * inside)
    return curve
