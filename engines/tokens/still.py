"""The token plan of an image whose clip is taken to stand still: all the redundancy in time that there can be."""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray

from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.stages import encode_condition
from cinecat.engines.tokens import path
from cinecat.engines.tokens.adaptive import price
from cinecat.engines.tokens.budget import least_keep_ratio
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan
from cinecat.engines.tokens.schedule import rung_tokens

CONDITION_MASK = 4
"""Channels of the condition before the image's latents."""


@torch.inference_mode()
def plan_still(vae: AutoencoderKLWan, image: NDArray[np.uint8], frames: int, keep_ratio: float) -> TokenPlan:
    """Plans one step of a clip whose every latent frame is the image's.

    Args:
        image: uint8 [height, width, 3]; sides that are multiples of 16.
        frames: of the clip, 4k + 1.
        keep_ratio: of the step.

    Raises:
        ValueError: the clip allows no such keep ratio.
    """
    latents = encode_condition(vae, image, 1)[:, CONDITION_MASK:]
    still = latents.expand(-1, -1, (frames - 1) // VAE_TEMPORAL_STRIDE + 1, -1, -1)
    grid = Grid(still.shape[2], still.shape[3] // path.PATCH, still.shape[4] // path.PATCH)
    least = least_keep_ratio(grid)
    if not least <= keep_ratio <= 1.0:
        allowed = math.ceil(least * 1000) / 1000
        raise ValueError(f"keep_ratio: {keep_ratio:g} is not between {allowed:g} and 1, which is what this size allows")
    return price(grid, still).allocate(rung_tokens(grid, keep_ratio))
