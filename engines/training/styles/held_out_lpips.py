"""LPIPS of what a training's model predicts of the held-out clips: the other way to say when it gets no better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from cinecat.engines.quality.lpips import Lpips
from cinecat.engines.stages import ClipDecoder
from cinecat.engines.training.styles.encoded import EncodedClip

LEAST_SIDE = 32
"""Pixels of a clip's shorter side that LPIPS needs."""


class HeldOutLpips:
    """The distance of predicted clips to the true ones, both through the VAE, whose own errors so do not count."""

    def __init__(self, vae: AutoencoderKLWan, lpips: Lpips, clips: Sequence[EncodedClip]) -> None:
        """Decodes the clips, whose frames are kept on the CPU.

        Args:
            vae: only its decoder is used.
            clips: held out; LEAST_SIDE pixels a side or more.
        """
        self._vae = vae
        self._lpips = lpips
        self._true = [self._frames(clip.clean) for clip in clips]

    def __call__(self, predicted: Sequence[Tensor]) -> float:
        """The mean over the clips, 0 where all are equal.

        Args:
            predicted: normalised latents [16, T, H, W], one for each clip in their order.
        """
        distances = [
            self._lpips(self._frames(latents), true) for latents, true in zip(predicted, self._true, strict=True)
        ]
        return sum(distances) / len(distances)

    @torch.inference_mode()
    def _frames(self, latents: Tensor) -> NDArray[np.uint8]:
        decoder = ClipDecoder.start(self._vae, latents[None].to(self._vae.device))
        parts = []
        while decoder.frame < decoder.total_frames:
            parts.append((decoder.next_frames() * 255.0).round().to(torch.uint8).cpu().numpy())
        return np.concatenate(parts)
