"""Pictures of a clip in the making, as the messages that its watchers get."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.v1 import job_pb2 as pb

MAX_SIDE = 512
"""Pixels along the longer side of a picture, at most."""

_QUALITY = 80
# WebP's effort, 0 to 6: the default of 4 takes twice the time for files a few per cent smaller.
_METHOD = 2


def estimate(step: int, pictures: NDArray[np.uint8]) -> pb.Preview:
    """What a clip is expected to become.

    Args:
        step: after which denoising step, from 1.
        pictures: uint8 [latent frames, h, w, 3], sRGB. The first is of the clip's frame 0; each later one stands for 4
            frames, and is told as the last of them.
    """
    frames = [pb.PreviewFrame(index=i * VAE_TEMPORAL_STRIDE, webp=webp(picture)) for i, picture in enumerate(pictures)]
    return pb.Preview(step=step, frames=frames)


def decoded(first: int, frames: NDArray[Any]) -> pb.Preview:
    """Decoded frames.

    Args:
        first: index of the first of them in the clip.
        frames: [count, height, width, 3], sRGB; uint8, or floating point in [0, 1].
    """
    return pb.Preview(frames=[pb.PreviewFrame(index=first + i, webp=webp(frame)) for i, frame in enumerate(frames)])


def webp(picture: NDArray[Any]) -> bytes:
    """A WebP file of a picture [height, width, 3], sRGB, uint8 or floating point in [0, 1], of MAX_SIDE at most."""
    if picture.dtype != np.uint8:
        picture = (np.clip(picture, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    image = Image.fromarray(picture)
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY, method=_METHOD)
    return file.getvalue()
