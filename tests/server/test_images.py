"""Images as people have them become sRGB frames of the clip's size, or are refused in one sentence."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import warnings
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

from cinecat.server.images import DecodedImage, Fit, ImageError, decode_image, fit_image

MAX_BYTES = 4 * 1024 * 1024
MAX_PIXELS = 1_000_000

# A picture without symmetry, so that every turn and mirror shows.
ROWS, COLUMNS = np.mgrid[0:12, 0:16]
RGB = np.stack([COLUMNS * 15, ROWS * 20, (COLUMNS * 7 + ROWS * 3) % 256], axis=-1).astype(np.uint8)
GREY = RGB[..., 2]
ALPHA = np.full((12, 16), 255, np.uint8)
ALPHA[:, :4] = 0
ALPHA[:, 4:8] = 128
RGBA = np.dstack([RGB, ALPHA])
DEEP = np.random.default_rng(5).integers(0, 65536, (12, 16, 4)).astype(np.uint16)
DEEP_IN_8_BITS = np.rint(DEEP / 257).astype(np.uint8)
PHOTO = np.asarray(Image.fromarray(RGB).resize((160, 120), Image.Resampling.BICUBIC))

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# sRGB with its first two primaries exchanged: what it calls red is green.
SWAPPED = SRGB.replace(b"rXYZ", b"tmp!", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmp!", b"gXYZ", 1)


def decode(data: bytes) -> DecodedImage:
    return decode_image(data, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)


def encoded(pixels: NDArray[Any] | Image.Image, format: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiff(pixels: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **({"metadata": None, "photometric": "rgb"} | options))
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, scanlines: bytes, *extra: bytes, bits: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(scanlines))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def little_tiff(width: int, height: int, bits: int, compression: int, strip: bytes, **more: int) -> bytes:
    tags = {256: width, 257: height, 258: bits, 259: compression, 262: 1, 273: 0, 277: 1, 278: height, 279: len(strip)}
    tags |= {int(tag): value for tag, value in more.items()}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + strip


SOUND_FILES = {
    "png": encoded(RGB, "PNG"),
    "png-palette": encoded(Image.fromarray(RGB).quantize(16), "PNG", transparency=3),
    "png-16": imagecodecs.png_encode(DEEP),
    "png-profile": encoded(RGB, "PNG", icc_profile=SWAPPED, exif=exif(6)),
    "png-animated": encoded(RGB, "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1])]),
    "jpeg": encoded(RGB, "JPEG", exif=exif(8), icc_profile=SRGB),
    "jpeg-progressive": encoded(RGB, "JPEG", progressive=True),
    "jpeg-cmyk": encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "webp": encoded(RGBA, "WEBP", exif=exif(3), icc_profile=SRGB),
    "webp-lossless": encoded(RGB, "WEBP", lossless=True),
    "tiff": encoded(RGB, "TIFF"),
    "tiff-lzw": encoded(RGBA, "TIFF", compression="tiff_lzw", icc_profile=SRGB),
    "tiff-16": tiff(DEEP[..., :3], compression="zlib", predictor=2),
    "tiff-tiles": tiff(DEEP[..., :3], compression="lzw", tile=(16, 16)),
    "tiff-float": tiff((RGB / 255).astype(np.float32), bigtiff=True, byteorder=">"),
}


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        encoded(RGB, "PNG"),
        encoded(RGB, "PNG", icc_profile=SRGB),
        encoded(RGB, "WEBP", lossless=True),
        encoded(RGB, "TIFF"),
        encoded(RGB, "TIFF", compression="tiff_lzw"),
        encoded(np.dstack([RGB, np.full_like(GREY, 255)]), "PNG"),
    ],
    ids=["png", "png-srgb", "webp", "tiff", "tiff-lzw", "png-opaque-alpha"],
)
def test_an_8_bit_srgb_image_of_the_right_size_comes_through_unchanged(data: bytes) -> None:
    fitted = fit_image(decode(data), 16, 12)
    assert np.array_equal(fitted.pixels, RGB)
    assert fitted.notes == ()


def test_a_jpeg_is_what_pillow_decodes() -> None:
    data = encoded(PHOTO, "JPEG", quality=90)
    assert np.array_equal(decode(data).pixels, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_grey_image_has_equal_channels(format: str) -> None:
    pixels = decode(encoded(GREY, format)).pixels
    assert pixels.shape == (12, 16, 3)
    assert np.ptp(pixels, axis=2).max() <= 1


def test_a_palette_becomes_its_colours() -> None:
    paletted = Image.fromarray(RGB).quantize(8)
    assert np.array_equal(decode(encoded(paletted, "PNG")).pixels, np.asarray(paletted.convert("RGB")))


def test_one_bit_becomes_black_and_white() -> None:
    bits = Image.fromarray(GREY > 90)
    assert np.array_equal(decode(encoded(bits, "TIFF")).pixels[..., 1], np.asarray(bits) * 255)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_alpha_is_composited_over_black(format: str) -> None:
    decoded = decode(encoded(RGBA, format))
    assert np.array_equal(decoded.pixels, np.rint(RGB * (ALPHA[..., None] / 255)).astype(np.uint8))
    assert decoded.notes == ("image: alpha composited over black",)


def test_a_transparent_palette_entry_becomes_black() -> None:
    paletted = Image.fromarray(RGB).quantize(8)
    decoded = decode(encoded(paletted, "PNG", transparency=2))
    hidden = np.asarray(paletted) == 2
    assert decoded.pixels[hidden].max() == 0
    assert np.array_equal(decoded.pixels[~hidden], np.asarray(paletted.convert("RGB"))[~hidden])


def test_cmyk_without_a_profile_is_converted_and_said_so() -> None:
    decoded = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert np.array_equal(decoded.pixels[0, 0], [255, 0, 0])
    assert any("CMYK" in note for note in decoded.notes)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_16_bit_png_is_rounded_to_8_bits(channels: int) -> None:
    has_alpha = channels in (2, 4)
    deep = DEEP[..., :channels].copy()
    if has_alpha:
        deep[..., -1] = 65535
    expected = DEEP_IN_8_BITS[..., : channels - has_alpha]
    decoded = decode(imagecodecs.png_encode(deep[..., 0] if channels == 1 else deep))
    assert np.array_equal(decoded.pixels, np.broadcast_to(expected, (12, 16, 3)))
    assert decoded.notes == ("image: reduced from 16 to 8 bits",)


def test_the_ends_of_the_16_bit_range_are_the_ends_of_the_8_bit_range() -> None:
    ends = np.zeros((2, 2, 3), np.uint16)
    ends[1] = 65535
    assert np.array_equal(decode(tiff(ends)).pixels, (ends // 257).astype(np.uint8))


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"bigtiff": True, "byteorder": ">"}], ids=str)
def test_a_16_bit_tiff_is_rounded_to_8_bits(compression: str | None, options: dict[str, Any]) -> None:
    decoded = decode(tiff(DEEP[..., :3], compression=compression, **options))
    assert np.array_equal(decoded.pixels, DEEP_IN_8_BITS[..., :3])


def test_a_16_bit_tiff_in_separate_planes_is_read() -> None:
    data = tiff(np.moveaxis(DEEP[..., :3], 2, 0), planarconfig="separate")
    assert np.array_equal(decode(data).pixels, DEEP_IN_8_BITS[..., :3])


def test_a_16_bit_grey_tiff_with_white_at_zero_is_inverted() -> None:
    data = tiff(DEEP[..., 0], photometric="miniswhite")
    assert np.array_equal(decode(data).pixels[..., 0], 255 - DEEP_IN_8_BITS[..., 0])


def test_a_32_bit_integer_tiff_uses_its_whole_range() -> None:
    data = tiff(np.array([[0, 2**31, 2**32 - 1]], np.uint32), photometric="minisblack")
    assert decode(data).pixels[0, :, 0].tolist() == [0, 128, 255]


def test_a_float_tiff_is_read_in_0_to_1_and_says_what_it_clipped() -> None:
    data = tiff(np.array([[0.0, 0.5, 1.0, 7.0, np.nan]], np.float32), photometric="minisblack")
    decoded = decode(data)
    assert decoded.pixels[0, :, 0].tolist() == [0, 128, 255, 255, 0]
    assert decoded.notes == (
        "image: 32-bit floating point read as display values in [0, 1]",
        "image: values outside [0, 1] clipped",
        "image: values that are not finite set to 0",
    )


@pytest.mark.parametrize("extra", ["assocalpha", "unassalpha"])
def test_alpha_of_a_deep_tiff_follows_its_kind(extra: str) -> None:
    premultiplied = tiff(np.full((2, 2, 4), 32768, np.uint16), extrasamples=[extra])
    expected = {"assocalpha": 128, "unassalpha": 64}[extra]
    assert np.abs(decode(premultiplied).pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_the_image_is_turned_as_exif_says(format: str, orientation: int) -> None:
    turns = {
        1: RGB,
        2: RGB[:, ::-1],
        3: np.rot90(RGB, 2),
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB, -1),
        7: np.rot90(RGB, 2).swapaxes(0, 1),
        8: np.rot90(RGB, 1),
    }
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode(encoded(RGB, format, exif=exif(orientation), **options))
    assert np.array_equal(decoded.pixels, turns[orientation])
    assert decoded.notes == (() if orientation == 1 else ("image: turned as its EXIF orientation says",))


def test_a_deep_tiff_is_turned_and_converted_as_its_tags_say() -> None:
    red = np.zeros((4, 6, 3), np.uint16)
    red[..., 0] = 65535
    tags = [(274, "H", 1, 6, False)]
    decoded = decode(tiff(red, extratags=tags, iccprofile=SWAPPED))
    assert decoded.pixels.shape == (6, 4, 3)
    assert np.abs(decoded.pixels.astype(int) - [0, 255, 0]).max() <= 2


def test_damaged_exif_is_no_reason_to_refuse_a_picture() -> None:
    data = encoded(RGB, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode(data).pixels, RGB)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_colours_are_converted_from_the_embedded_profile(format: str) -> None:
    decoded = decode(encoded(Image.new("RGB", (4, 4), (255, 0, 0)), format, icc_profile=SWAPPED))
    assert np.abs(decoded.pixels.astype(int) - [0, 255, 0]).max() <= 2
    assert decoded.notes == ("image: colours converted from 'sRGB built-in' to sRGB",)


def test_a_grey_image_with_a_colour_profile_stays_grey() -> None:
    decoded = decode(encoded(Image.new("L", (4, 4), 255), "PNG", icc_profile=SWAPPED))
    assert decoded.pixels.min() >= 253


def test_a_profile_that_cannot_be_used_is_ignored_with_a_note() -> None:
    decoded = decode(encoded(RGB, "PNG", icc_profile=b"not a colour profile at all"))
    assert np.array_equal(decoded.pixels, RGB)
    assert decoded.notes == ("image: its colour profile cannot be used and was ignored",)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several_is_taken_with_a_note(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    frames = [Image.fromarray(RGB[::-1]), Image.fromarray(RGB[:, ::-1])]
    decoded = decode(encoded(RGB, format, save_all=True, append_images=frames, **options))
    assert np.array_equal(decoded.pixels, RGB)
    assert len(decoded.notes) == 1
    assert "first" in decoded.notes[0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "the image is empty"),
        (b"a letter to the editor", "not an image that can be read"),
        (encoded(RGB, "GIF"), "not an image that can be read"),
        (b"\x89PNG\r\n\x1a\n", "header is missing"),
        (b"\xff\xd8\xff", "truncated or damaged"),
        (b"RIFF\x04\0\0\0WEBP", "truncated or damaged"),
        (b"II*\0", "truncated or damaged"),
        (b"\0" * (MAX_BYTES + 1), r"4,194,305 bytes; at most 4,194,304"),
        (png(100_000, 100_000, b""), r"100000x100000 = 10,000,000,000 pixels; at most 1,000,000 are allowed"),
        (png(100_000, 100_000, b"", bits=16), r"at most 1,000,000 are allowed"),
        (png(0, 5, b""), "0x5"),
        (little_tiff(100_000, 100_000, 16, 1, b"x"), r"at most 1,000,000 are allowed"),
        (little_tiff(0, 5, 16, 1, b"x"), "0x5"),
        (little_tiff(9, 9, 8, 1, b"x" * 81, **{"322": 50_000, "323": 50_000}), "tiles of 50000x50000"),
        (little_tiff(9, 9, 16, 1, b"x" * 162, **{"277": 40_000}), "40000 samples"),
        (little_tiff(9, 9, 16, 9999, b"x" * 162), "compression 9999"),
        (little_tiff(9, 9, 16, 1, b"x" * 162, **{"339": 2}), "sample format 2"),
        (b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff", "16777216x16777216"),
    ],
)
def test_what_is_no_usable_image_is_refused_with_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        decode(data)


@pytest.mark.parametrize("name", SOUND_FILES)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(name: str, kept: float) -> None:
    data = SOUND_FILES[name]
    with pytest.raises(ImageError, match="truncated"):
        decode(data[: int(len(data) * kept)])


@pytest.mark.parametrize("name", SOUND_FILES)
def test_the_pixel_limit_is_inclusive(name: str) -> None:
    assert decode_image(SOUND_FILES[name], max_bytes=MAX_BYTES, max_pixels=16 * 12).pixels.size == 16 * 12 * 3
    with pytest.raises(ImageError, match="at most 191 are allowed"):
        decode_image(SOUND_FILES[name], max_bytes=MAX_BYTES, max_pixels=16 * 12 - 1)


@pytest.mark.parametrize(
    "data",
    [
        png(1, 1, b"\0abc", chunk(b"iCCP", b"p\0\0" + zlib.compress(b"\0" * 50_000_000))),
        png(1, 1, b"\0abc", *[chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 1_000_000))] * 100),
        little_tiff(100, 100, 16, 8, zlib.compress(b"\0" * 50_000_000)),
        little_tiff(100, 100, 16, 5, imagecodecs.lzw_encode(b"\0" * 50_000_000)),
        png(1, 1, b"\0" * 50_000_000),
    ],
    ids=["iccp", "ztxt", "deflate-strip", "lzw-strip", "idat"],
)
def test_a_bomb_costs_no_more_memory_than_an_image(data: bytes) -> None:
    tracemalloc.start()
    with contextlib.suppress(ImageError):
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 64 MiB is what Pillow allows the text of one file.
    assert peak < 90 * 1024 * 1024


def test_a_tiff_whose_tags_share_their_bytes_is_refused() -> None:
    shared = bytes(100_000)
    entries = b"".join(struct.pack("<HHII", tag, 2, len(shared), 8) for tag in range(300, 500))
    data = b"II*\0" + struct.pack("<I", 8 + len(shared)) + shared + struct.pack("<H", 200) + entries + bytes(4)
    with pytest.raises(ImageError, match="does not fit the file"):
        decode(data)


def test_too_little_memory_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", exhausted)
    with pytest.raises(ImageError, match="memory"):
        decode(SOUND_FILES["png"])


@pytest.mark.parametrize("name", SOUND_FILES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_are_decoded_or_refused(name: str, edits: list[tuple[float, int]]) -> None:
    data = bytearray(SOUND_FILES[name])
    for place, value in edits:
        data[int(place * len(data))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImageError):
            assert decode(bytes(data)).pixels.shape[2] == 3


# --- fitting ----------------------------------------------------------------------------------------------------------

SIDES = st.integers(1, 90)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(Fit))
def test_a_fitted_image_has_exactly_the_size_asked_for(
    source_width: int, source_height: int, width: int, height: int, fit: Fit
) -> None:
    image = DecodedImage(np.full((source_height, source_width, 3), 200, np.uint8), ())
    fitted = fit_image(image, width, height, fit)
    assert fitted.pixels.shape == (height, width, 3)
    assert fitted.pixels.dtype == np.uint8
    assert fitted.pixels.flags.c_contiguous
    assert bool(fitted.notes) == ((source_width, source_height) != (width, height))


@settings(max_examples=100, deadline=None)
@given(st.integers(40, 200), st.integers(40, 200), st.integers(40, 200), st.integers(40, 200))
def test_crop_keeps_the_aspect_ratio(source_width: int, source_height: int, width: int, height: int) -> None:
    rows, columns = np.mgrid[0:source_height, 0:source_width]
    # A gradient of one level per pixel, centred on 128, shows the scale of either axis at the middle of the frame.
    gradient = np.stack([columns - source_width // 2, rows - source_height // 2, rows * 0], axis=-1) + 128
    pixels = fit_image(DecodedImage(gradient.astype(np.uint8), ()), width, height).pixels.astype(float)
    middle = pixels[height // 2 - 8 : height // 2 + 8, width // 2 - 8 : width // 2 + 8]
    across = (middle[:, -1, 0] - middle[:, 0, 0]).mean()
    down = (middle[-1, :, 1] - middle[0, :, 1]).mean()
    assert across == pytest.approx(down, rel=0.05, abs=2)


def test_crop_takes_the_middle_without_resampling_when_it_can() -> None:
    fitted = fit_image(DecodedImage(RGB, ()), 12, 12)
    assert np.array_equal(fitted.pixels, RGB[:, 2:14])
    assert fitted.notes == ("image: cropped from 16x12 to 12x12",)


def test_pad_centres_the_untouched_image_on_black_when_it_can() -> None:
    fitted = fit_image(DecodedImage(RGB, ()), 16, 16, Fit.PAD)
    assert np.array_equal(fitted.pixels[2:14], RGB)
    assert fitted.pixels[:2].max() == fitted.pixels[14:].max() == 0
    assert fitted.notes == ("image: padded from 16x12 with black to 16x16",)


@pytest.mark.parametrize(
    ("fit", "note"),
    [
        (Fit.CROP, "image: cropped from 451x300 to 300x300, then scaled to 128x128"),
        (Fit.PAD, "image: scaled from 451x300 to 128x85, then padded with black to 128x128"),
        (Fit.STRETCH, "image: stretched from 451x300 to 128x128"),
    ],
)
def test_the_note_says_how_the_image_was_fitted(fit: Fit, note: str) -> None:
    decoded = DecodedImage(np.zeros((300, 451, 3), np.uint8), ("image: reduced from 16 to 8 bits",))
    assert fit_image(decoded, 128, 128, fit).notes == ("image: reduced from 16 to 8 bits", note)


def test_scaling_is_lanczos() -> None:
    expected = Image.fromarray(PHOTO).resize((48, 36), Image.Resampling.LANCZOS)
    assert np.array_equal(fit_image(DecodedImage(PHOTO, ()), 48, 36).pixels, np.asarray(expected))


def test_a_size_below_one_pixel_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        fit_image(DecodedImage(RGB, ()), 0, 12)


def test_a_jpeg_of_many_scans_is_refused_before_it_is_painted() -> None:
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG", progressive=True)
    head, scan, rest = file.getvalue().partition(b"\xff\xda")
    bomb = head + (scan + b"\x00\x08\x01\x01\x00\x01\x05\x00") * 500 + scan + rest
    with pytest.raises(ImageError, match="scans, at most 100 are allowed"):
        decode_image(bomb, max_bytes=10**6, max_pixels=10**6)
