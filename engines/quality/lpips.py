"""LPIPS (Zhang et al., 2018, version 0.1) on AlexNet, from weights that the user brings.

One safetensors file holds both parts: the trunk under torchvision's names, `features.{0,3,6,8,10}.{weight,bias}`, and
the linear heads under those of the `lpips` package, `lin{0..4}.model.1.weight` [1, channels, 1, 1]. Other keys are left
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from cinecat.engines.quality.weights import WeightsError

Frames = NDArray[np.uint8]

SHAPES: dict[str, tuple[int, ...]] = {
    "features.0.weight": (64, 3, 11, 11),
    "features.0.bias": (64,),
    "features.3.weight": (192, 64, 5, 5),
    "features.3.bias": (192,),
    "features.6.weight": (384, 192, 3, 3),
    "features.6.bias": (384,),
    "features.8.weight": (256, 384, 3, 3),
    "features.8.bias": (256,),
    "features.10.weight": (256, 256, 3, 3),
    "features.10.bias": (256,),
    "lin0.model.1.weight": (1, 64, 1, 1),
    "lin1.model.1.weight": (1, 192, 1, 1),
    "lin2.model.1.weight": (1, 384, 1, 1),
    "lin3.model.1.weight": (1, 256, 1, 1),
    "lin4.model.1.weight": (1, 256, 1, 1),
}
"""What the file must hold, by key."""

# Layer, stride, padding, and whether the map is pooled before it.
_LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_TINY = 1e-10
_CHUNK = 16
"""Frames at once."""


class Lpips:
    """The distance of two clips of one shape, with 32 pixels a side or more; 0 where they are equal."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Args:
        weights: of SHAPES.
        """
        self._weights = {key: weights[key].float() for key in SHAPES}
        self._shift = torch.tensor(_SHIFT).view(1, 3, 1, 1)
        self._scale = torch.tensor(_SCALE).view(1, 3, 1, 1)

    @torch.inference_mode()
    def __call__(self, a: Frames, b: Frames) -> float:
        """The mean over the frames of clips uint8 [frames, height, width, 3]."""
        values = [
            self._distance(_signed(a[start : start + _CHUNK]), _signed(b[start : start + _CHUNK]))
            for start in range(0, len(a), _CHUNK)
        ]
        return float(torch.cat(values).mean())

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Of pictures [N, 3, H, W] in -1 to 1, each to its twin: [N]."""
        total = torch.zeros(len(a))
        for level, (first, second) in enumerate(zip(self._features(a), self._features(b), strict=True)):
            difference = (_unit(first) - _unit(second)).square()
            total += functional.conv2d(difference, self._weights[f"lin{level}.model.1.weight"]).mean(dim=(1, 2, 3))
        return total

    def _features(self, pictures: Tensor) -> list[Tensor]:
        x = (pictures - self._shift) / self._scale
        maps = []
        for layer, stride, padding, pooled in _LAYERS:
            x = functional.max_pool2d(x, 3, 2) if pooled else x
            weight, bias = self._weights[f"features.{layer}.weight"], self._weights[f"features.{layer}.bias"]
            x = functional.conv2d(x, weight, bias, stride, padding).relu()
            maps.append(x)
        return maps


def load_lpips(path: Path) -> Lpips:
    """Reads the weights. Raises WeightsError for a file that does not hold them."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"lpips-weights: {path} cannot be read as safetensors ({error})") from error
    for key, shape in SHAPES.items():
        there = tuple(weights[key].shape) if key in weights else None
        if there != shape:
            found = f"has it as {list(there)}" if there else "has no such key"
            raise WeightsError(f"lpips-weights: {key} {list(shape)} is needed, and {path} {found}")
    return Lpips(weights)


def _signed(frames: Frames) -> Tensor:
    return torch.from_numpy(frames.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1.0


def _unit(maps: Tensor) -> Tensor:
    return maps / (maps.square().sum(dim=1, keepdim=True).sqrt() + _TINY)
