"""FVD (Unterthiner et al., 2018): how far two sets of clips are apart in what I3D sees; the user brings its trunk.

The trunk is the TorchScript file that StyleGAN-V and its successors compute FVD with, `i3d_torchscript.pt`: called with
clips float32 [N, 3, frames, height, width] in 0 to 255 and `rescale=True, resize=True, return_features=True`, it gives
400 logits a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from cinecat.engines.quality.weights import WeightsError

Frames = NDArray[np.uint8]
Features = NDArray[np.float64]

LEAST_FRAMES = 10
"""Of a clip: I3D halves the time three times."""


class FvdTrunk:
    """Features of clips."""

    def __init__(self, trunk: Any) -> None:
        self._trunk = trunk

    @torch.inference_mode()
    def __call__(self, clip: Frames) -> Features:
        """Of one clip uint8 [frames, height, width, 3] of at least LEAST_FRAMES: [features].

        Raises:
            WeightsError: the trunk does not take clips as StyleGAN-V's does.
        """
        video = torch.from_numpy(clip.transpose(3, 0, 1, 2).astype(np.float32))[None]
        try:
            features = self._trunk(video, rescale=True, resize=True, return_features=True)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1]
            raise WeightsError(f"fvd-weights: the trunk does not take clips as StyleGAN-V's does ({first})") from error
        return np.asarray(features[0], dtype=np.float64)


def load_fvd(path: Path) -> FvdTrunk:
    """Reads the trunk. Raises WeightsError for a file that is no TorchScript."""
    if not path.is_file():
        raise WeightsError(f"fvd-weights: {path} is not a file; give StyleGAN-V's i3d_torchscript.pt")
    try:
        trunk = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise WeightsError(
            f"fvd-weights: {path} is no TorchScript file; give StyleGAN-V's i3d_torchscript.pt"
        ) from error
    return FvdTrunk(trunk.eval())


def frechet_distance(a: Sequence[Features], b: Sequence[Features]) -> float:
    """Of two sets of features, each taken for a Gaussian, two samples or more: 0 where they are equal."""
    first, second = np.stack(a), np.stack(b)
    one, other = np.atleast_2d(np.cov(first, rowvar=False)), np.atleast_2d(np.cov(second, rowvar=False))
    cross = np.real(np.trace(sqrtm(one @ other)))
    means = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    return float(max(0.0, means + np.trace(one) + np.trace(other) - 2 * cross))
