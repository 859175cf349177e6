"""LPIPS of predicted latents, on a micro VAE and random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.model import load_vae_decoder
from cinecat.engines.quality.lpips import Lpips
from cinecat.engines.training.styles.encoded import EncodedClip
from cinecat.engines.training.styles.held_out_lpips import HeldOutLpips
from tests.engines.quality.samples import random_lpips_weights

NOTHING = torch.zeros(0)


def drawn(seed: int) -> Tensor:
    """Latents of 5 frames of 32x48."""
    return torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def judge(micro: Path) -> HeldOutLpips:
    clips = [EncodedClip(drawn(seed), NOTHING, NOTHING, NOTHING) for seed in (1, 2)]
    vae = load_vae_decoder(find_checkpoint(str(micro)), "cpu")
    return HeldOutLpips(vae, Lpips(random_lpips_weights()), clips)


def test_what_was_held_out_is_at_no_distance(judge: HeldOutLpips) -> None:
    assert judge([drawn(1), drawn(2)]) == 0.0


def test_it_grows_with_the_error_of_the_prediction(judge: HeldOutLpips) -> None:
    distances = [judge([drawn(1), drawn(2) + error * drawn(3)]) for error in (0.1, 0.3, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_it_is_the_mean_over_the_clips_in_their_order(judge: HeldOutLpips) -> None:
    first, second = judge([drawn(3), drawn(2)]), judge([drawn(1), drawn(3)])
    assert judge([drawn(3), drawn(3)]) == pytest.approx(first + second)
    assert judge([drawn(2), drawn(1)]) > 0
