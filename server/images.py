"""The bytes of a PNG, JPEG, WebP or TIFF file, from anybody, to an sRGB frame of a given size."""

from __future__ import annotations

import enum
import io
from dataclasses import dataclass, replace
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from cinecat.server import tiff
from cinecat.server.image_types import ImageError, RawImage, check_size, to_8_bits

__all__ = ["DecodedImage", "Fit", "FittedImage", "ImageError", "decode_image", "fit_image"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_SCAN = b"\xff\xda"
_MAX_JPEG_SCANS = 100  # cameras and editors write 1 to about 15, and a thumbnail may add its own
_ORIENTATION = 0x0112


class Fit(enum.StrEnum):
    """How an image of another aspect ratio is brought to a clip's size."""

    CROP = "crop"
    PAD = "pad"
    STRETCH = "stretch"


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """pixels: uint8 [height, width, 3], sRGB. notes: what was done to get them, one sentence each."""

    pixels: NDArray[np.uint8]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class FittedImage:
    """pixels: uint8 [height, width, 3], sRGB. notes: those of the decoded image, and how it was fitted."""

    pixels: NDArray[np.uint8]
    notes: tuple[str, ...]


def decode_image(data: bytes, *, max_bytes: int, max_pixels: int) -> DecodedImage:
    """Decodes an untrusted file: the first frame, upright, over black, in 8-bit sRGB.

    The pixels of an opaque 8-bit RGB image that is already sRGB, or says nothing of its colours, come through
    unchanged. The size is checked before any pixel is decoded.

    Raises ImageError, and nothing else, when the bytes are not such an image, are cut off, or are too large.
    """
    if not data:
        raise ImageError("the image is empty; send the bytes of a PNG, JPEG, WebP or TIFF file")
    if len(data) > max_bytes:
        raise ImageError(f"the image file has {len(data):,} bytes; at most {max_bytes:,} are allowed")
    kind = _kind(data)
    try:
        raw = _READERS[kind](data, max_pixels)
        return _finish(raw)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("the image needs more memory than the server can give; send a smaller one") from error
    # The decoders raise whatever their insides raise: OSError, SyntaxError, struct.error, zlib.error, KeyError...
    except Exception as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"the image is truncated or damaged ({kind}: {detail}); send the whole file") from error


def fit_image(image: DecodedImage, width: int, height: int, fit: Fit = Fit.CROP) -> FittedImage:
    """Brings an image to width x height with a Lanczos filter; an image of that size comes through unchanged."""
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be at least 1, not {width}x{height}")
    source_height, source_width = image.pixels.shape[:2]
    source = f"{source_width}x{source_height}"
    target = f"{width}x{height}"
    if (source_width, source_height) == (width, height):
        return FittedImage(image.pixels, image.notes)
    if fit is Fit.STRETCH:
        pixels = _resized(image.pixels, width, height)
        same_aspect = source_width * height == source_height * width
        note = f"{'scaled' if same_aspect else 'stretched'} from {source} to {target}"
    elif fit is Fit.PAD:
        pixels, note = _padded(image.pixels, width, height)
    else:
        pixels, note = _cropped(image.pixels, width, height)
    return FittedImage(np.ascontiguousarray(pixels), (*image.notes, f"image: {note}"))


def _kind(data: bytes) -> str:
    if data.startswith(_PNG_SIGNATURE):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith(tiff.SIGNATURES):
        return "TIFF"
    raise ImageError("the file is not an image that can be read; send the bytes of a PNG, JPEG, WebP or TIFF file")


def _read_png(data: bytes, max_pixels: int) -> RawImage:
    if data[12:16] != b"IHDR":
        raise ImageError("the image is truncated or damaged (PNG: its header is missing); send the whole file")
    check_size(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), max_pixels)
    if _PNG_END not in data:
        raise ImageError("the image is truncated (PNG: its end is missing); send the whole file")
    image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    if data[24] != 16:
        return _from_pillow(image, max_pixels)
    # Pillow cuts 16-bit samples down to their high byte; it only serves for what surrounds the pixels here.
    width, height = image.size
    check_size(width, height, max_pixels)
    image.load()
    samples = imagecodecs.png_decode(data)
    reduced = to_8_bits(samples.reshape(*samples.shape[:2], -1), 65535)
    has_alpha = reduced.shape[2] in (2, 4)
    return RawImage(
        colour=np.ascontiguousarray(reduced[..., :-1] if has_alpha else reduced),
        alpha=np.ascontiguousarray(reduced[..., -1]) if has_alpha else None,
        orientation=_orientation(image),
        icc_profile=image.info.get("icc_profile"),
        notes=(*_frame_notes(image), "image: reduced from 16 to 8 bits"),
    )


def _read_jpeg(data: bytes, max_pixels: int) -> RawImage:
    # A progressive file paints the whole picture once for each scan: a few hundred bytes cost a second.
    if (scans := data.count(_JPEG_SCAN)) > _MAX_JPEG_SCANS:
        raise ImageError(f"the image is painted in {scans} scans, at most {_MAX_JPEG_SCANS} are allowed; save it anew")
    # A multi-picture file is read as the JPEG that it starts with, which is its picture.
    return _from_pillow(JpegImagePlugin.JpegImageFile(io.BytesIO(data)), max_pixels)


def _read_webp(data: bytes, max_pixels: int) -> RawImage:
    if len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ImageError("the image is truncated (WebP: its end is missing); send the whole file")
    # Opening an extended file reserves memory for its whole canvas.
    if data[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        check_size(width, height, max_pixels)
    return _from_pillow(WebPImagePlugin.WebPImageFile(io.BytesIO(data)), max_pixels)


def _read_tiff(data: bytes, max_pixels: int) -> RawImage:
    layout = tiff.read_layout(data, max_pixels)
    notes = ("image: the first of several pages taken",) if layout.several_pages else ()
    image = None if layout.is_deep else _open_tiff(data)
    if image is None:
        raw = tiff.decode_page(data, layout)
        return replace(raw, notes=(*notes, *raw.notes))
    raw = _from_pillow(image, max_pixels)
    # Pillow turns the pixels of a TIFF while it loads them.
    if layout.orientation != 1:
        notes = (*notes, _TURNED)
    return replace(raw, orientation=1, icc_profile=layout.icc_profile, notes=(*notes, *raw.notes))


def _open_tiff(data: bytes) -> TiffImagePlugin.TiffImageFile | None:
    try:
        return TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    # How Pillow says that it does not know this arrangement of samples.
    except SyntaxError:
        return None


_READERS = {"PNG": _read_png, "JPEG": _read_jpeg, "WebP": _read_webp, "TIFF": _read_tiff}

_TURNED = "image: turned as its EXIF orientation says"

# By mode: the mode to convert to, without and with a transparent colour, and how many of its bands are colour.
_GREY, _COLOUR, _INK = ("L", "LA", 1), ("RGB", "RGBA", 3), ("CMYK", "CMYK", 4)
_MODES = {
    "1": _GREY,
    "L": _GREY,
    "P": _COLOUR,
    "RGB": _COLOUR,
    "RGBX": ("RGB", "RGB", 3),
    "YCbCr": ("RGB", "RGB", 3),
    "LA": ("LA", "LA", 1),
    "La": ("LA", "LA", 1),
    "PA": ("RGBA", "RGBA", 3),
    "RGBA": ("RGBA", "RGBA", 3),
    "RGBa": ("RGBA", "RGBA", 3),
    "CMYK": _INK,
}


def _from_pillow(image: Any, max_pixels: int) -> RawImage:
    width, height = image.size
    check_size(width, height, max_pixels)
    notes = _frame_notes(image)
    image.load()
    if image.mode not in _MODES:
        raise ImageError(f"the image has pixels of mode {image.mode}, which cannot be read; save it as RGB")
    opaque, transparent, colours = _MODES[image.mode]
    mode = transparent if "transparency" in image.info else opaque
    converted = image if image.mode == mode else image.convert(mode)
    pixels = np.asarray(converted).reshape(image.height, image.width, -1)
    return RawImage(
        colour=np.array(pixels[..., :colours], order="C"),
        alpha=np.array(pixels[..., colours], order="C") if pixels.shape[2] > colours else None,
        orientation=_orientation(image),
        icc_profile=image.info.get("icc_profile"),
        notes=notes,
    )


def _frame_notes(image: Any) -> tuple[str, ...]:
    # TIFF tells of its pages itself.
    animated = image.format != "TIFF" and getattr(image, "is_animated", False)
    return ("image: the first frame of an animation taken",) if animated else ()


def _orientation(image: Any) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    # EXIF is an afterthought in every format, often damaged by tools, and no reason to refuse a sound picture.
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _finish(raw: RawImage) -> DecodedImage:
    colour, notes = _to_srgb(raw.colour, raw.icc_profile)
    notes = (*raw.notes, *notes)
    if raw.alpha is not None and raw.alpha.min() < 255:
        colour = to_8_bits(colour.astype(np.uint16) * raw.alpha[..., None], 255 * 255)
        notes = (*notes, "image: alpha composited over black")
    if raw.orientation != 1:
        colour = _turned(colour, raw.orientation)
        notes = (*notes, _TURNED)
    return DecodedImage(np.ascontiguousarray(colour), notes)


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _to_srgb(colour: NDArray[np.uint8], profile: bytes | None) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if profile:
        try:
            return _through_profile(colour, profile)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes = ("image: its colour profile cannot be used and was ignored",)
    if colour.shape[2] == 4:
        plain = np.asarray(Image.fromarray(colour, "CMYK").convert("RGB"))
        return plain, (*notes, "image: CMYK without a usable colour profile converted by the plain formula")
    return _as_rgb(colour), notes


_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}


def _through_profile(colour: NDArray[np.uint8], profile: bytes) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = _SPACES.get(source.profile.xcolor_space.strip(), "")
    if mode == "RGB":
        colour = _as_rgb(colour) if colour.shape[2] == 1 else colour
    if colour.shape[2] != {"L": 1, "RGB": 3, "CMYK": 4}.get(mode):
        raise ValueError("the profile is for other colours than the image has")
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )

    def converted(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)
        result = ImageCms.applyTransform(image, transform)
        if result is None:
            raise ValueError("the profile gives no colours")
        return np.asarray(result)

    if mode != "CMYK":
        # There are many sRGB profiles of many names; what counts is that this one changes nothing.
        probe = _lattice(1 if mode == "L" else 3)
        if np.abs(converted(probe).astype(np.int16) - _as_rgb(probe)).max() <= 1:
            return _as_rgb(colour), ()
    name = "".join(c for c in ImageCms.getProfileDescription(source) if c.isprintable()).strip()[:80]
    return converted(colour), (f"image: colours converted from '{name or 'an unnamed profile'}' to sRGB",)


def _lattice(channels: int) -> NDArray[np.uint8]:
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    return np.stack(np.meshgrid(*[steps] * channels, indexing="ij"), axis=-1).reshape(1, -1, channels)


def _as_rgb(colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour


def _resized(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def _cropped(pixels: NDArray[np.uint8], width: int, height: int) -> tuple[NDArray[np.uint8], str]:
    source_height, source_width = pixels.shape[:2]
    kept_width, kept_height = source_width, source_height
    if source_width * height > source_height * width:
        kept_width = max(1, round(source_height * width / height))
    else:
        kept_height = max(1, round(source_width * height / width))
    left, top = (source_width - kept_width) // 2, (source_height - kept_height) // 2
    kept = pixels[top : top + kept_height, left : left + kept_width]
    steps = []
    if (kept_width, kept_height) != (source_width, source_height):
        steps.append(f"cropped from {source_width}x{source_height} to {kept_width}x{kept_height}")
    if (kept_width, kept_height) != (width, height):
        start = "then scaled" if steps else f"scaled from {source_width}x{source_height}"
        steps.append(f"{start} to {width}x{height}")
    return _resized(kept, width, height), ", ".join(steps)


def _padded(pixels: NDArray[np.uint8], width: int, height: int) -> tuple[NDArray[np.uint8], str]:
    source_height, source_width = pixels.shape[:2]
    inner_width, inner_height = width, height
    if source_width * height > source_height * width:
        inner_height = max(1, round(source_height * width / source_width))
    else:
        inner_width = max(1, round(source_width * height / source_height))
    steps = []
    if (inner_width, inner_height) != (source_width, source_height):
        steps.append(f"scaled from {source_width}x{source_height} to {inner_width}x{inner_height}")
    if (inner_width, inner_height) != (width, height):
        start = "then padded" if steps else f"padded from {source_width}x{source_height}"
        steps.append(f"{start} with black to {width}x{height}")
    frame = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    frame[top : top + inner_height, left : left + inner_width] = _resized(pixels, inner_width, inner_height)
    return frame, ", ".join(steps)
