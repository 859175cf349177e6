"""A token plan as a picture: the frame, tinted by the size of each token, with an outline around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cinecat.engines.tokens.plan import TokenPlan

COLOURS = {1: (0, 0, 0), 2: (0, 158, 115), 4: (240, 228, 66), 8: (213, 94, 0)}
"""sRGB tints by patches per token, told apart by the colour-blind too; tokens of one patch have none."""

_TINT = 0.45
_OUTLINE = np.uint8(255)
_GAP = 8
_LEAST_PATCH_PIXELS = 24


def draw_plan(plan: TokenPlan, frame: NDArray[np.uint8], latent_frames: Sequence[int]) -> NDArray[np.uint8]:
    """Latent frames of a plan side by side, each over the same frame.

    A line parts patches of different tokens; a token that spans two latent frames shows by its tint alone.

    Args:
        frame: uint8 [height, width, 3]; sides that are multiples of the grid's.
        latent_frames: which to draw, left to right.

    Returns:
        uint8, as high as the frame or a multiple of it, so that patches can be told apart, and white between the parts.

    Raises:
        ValueError: the frame does not fit the grid.
    """
    grid = plan.grid
    height, width = frame.shape[0] // grid.height, frame.shape[1] // grid.width
    if (height * grid.height, width * grid.width) != frame.shape[:2] or min(height, width) < 1:
        raise ValueError(f"frame: {frame.shape[1]}x{frame.shape[0]} does not fit {grid.width}x{grid.height} patches")
    scale = -(-_LEAST_PATCH_PIXELS // min(height, width))
    canvas = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    shape = (grid.frames, grid.height, grid.width)
    tokens = plan.token_of.cpu().numpy().reshape(shape)
    sizes = plan.sizes[plan.token_of].cpu().numpy().reshape(shape)
    parts = [_draw(tokens[index], sizes[index], canvas, height * scale, width * scale) for index in latent_frames]
    gap = np.full((canvas.shape[0], _GAP, 3), 255, np.uint8)
    return np.concatenate([part for drawn in parts for part in (gap, drawn)][1:], axis=1)


def _draw(
    tokens: NDArray[np.int64], sizes: NDArray[np.int64], canvas: NDArray[np.uint8], height: int, width: int
) -> NDArray[np.uint8]:
    """One latent frame; `height` and `width` are of a patch, in pixels."""
    spread = np.array([COLOURS[_shown(int(size))] for size in sizes.flat], np.float32).reshape(*sizes.shape, 3)
    tint = _enlarged(spread, height, width)
    weight = _enlarged(np.where(sizes == 1, 0.0, _TINT)[..., None], height, width)
    picture: NDArray[np.uint8] = (canvas * (1.0 - weight) + tint * weight).round().astype(np.uint8)
    ids = _enlarged(tokens, height, width)
    picture[1:][ids[1:] != ids[:-1]] = _OUTLINE
    picture[:, 1:][ids[:, 1:] != ids[:, :-1]] = _OUTLINE
    return picture


def _shown(size: int) -> int:
    """The largest size with a colour that is not above this one."""
    return max(known for known in COLOURS if known <= size)


def _enlarged(values: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    return values.repeat(height, axis=0).repeat(width, axis=1)
