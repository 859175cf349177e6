"""The plan of an image that stands still."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKLWan

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.model import load_vae
from cinecat.engines.tokens.still import plan_still

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vae(micro: Path) -> AutoencoderKLWan:
    return load_vae(find_checkpoint(str(micro)), "cpu")


def test_what_repeats_in_time_merges_over_time_before_anything_else(vae: AutoencoderKLWan) -> None:
    plan = plan_still(vae, IMAGE, 17, 0.6)
    assert plan.tokens == 72
    assert plan.sizes[plan.token_of].tolist() == [1] * 24 + [2] * 96


def test_every_token_is_kept_at_a_ratio_of_one(vae: AutoencoderKLWan) -> None:
    assert plan_still(vae, IMAGE, 9, 1.0).is_uniform


@pytest.mark.parametrize("keep_ratio", [0.1, 1.1])
def test_a_ratio_out_of_reach_is_refused_with_what_is_allowed(vae: AutoencoderKLWan, keep_ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"keep_ratio: {keep_ratio:g} is not between 0\.15 and 1"):
        plan_still(vae, IMAGE, 17, keep_ratio)
