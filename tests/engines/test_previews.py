"""Pictures of latents against the frames that they were encoded from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.model import load_vae
from cinecat.engines.previews import MAX_SIDE, Palette
from cinecat.engines.stages import latent_statistics
from cinecat.engines.training.film import HELD_OUT, make_clip
from cinecat.engines.vae import Stream, encoder_layers, lay_out

SIDE = 128
FILMS = 8
ENOUGH_DB = 23.0


@pytest.fixture(scope="module")
def wan_tiny() -> AutoencoderKLWan:
    return load_vae(find_checkpoint("wan-tiny"), "cpu")


@pytest.fixture(scope="module")
def palette(wan_tiny: AutoencoderKLWan) -> Palette:
    return Palette.of(wan_tiny)


@pytest.fixture(scope="module")
def shots(wan_tiny: AutoencoderKLWan) -> list[tuple[Tensor, NDArray[np.float64]]]:
    """Latents [1, 16, 3, h, w] of held-out films, and the mean colours that they stand for, [3, h, w, 3]."""
    return list(encoded_films(wan_tiny))


@torch.inference_mode()
def encoded_films(vae: AutoencoderKLWan) -> Iterator[tuple[Tensor, NDArray[np.float64]]]:
    for seed in range(HELD_OUT, HELD_OUT + FILMS):
        frames = make_clip(seed, frames=9, height=SIDE, width=SIDE).frames
        video = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        stream = Stream(encoder_layers(vae))
        moments = torch.cat([stream(video[:1]), stream(video[1:])]).transpose(0, 1)[None]
        mode = moments.chunk(2, dim=1)[0]
        mean, inverse_std = latent_statistics(vae, mode)
        yield (mode - mean) * inverse_std, true_colours(frames)


def true_colours(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    count, height, width, _ = frames.shape
    blocks = frames.reshape(count, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4))
    later = blocks[1:].reshape(-1, 4, *blocks.shape[1:]).mean(axis=1)
    return np.concatenate([blocks[:1], later])


def psnr(pictures: list[NDArray[np.float64]], truths: list[NDArray[np.float64]]) -> float:
    error = np.mean([np.mean((a - b) ** 2) for a, b in zip(pictures, truths, strict=True)])
    return 10 * math.log10(255**2 / error)


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, None)], ids=["first", "later"])
def test_pictures_of_encoded_films_resemble_their_frames(
    palette: Palette, shots: list[tuple[Tensor, NDArray[np.float64]]], part: slice
) -> None:
    pictures = [palette.pictures(latents).astype(np.float64)[part] for latents, _ in shots]
    truths = [truth[part] for _, truth in shots]
    assert psnr(pictures, truths) >= ENOUGH_DB
    # The best that one colour can do for each film.
    greys = [np.broadcast_to(truth.mean(axis=(0, 1, 2)), truth.shape) for truth in truths]
    assert psnr(greys, truths) < ENOUGH_DB


def test_first_and_later_latents_need_maps_of_their_own(
    palette: Palette, shots: list[tuple[Tensor, NDArray[np.float64]]]
) -> None:
    swapped = Palette(first=palette.later, later=palette.first)
    truths = [truth for _, truth in shots]
    right, wrong = (
        psnr([chosen.pictures(latents).astype(np.float64) for latents, _ in shots], truths)
        for chosen in (palette, swapped)
    )
    assert right > wrong


def test_one_vae_has_one_palette(wan_tiny: AutoencoderKLWan, palette: Palette) -> None:
    torch.manual_seed(1)
    again = Palette.of(wan_tiny)
    assert torch.equal(again.first, palette.first)
    assert torch.equal(again.later, palette.later)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_vae_has_a_palette(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vae = lay_out(AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval().requires_grad_(False)).to(dtype)
    palette = Palette.of(vae)
    assert palette.first.dtype == palette.later.dtype == torch.float32
    assert torch.isfinite(torch.cat([palette.first, palette.later])).all()
    assert palette.pictures(torch.randn(1, 16, 2, 4, 6, dtype=dtype)).shape == (2, 4, 6, 3)


def test_a_channel_that_a_vae_never_uses_has_no_say() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval().requires_grad_(False)
    vae.quant_conv.weight[3] = 0.0
    vae.quant_conv.bias[3] = 0.0
    palette = Palette.of(lay_out(vae))
    assert torch.isfinite(palette.later).all()
    assert float(palette.later[3].abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(60, 104, (60, 104)), (160, 160, (160, 160)), (90, 320, (45, 160)), (321, 2, (160, 1))],
)
def test_no_side_is_longer_than_allowed(palette: Palette, height: int, width: int, expected: tuple[int, int]) -> None:
    pictures = palette.pictures(torch.zeros(1, 16, 2, height, width))
    assert pictures.shape == (2, *expected, 3)
    assert pictures.dtype == np.uint8
    assert max(pictures.shape[1:3]) <= MAX_SIDE


def test_a_smaller_picture_is_the_mean_of_its_latents(
    palette: Palette, shots: list[tuple[Tensor, NDArray[np.float64]]]
) -> None:
    latents, _ = shots[0]
    wide = latents.repeat(1, 1, 1, 1, 2 * MAX_SIDE // latents.shape[4]) * 0.2
    small = palette.pictures(wide).astype(np.float64)
    whole = palette.pictures(latents * 0.2).astype(np.float64)
    means = whole.reshape(3, SIDE // 16, 2, SIDE // 16, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(small[:, :, : SIDE // 16], means, atol=1.01)


def test_colours_out_of_range_are_clamped() -> None:
    bright = torch.zeros(17, 3)
    bright[0] = 1.0
    pictures = Palette(bright, bright).pictures(torch.full((1, 16, 1, 2, 2), 7.0))
    dark = Palette(bright, bright).pictures(torch.full((1, 16, 1, 2, 2), -7.0))
    assert pictures.min() == 255
    assert dark.max() == 0
