"""Pictures of clips in the making, as a client opens them."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cinecat.server.previews import MAX_SIDE, decoded, estimate
from cinecat.v1 import job_pb2 as pb


def opened(frame: pb.PreviewFrame) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(frame.webp))
    assert image.format == "WEBP"
    return np.asarray(image.convert("RGB"))


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    return 10 * math.log10(255**2 / np.mean((first.astype(float) - second.astype(float)) ** 2))


@pytest.fixture(scope="module")
def cat(photograph: Path) -> NDArray[np.uint8]:
    """uint8 [480, 832, 3]."""
    return np.asarray(Image.open(photograph).convert("RGB").resize((832, 480)))


def test_an_estimate_names_its_step_and_the_last_frame_of_each_latent() -> None:
    preview = estimate(7, np.zeros((3, 6, 10, 3), np.uint8))
    assert preview.step == 7
    assert [frame.index for frame in preview.frames] == [0, 4, 8]
    assert [opened(frame).shape for frame in preview.frames] == [(6, 10, 3)] * 3


def test_decoded_frames_are_numbered_from_the_first_and_have_no_step() -> None:
    preview = decoded(5, np.zeros((4, 16, 16, 3), np.uint8))
    assert preview.step == 0
    assert [frame.index for frame in preview.frames] == [5, 6, 7, 8]


def test_each_picture_is_of_its_own_frame() -> None:
    levels = np.array([10, 90, 170, 250], np.uint8)
    preview = decoded(0, np.broadcast_to(levels.reshape(4, 1, 1, 1), (4, 32, 32, 3)))
    np.testing.assert_allclose([opened(frame).mean() for frame in preview.frames], levels, atol=3)


def test_a_photograph_survives(cat: NDArray[np.uint8]) -> None:
    small = cat[:256, :256]
    assert psnr(opened(decoded(0, small[None]).frames[0]), small) >= 32.0


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 832, (295, 512)), (1280, 720, (512, 288)), (512, 512, (512, 512)), (2, 4000, (1, 512)), (16, 16, (16, 16))],
)
def test_no_side_is_longer_than_allowed(height: int, width: int, expected: tuple[int, int]) -> None:
    picture = opened(decoded(0, np.full((1, height, width, 3), 99, np.uint8)).frames[0])
    assert picture.shape == (*expected, 3)
    assert max(expected) <= MAX_SIDE


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_floating_point_frames_look_like_their_bytes(cat: NDArray[np.uint8], dtype: type) -> None:
    floats = opened(decoded(0, (cat / 255.0).astype(dtype)[None]).frames[0])
    np.testing.assert_allclose(floats, opened(decoded(0, cat[None]).frames[0]), atol=2)


def test_floating_point_frames_out_of_range_are_clamped() -> None:
    frames = np.stack([np.full((16, 16, 3), value, np.float32) for value in (-0.5, 1.5)])
    dark, bright = decoded(0, frames).frames
    assert opened(dark).max() <= 2
    assert opened(bright).min() >= 253


def test_a_picture_of_a_clip_at_832x480_is_a_small_part_of_a_message(cat: NDArray[np.uint8]) -> None:
    (frame,) = decoded(0, cat[None]).frames
    assert len(frame.webp) < 40_000
