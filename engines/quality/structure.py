"""SSIM over several scales, of clips uint8 [frames, height, width, 3]; with torch, since it is asked for often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Frames = NDArray[np.uint8]

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponent of every scale, the finest first (Wang, Simoncelli and Bovik, 2003)."""

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
LEAST_SIDE = _WINDOW * 2 ** (len(WEIGHTS) - 1)
"""Pixels a side that five scales need."""


@dataclass(frozen=True)
class Structure:
    """How alike two clips are in structure, 1 where they are equal.

    Attributes:
        ssim: as `pixels.ssim` defines it.
        ms_ssim: over five scales; None for clips too small for them.
    """

    ssim: float
    ms_ssim: float | None


def structure(a: Frames, b: Frames) -> Structure:
    """Compares two clips of one shape, with 11 pixels a side or more; means over frames and channels."""
    first, second = (torch.from_numpy(clip).permute(0, 3, 1, 2).flatten(0, 1)[:, None].float() for clip in (a, b))
    luminance, contrast = _terms(first, second)
    ssim = float((luminance * contrast).mean())
    if min(a.shape[1:3]) < LEAST_SIDE:
        return Structure(ssim, None)
    product = torch.ones(len(first))
    for scale, weight in enumerate(WEIGHTS):
        last = scale == len(WEIGHTS) - 1
        term = (luminance * contrast if last else contrast).mean(dim=(1, 2, 3)).clamp(min=0.0)
        product = product * term**weight
        if not last:
            first, second = (functional.avg_pool2d(images, 2) for images in (first, second))
            luminance, contrast = _terms(first, second)
    return Structure(ssim, float(product.mean()))


def _terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure maps of images [count, 1, height, width], where the window fits."""
    mean_a, mean_b = _window(first), _window(second)
    squares_a, squares_b, product = mean_a.square(), mean_b.square(), mean_a * mean_b
    spread = _window(first.square() + second.square()) - squares_a - squares_b
    together = _window(first * second) - product
    return (2 * product + _C1) / (squares_a + squares_b + _C1), (2 * together + _C2) / (spread + _C2)


def _window(images: Tensor) -> Tensor:
    return blurred(images, _SIGMA, _WINDOW // 2)


def blurred(images: Tensor, sigma: float, reach: int) -> Tensor:
    """Images [count, 1, height, width] under a Gaussian, in pixels, that ends `reach` from its middle; only where it
    fits, so that each side is 2 x reach shorter."""
    place = torch.arange(-reach, reach + 1)
    kernel = (-(place.double() ** 2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).float()
    rows = functional.conv2d(images, kernel.view(1, 1, -1, 1))
    return functional.conv2d(rows, kernel.view(1, 1, 1, -1))
