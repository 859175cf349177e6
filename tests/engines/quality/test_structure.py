"""SSIM over scales agrees with SSIM where there is one, and falls as clips differ."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cinecat.engines.quality.pixels import ssim
from cinecat.engines.quality.structure import LEAST_SIDE, structure


def clip(side: int, seed: int = 0) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    waves = np.sin(np.arange(side)[:, None] / 5) * np.cos(np.arange(side)[None] / 7)
    frames = 128 + 60 * waves[None, :, :, None] + random.normal(0, 10, (2, side, side, 3))
    return np.clip(frames, 0, 255).astype(np.uint8)


def test_ssim_is_what_it_is_elsewhere() -> None:
    a, b = clip(48), clip(48, seed=1)
    assert structure(a, b).ssim == pytest.approx(ssim(a, b), abs=1e-4)


def test_equal_clips_have_one() -> None:
    a = clip(LEAST_SIDE)
    found = structure(a, a)
    assert (found.ssim, found.ms_ssim) == (pytest.approx(1.0), pytest.approx(1.0))


def test_noise_costs_less_over_all_scales_than_at_the_finest() -> None:
    found = structure(clip(LEAST_SIDE), clip(LEAST_SIDE, seed=1))
    assert found.ms_ssim is not None
    assert found.ssim < found.ms_ssim < 1.0


def test_small_clips_have_no_scales() -> None:
    assert structure(clip(LEAST_SIDE - 1), clip(LEAST_SIDE - 1)).ms_ssim is None
