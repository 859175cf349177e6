"""Looks that are put on films by arithmetic: what the bundled styles are trained to imitate.

Each takes and returns uint8 [frames, height, width, 3], sRGB, and changes no frame by another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Floats = NDArray[np.float32]

_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # BT.709
_AMBER = np.array([1.0, 0.72, 0.34], dtype=np.float32)
_PAPER = np.array([0.06, 0.19, 0.46], dtype=np.float32)
_INK = np.array([0.93, 0.96, 1.0], dtype=np.float32)


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
    """White lines where brightness or colour changes from one pixel to the next, on a wash of blue that is as bright as
    what it shows.
    """
    wash = _PAPER * (0.4 + 1.2 * (_unit(frames) @ _LUMA)[..., None])
    colour = np.pad(_unit(frames), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    smooth = (colour[:, :-1] + colour[:, 1:]) / 2
    across = np.abs(smooth[:, :, 2:] - smooth[:, :, :-2])
    across = (across[:, :-1] + across[:, 1:]) / 2
    smooth = (colour[:, :, :-1] + colour[:, :, 1:]) / 2
    down = np.abs(smooth[:, 2:] - smooth[:, :-2])
    down = (down[:, :, :-1] + down[:, :, 1:]) / 2
    edge = np.hypot(across, down).max(axis=-1)
    ink = _smooth((edge - 0.06) / 0.22)[..., None]
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
