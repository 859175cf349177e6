"""Dead leaves: random overlapping patches, whose edges and contrasts are distributed as those of photographs.

Lee, Mumford, Huang, "Occlusion models for natural images" (2001); Baradad et al., "Learning to see by looking at
noise" (2021) train on them in place of photographs. Here they are what lets the model keep a photograph.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_LEAVES = 260
_SMALLEST, _LARGEST = 0.016, 0.3  # radius in sides


def leaves(random: np.random.Generator, side: int) -> Tensor:
    """A picture full of leaves: RGB in [0, 1], float32 [3, side, side]."""
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    ground = random.uniform(0.2, 0.8) + random.normal(0, 0.06, 3)
    picture = torch.from_numpy(ground.astype(np.float32)).view(3, 1, 1).expand(3, side, side).clone()
    hue, tint = random.uniform(0.0, 1.0, 3), random.uniform(0.05, 0.3)
    # Numbers fall with the third power of the size, which looks alike at every scale.
    radii = side / np.sqrt(random.uniform(_LARGEST**-2, _SMALLEST**-2, _LEAVES))
    for radius in radii:
        middle, turn, squeeze = random.uniform(0, side, 2), random.uniform(0, math.tau), random.uniform(0.3, 1.0)
        rows, columns = (slice(max(int(at - radius - 1), 0), int(at + radius + 2)) for at in (middle[1], middle[0]))
        dx, dy = x[rows, columns] - middle[0], y[rows, columns] - middle[1]
        along = dx * math.cos(turn) + dy * math.sin(turn)
        across = (dy * math.cos(turn) - dx * math.sin(turn)) / squeeze
        box = random.uniform() < 0.4
        distance = torch.maximum(along.abs(), across.abs()) * math.sqrt(2) if box else torch.hypot(along, across)
        cover = (radius + 0.5 - distance).clamp(0, 1)
        colour = np.clip(random.uniform(0.05, 0.95) + tint * (hue - 0.5) + random.normal(0, 0.06, 3), 0, 1)
        shade = 1 + random.uniform(-0.5, 0.5) * along / (2 * radius)
        leaf = torch.from_numpy(colour.astype(np.float32)).view(3, 1, 1) * shade
        picture[:, rows, columns] = torch.lerp(picture[:, rows, columns], leaf, cover)
    return picture.clamp(0, 1)
