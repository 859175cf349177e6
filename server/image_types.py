"""What the image readers share: the one error they raise, and pixels before they become sRGB."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class ImageError(ValueError):
    """The bytes are not an image that can be used; the message is a sentence for the person who sent them."""


@dataclass(frozen=True, slots=True, eq=False)
class RawImage:
    """Pixels as a file stores them, in 8 bits.

    colour: uint8 [height, width, 1 (grey) | 3 (RGB) | 4 (CMYK)], not multiplied by alpha.
    alpha: uint8 [height, width], or None when the image is opaque.
    orientation: how EXIF says the pixels are to be turned, 1 to 8.
    icc_profile: the embedded colour profile, or None.
    """

    colour: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None
    orientation: int
    icc_profile: bytes | None
    notes: tuple[str, ...]


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises ImageError unless width x height is between one pixel and max_pixels."""
    if width <= 0 or height <= 0:
        raise ImageError(f"the image has no pixels: its header says {width}x{height}")
    if width * height > max_pixels:
        raise ImageError(
            f"the image has {width}x{height} = {width * height:,} pixels; at most {max_pixels:,} are allowed, "
            "so send a smaller one"
        )


def to_8_bits(samples: NDArray[np.unsignedinteger], maximum: int) -> NDArray[np.uint8]:
    """Scales unsigned samples from 0..maximum to 0..255, rounding to the nearest."""
    if maximum == 255:
        return samples.astype(np.uint8, copy=False)
    if maximum <= 65535:
        table = ((np.arange(maximum + 1, dtype=np.uint32) * 255 + maximum // 2) // maximum).astype(np.uint8)
        return table.take(samples, mode="clip")
    reduced = np.empty(samples.shape, np.uint8)
    for row in range(len(samples)):
        reduced[row] = np.rint(samples[row] * (255 / maximum))
    return reduced
