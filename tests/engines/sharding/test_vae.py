"""The VAE's decoder in bands, over processes, against one that decodes whole frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from cinecat.engines import vae_tiles
from cinecat.engines.sharding import vae as bands
from cinecat.engines.stages import ClipDecoder
from tests.engines.sharding.vae_ranks import CASES, Case, decode_everywhere

Seen = list[dict[str, Any]]
"""Of each rank."""


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    return decode(tmp_path_factory.mktemp("bands"), CASES)


def decode(folder: Path, cases: dict[str, Case]) -> dict[str, Seen]:
    decode_everywhere(folder, cases, 240)
    return {
        name: [torch.load(folder / f"{name} {rank}.pt") for rank in range(case.ranks)] for name, case in cases.items()
    }


@torch.inference_mode()
def whole(case: Case) -> list[list[Tensor]]:
    """The chunks of each clip, decoded by one rank."""
    vae = case.vae()
    decoders = [ClipDecoder.start(vae, latents) for latents in case.latents()]
    return [[decoder.next_frames() for _ in range(case.shape[2])] for decoder in decoders]


def assert_equal_to_rounding(case: Case, seen: Seen) -> None:
    """Kernels of convolutions, and with them the order of sums, are chosen by the frame's size among other things."""
    leader, *others = seen
    bound = 5e-6 if case.dtype == torch.float32 else 1e-2
    for ours, theirs in zip(leader["chunks"], whole(case), strict=True):
        for our, their in zip(ours, theirs, strict=True):
            assert our.shape == their.shape
            assert our.dtype == torch.float32
            assert float((our - their).abs().max()) <= bound
    assert all(chunk is None for other in others for clip in other["chunks"] for chunk in clip)


@pytest.mark.parametrize("name", CASES)
def test_bands_together_are_what_one_rank_decodes(decoded: dict[str, Seen], name: str) -> None:
    assert_equal_to_rounding(CASES[name], decoded[name])


@pytest.mark.parametrize("name", CASES)
def test_what_each_rank_sends_is_what_the_formula_says(decoded: dict[str, Seen], name: str) -> None:
    case = CASES[name]
    with torch.device("meta"):
        vae = case.vae()
    for rank, seen in enumerate(decoded[name]):
        one_clip = bands.sent_bytes(vae, case.shape, rank, case.ranks)
        assert seen["sent"] == {kind: case.clips * size for kind, size in one_clip.items()}


@pytest.mark.parametrize("name", CASES)
def test_what_a_rank_holds_between_two_chunks_is_counted(decoded: dict[str, Seen], name: str) -> None:
    case = CASES[name]
    counted = bands.band_decoder_bytes(case.vae(), case.shape, case.ranks)
    for held in decoded[name][0]["held"]:
        assert held <= counted <= 1.1 * held
    assert all(held <= counted for seen in decoded[name] for held in seen["held"])


def test_bands_cover_the_rows_in_order_and_are_as_even_as_can_be() -> None:
    assert bands.bands_of(9, 4) == [(0, 3), (3, 5), (5, 7), (7, 9)]
    assert bands.bands_of(3, 4) == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert bands.bands_of(90, 1) == [(0, 90)]


def test_a_frame_too_large_for_a_card_fits_in_bands_over_more() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    fitting = [ranks for ranks in (1, 2, 4, 8) if bands.fits_in_bands(vae, 2160, 3840, ranks, 60 * 2**30)]
    assert fitting == [4, 8]
    assert bands.fits_in_bands(vae, 2160, 3840, 1, None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_decoding_a_band_keeps_within_the_memory_in_which_it_is_said_to_fit(tmp_path: Path) -> None:
    # Whole frames are so large that convolutions take them one by one, bands are not.
    case = Case((1, 16, 4, 48, 64), ranks=2)
    # A small clip first: what torch loads for it does not count.
    seen = decode(tmp_path, {"small": Case((1, 16, 3, 4, 4), ranks=2), "large": case})["large"]
    assert_equal_to_rounding(case, seen)
    vae = case.vae()
    free = int(bands.band_needs(vae, 48 * 8, 64 * 8, 2) / vae_tiles.SHARE) + 1
    assert bands.fits_in_bands(vae, 48 * 8, 64 * 8, 2, free)
    kept = sum(chunk.nbytes for chunk in seen[0]["chunks"][0])
    assert free / 3 < seen[0]["most"] - kept < free
    assert free / 3 < seen[1]["most"] < free
