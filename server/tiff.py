"""TIFF files: their layout, read before anything is decoded, and the pixels of those that Pillow cannot read."""

from __future__ import annotations

import io
import itertools
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from cinecat.server.image_types import ImageError, RawImage, check_size, to_8_bits

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TYPE_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_MAX_ENTRIES = 4096
_MAX_VALUES = 1_000_000
_MAX_SAMPLES = 6

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_ORIENTATION, _SAMPLES, _TILE_WIDTH, _TILE_HEIGHT = 274, 277, 322, 323
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _ICC_PROFILE = 338, 339, 34675

# Those whose output is bounded by the size of the strip, whatever the compressed bytes say.
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate"}
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _CMYK = 0, 1, 2, 5
_COLOUR_SAMPLES = {_MIN_IS_WHITE: 1, _MIN_IS_BLACK: 1, _RGB: 3, _CMYK: 4}
_UNSIGNED, _FLOAT = 1, 3
_PREMULTIPLIED, _STRAIGHT = 1, 2


@dataclass(frozen=True, slots=True)
class TiffLayout:
    """What the first directory of a TIFF file declares. `bits` is the depth of the deepest sample."""

    width: int
    height: int
    bits: int
    samples: int
    sample_format: int
    photometric: int
    compression: int
    extra_samples: tuple[int, ...]
    orientation: int
    icc_profile: bytes | None
    several_pages: bool

    @property
    def is_deep(self) -> bool:
        """True when a sample does not fit 8 bits."""
        return self.bits > 8 or self.sample_format != _UNSIGNED


def read_layout(data: bytes, max_pixels: int) -> TiffLayout:
    """Reads the first directory. Raises ImageError for a broken one, and for sizes that are not allowed."""
    try:
        directory = _read_directory(data)
    except struct.error as error:
        raise ImageError("the image is truncated or damaged (TIFF: its directory is cut off); send it again") from error

    values = directory.values

    def number(tag: int, default: int) -> int:
        return int(values.get(tag, (default,))[0])

    width, height = number(_WIDTH, 0), number(_HEIGHT, 0)
    check_size(width, height, max_pixels)
    if number(_TILE_WIDTH, 1) * number(_TILE_HEIGHT, 1) > max(max_pixels, 1 << 20):
        raise ImageError(
            f"the image declares tiles of {number(_TILE_WIDTH, 1)}x{number(_TILE_HEIGHT, 1)} pixels, larger than any "
            f"image that is allowed ({max_pixels:,} pixels)"
        )
    samples = number(_SAMPLES, 1)
    if not 1 <= samples <= _MAX_SAMPLES:
        raise ImageError(f"the image has {samples} samples per pixel; at most {_MAX_SAMPLES} can be read")
    orientation = number(_ORIENTATION, 1)
    return TiffLayout(
        width=width,
        height=height,
        bits=max(values.get(_BITS, (1,))),
        samples=samples,
        sample_format=max(values.get(_SAMPLE_FORMAT, (_UNSIGNED,))),
        photometric=number(_PHOTOMETRIC, _MIN_IS_BLACK),
        compression=number(_COMPRESSION, 1),
        extra_samples=tuple(values.get(_EXTRA_SAMPLES, ())),
        orientation=orientation if 1 <= orientation <= 8 else 1,
        icc_profile=directory.icc_profile,
        several_pages=directory.several_pages,
    )


def decode_page(data: bytes, layout: TiffLayout) -> RawImage:
    """Decodes the first page of a TIFF that Pillow cannot read, or would read at too low a depth.

    Raises ImageError for a layout that cannot be read; for broken data whatever tifffile raises.
    """
    _check_readable(layout)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        _check_segments(page, layout, len(data))
        pixels = np.asarray(page.asarray(squeeze=False, maxworkers=1))
    # [planes, depth, height, width, samples of a plane] becomes [height, width, samples].
    pixels = np.moveaxis(pixels[:, 0], 0, -2).reshape(layout.height, layout.width, layout.samples)
    reduced, notes = _reduce(pixels, layout)

    colours = _COLOUR_SAMPLES[layout.photometric]
    colour = reduced[..., :colours]
    if layout.photometric == _MIN_IS_WHITE:
        colour = 255 - colour
    alpha: NDArray[np.uint8] | None = None
    if layout.extra_samples and layout.extra_samples[0] in (_PREMULTIPLIED, _STRAIGHT):
        alpha = np.ascontiguousarray(reduced[..., colours])
        if layout.extra_samples[0] == _PREMULTIPLIED:
            colour = _divided_by_alpha(colour, alpha)
    return RawImage(np.ascontiguousarray(colour), alpha, layout.orientation, layout.icc_profile, notes)


@dataclass(frozen=True, slots=True)
class _Directory:
    """Values of the tags that hold a few whole numbers, and the colour profile."""

    values: dict[int, tuple[int, ...]]
    icc_profile: bytes | None
    several_pages: bool


def _read_directory(data: bytes) -> _Directory:
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    header, count_code, entry, inline = (8, "Q", "HHQ", 8) if big else (4, "H", "HHI", 4)
    offset_code = "Q" if big else "I"
    (start,) = struct.unpack_from(order + offset_code, data, header)
    (entries,) = struct.unpack_from(order + count_code, data, start)
    if entries > _MAX_ENTRIES:
        raise ImageError(f"the image is damaged (TIFF: a directory of {entries:,} entries)")
    position = start + struct.calcsize(order + count_code)
    values: dict[int, tuple[int, ...]] = {}
    icc_profile: bytes | None = None
    seen: set[int] = set()
    total = 0
    for _ in range(entries):
        tag, kind, count = struct.unpack_from(order + entry, data, position)
        value_at = position + struct.calcsize(order + entry)
        position = value_at + inline
        size = count * _TYPE_BYTES.get(kind, 1)
        if size > inline:
            (value_at,) = struct.unpack_from(order + offset_code, data, value_at)
            total += size
        # Entries that overlap or repeat could ask a reader for many times the memory of the file.
        too_many = count > _MAX_VALUES and _TYPE_BYTES.get(kind, 1) > 1
        if tag in seen or value_at + size > len(data) or total > len(data) or too_many:
            raise ImageError(
                f"the image is truncated or damaged (TIFF: tag {tag} does not fit the file); send it again"
            )
        seen.add(tag)
        if tag == _ICC_PROFILE:
            icc_profile = data[value_at : value_at + size]
        elif kind in _TYPE_CODES and 0 < count <= _MAX_SAMPLES:
            values[tag] = struct.unpack_from(f"{order}{count}{_TYPE_CODES[kind]}", data, value_at)
    (following,) = struct.unpack_from(order + offset_code, data, position)
    return _Directory(values, icc_profile, several_pages=following != 0)


def _check_readable(layout: TiffLayout) -> None:
    wanted = "send an 8-bit or 16-bit RGB or grey TIFF, or a PNG"
    if layout.compression not in _COMPRESSIONS:
        raise ImageError(f"a {layout.bits}-bit TIFF with compression {layout.compression} cannot be read; {wanted}")
    if layout.photometric not in _COLOUR_SAMPLES:
        raise ImageError(
            f"a {layout.bits}-bit TIFF with photometric interpretation {layout.photometric} cannot be read; {wanted}"
        )
    depths = {_UNSIGNED: range(1, 33), _FLOAT: (16, 32, 64)}.get(layout.sample_format, ())
    if layout.bits not in depths:
        raise ImageError(
            f"a TIFF with {layout.bits}-bit samples of sample format {layout.sample_format} cannot be read; {wanted}"
        )
    if layout.samples < _COLOUR_SAMPLES[layout.photometric] + len(layout.extra_samples[:1]):
        raise ImageError("the image is damaged (TIFF: it has fewer samples per pixel than its colours need)")


def _check_segments(page: Any, layout: TiffLayout, file_bytes: int) -> None:
    planes, depth, height, width, contiguous = page.shaped
    if (depth, height, width, planes * contiguous) != (1, layout.height, layout.width, layout.samples):
        raise ImageError("the image is not a plain picture (TIFF: a volume, or of a shape that its tags do not tell)")
    offsets, counts = page.dataoffsets, page.databytecounts
    # A segment that is missing would be read as black.
    complete = len(offsets) == len(counts) and (page.is_contiguous or len(offsets) >= math.prod(page.chunked))
    if not complete or any(
        offset <= 0 or count <= 0 or offset + count > file_bytes
        for offset, count in itertools.zip_longest(offsets, counts, fillvalue=0)
    ):
        raise ImageError("the image is truncated (TIFF: part of its pixels lies outside the file); send the whole file")


def _reduce(pixels: NDArray[Any], layout: TiffLayout) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    if layout.sample_format == _UNSIGNED:
        notes = (f"image: reduced from {layout.bits} to 8 bits",) if layout.bits > 8 else ()
        return to_8_bits(pixels, 2**layout.bits - 1), notes
    reduced = np.empty(pixels.shape, np.uint8)
    clipped = broken = False
    for row, samples in enumerate(pixels):
        finite = np.isfinite(samples)
        samples = np.where(finite, samples, 0)
        broken |= not finite.all()
        clipped |= bool(samples.min() < 0 or samples.max() > 1)
        reduced[row] = np.rint(np.clip(samples, 0, 1) * 255)
    found = [f"image: {layout.bits}-bit floating point read as display values in [0, 1]"]
    if clipped:
        found.append("image: values outside [0, 1] clipped")
    if broken:
        found.append("image: values that are not finite set to 0")
    return reduced, tuple(found)


def _divided_by_alpha(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    weight = np.maximum(alpha, 1)[..., None].astype(np.float32)
    return np.rint(np.minimum(colour * (255 / weight), 255)).astype(np.uint8)
