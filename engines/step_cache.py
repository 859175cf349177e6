"""Step caching: what the model predicted in steps at full tokens, and what the steps between them make of it.

A cached step runs nothing. The clean prediction of the last two steps that ran is carried on linearly in sigma, the
share of noise, and the velocity follows from the clip's own latents. Feature caches of the literature (TeaCache, arXiv
2411.19108, among them) keep what layers put out; this one keeps no more than two tensors as large as the latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Remembered:
    """What the last steps at full tokens predicted.

    Attributes:
        predictions: sigma and clean latents [1, 16, T, H, W] of at most two, the earlier first.
    """

    predictions: tuple[tuple[float, Tensor], ...] = ()

    def with_step(self, sigma: float, clean: Tensor) -> Remembered:
        """After another step at full tokens."""
        return Remembered((*self.predictions[-1:], (sigma, clean)))

    @property
    def last(self) -> Tensor:
        """As the last of them predicted; there must be one."""
        return self.predictions[-1][1]

    def carried_on(self, sigma: float) -> Tensor:
        """The clean latents at a sigma: on the line through both predictions, or the only one as it is."""
        last_sigma, last = self.predictions[-1]
        before_sigma, before = self.predictions[0]
        # Solvers that round timesteps to whole numbers may give two steps of many the same.
        if before_sigma == last_sigma:
            return last
        return last + (last - before) * (sigma - last_sigma) / (last_sigma - before_sigma)


def velocity_towards(clean: Tensor, latents: Tensor, sigma: float) -> Tensor:
    """The velocity by which latents at a sigma have that clean prediction; all three are of one shape."""
    # Solvers that round timesteps may call the last traces of noise none. Then there is nowhere to go.
    if sigma == 0.0:
        return torch.zeros_like(latents)
    return (latents - clean) / sigma


def state_bytes(latents: Tensor) -> int:
    """What is remembered, for latents of a size, once two steps have run."""
    return 2 * latents.numel() * 4
