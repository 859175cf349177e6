"""Metrics of pixels, on clips uint8 [frames, height, width, 3]."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import mean_squared_error, structural_similarity

Frames = NDArray[np.uint8]

MOST_DECIBELS = 99.0
"""What the PSNR of equal clips is called, so that a mean over clips stays finite."""


def psnr(a: Frames, b: Frames) -> float:
    """Decibels of the mean squared error over all values of two clips of one shape, for a peak of 255; at most 99."""
    error = float(mean_squared_error(a, b))
    return MOST_DECIBELS if error == 0 else min(MOST_DECIBELS, 10 * math.log10(255**2 / error))


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity, the mean over frames and channels: 1 where they are equal.

    With the Gaussian window and the constants of Wang et al. (2004). Frames have 11 pixels a side or more.
    """
    return float(
        np.mean(
            [
                structural_similarity(
                    first,
                    second,
                    channel_axis=2,
                    data_range=255,
                    gaussian_weights=True,
                    sigma=1.5,
                    use_sample_covariance=False,
                )
                for first, second in zip(a, b, strict=True)
            ]
        )
    )


def temporal_flicker(clip: Frames) -> float:
    """(255 - mean |difference of frames that follow each other|) / 255, as VBench defines it: 1 where nothing changes.

    Motion lowers it as flicker does; compare it between clips of the same motion. At least two frames.
    """
    change = np.mean([np.abs(after.astype(np.int16) - before).mean() for before, after in itertools.pairwise(clip)])
    return float((255.0 - change) / 255.0)
