"""Metrics of pixels."""

from __future__ import annotations

import numpy as np
import pytest

from cinecat.engines.quality.pixels import MOST_DECIBELS, psnr, ssim, temporal_flicker
from tests.engines.quality.samples import noisy, panned

CLIP = panned()


def test_equal_clips_have_the_best_scores() -> None:
    assert (psnr(CLIP, CLIP), ssim(CLIP, CLIP)) == (MOST_DECIBELS, 1.0)


def test_an_error_of_one_tenth_of_the_peak_is_20_decibels() -> None:
    grey = np.full((2, 32, 32, 3), 100, dtype=np.uint8)
    assert psnr(grey + np.uint8(25), grey) == pytest.approx(20.17, abs=0.01)


def test_more_noise_is_worse() -> None:
    little, much = noisy(CLIP, 5.0), noisy(CLIP, 20.0)
    assert psnr(CLIP, CLIP) > psnr(little, CLIP) > psnr(much, CLIP)
    assert ssim(CLIP, CLIP) > ssim(little, CLIP) > ssim(much, CLIP)


def test_a_still_does_not_flicker_and_a_strobe_does() -> None:
    still = np.full((4, 32, 32, 3), 100, dtype=np.uint8)
    strobe = still.copy()
    strobe[1::2] += 51
    assert temporal_flicker(still) == 1.0
    assert temporal_flicker(strobe) == pytest.approx(0.8)
    assert temporal_flicker(strobe[::-1]) == pytest.approx(0.8)
