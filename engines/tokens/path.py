"""How a forward runs on fewer tokens: merged on the way in, unmerged in clean space on the way out.

A token stands for patches whose clean content is alike, but whose noise is not: noise is independent. So the token's
input is the mean of its patches' estimated clean content plus the mean of their noise, scaled back to the variance that
the timestep promises. Its output gives one clean prediction x0 = x - sigma v. By how much that differs from the mean of
its patches in the clean prediction that there is, carried on from steps at full tokens (`engines.step_cache`), is what
the token has to say; each of its n patches follows it by an nth, and its velocity follows from its own noisy latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cinecat.engines.tokens.plan import TokenPlan

PATCH = 2
"""Latents along each side of a base patch."""

_PAIRS = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}
"""Numbers as wide as two latents."""


def to_patches(latents: Tensor) -> Tensor:
    """[rows, channels, T, H, W] to [rows, T x H/2 x W/2, channels x 4], patches in raster order."""
    rows, channels, frames, height, width = latents.shape
    pair = _PAIRS.get(latents.dtype)
    if pair is not None and latents.is_contiguous() and not latents.requires_grad:
        # Neighbours in a row move as one number: three times as fast on a CPU.
        pairs = latents.view(pair).view(rows, channels, frames, height // PATCH, PATCH, width // PATCH)
        moved = pairs.permute(0, 2, 3, 5, 1, 4).contiguous().view(latents.dtype)
        return moved.view(rows, -1, channels * PATCH**2)
    split = latents.reshape(rows, channels, frames, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.permute(0, 2, 3, 5, 1, 4, 6).reshape(rows, -1, channels * PATCH**2)


def from_patches(patches: Tensor, latent_shape: torch.Size) -> Tensor:
    """Undoes `to_patches`; only time, height and width of the shape matter."""
    frames, height, width = latent_shape[-3:]
    rows, channels = patches.shape[0], patches.shape[2] // PATCH**2
    split = patches.reshape(rows, frames, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return split.permute(0, 4, 1, 2, 5, 3, 6).reshape(rows, channels, frames, height, width)


def merge(plan: TokenPlan, noisy: Tensor, prediction: Tensor, sigma: float) -> Tensor:
    """The tokens' noisy content [rows, tokens, channels].

    Args:
        noisy: (1 - sigma) clean + sigma noise, [rows, patches, channels].
        prediction: of the clean content, by steps before, of the same shape.
        sigma: of the step, 0 to 1.
    """
    noise = plan.mean(noisy - (1.0 - sigma) * prediction)
    return (1.0 - sigma) * plan.mean(prediction) + noise * plan.sizes.to(noise.dtype).sqrt().view(1, -1, 1)


def unmerge(plan: TokenPlan, clean: Tensor, prediction: Tensor) -> Tensor:
    """Clean content of every patch [rows, patches, channels], from its token's.

    A patch follows its token by 1 / size. What merged tokens predict is less to be trusted than what the patches had
    before: on wan-tiny the best share, by least squares over one step, is 0.3 at two patches, 0.1 at four and 0.05 at
    eight, and over all steps an nth is 2 to 5 dB better than following in full (docs/token-allocation.md).

    Args:
        clean: [rows, tokens, channels].
        prediction: of the clean content, by steps before, [rows, patches, channels].
    """
    change = clean - plan.mean(prediction)
    return prediction + plan.spread(change / plan.sizes.to(change.dtype).view(1, -1, 1))
