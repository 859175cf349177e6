"""The VAE as a stream against diffusers' own, and tiles against whole frames."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional

from cinecat.engines import stages, vae_tiles
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.errors import ModelError
from cinecat.engines.model import load_vae
from cinecat.engines.vae import Layer, Stream, decoder_layers, encoder_layers, lay_out
from cinecat.engines.vae_tiles import Tiling, plan_tiling
from tests.engines.samples import small_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return small_vae()


@pytest.fixture(scope="module")
def wan_tiny() -> AutoencoderKLWan:
    return load_vae(find_checkpoint("wan-tiny"), "cpu")


def stream_of(video: Tensor, layers: list[Layer], chunk: int, still_from: int | None = None) -> Tensor:
    """[1, C, T, H, W] through a stream."""
    frames, stream = video[0].transpose(0, 1), Stream(layers, still_from)
    parts = [stream(frames[:1]), *(stream(part) for part in frames[1:].split(chunk))]
    return torch.cat(parts).transpose(0, 1)[None]


def assert_equal_to_rounding(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [4, 8])
def test_encoding_a_video_equals_diffusers(vae: AutoencoderKLWan, chunk: int) -> None:
    video = torch.rand(1, 3, 17, 32, 48) * 2 - 1
    theirs = vae.encode(video).latent_dist.parameters
    assert_equal_to_rounding(stream_of(video, encoder_layers(vae), chunk), theirs)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 2])
def test_decoding_equals_diffusers(vae: AutoencoderKLWan, chunk: int) -> None:
    latents = torch.randn(1, 16, 5, 4, 6)
    ours = stream_of(latents, decoder_layers(vae), chunk).clamp(-1, 1)
    assert_equal_to_rounding(ours, vae.decode(latents, return_dict=False)[0])


@torch.inference_mode()
def test_a_condition_in_which_layers_settle_equals_the_whole_grey_video(vae: AutoencoderKLWan) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    video = torch.zeros(1, 3, 81, 32, 32)
    video[0, :, 0] = torch.from_numpy(image).permute(2, 0, 1) / 255.0 * 2 - 1
    mode = vae.encode(video).latent_dist.mode()
    mean, inverse_std = stages.latent_statistics(vae, mode)
    ours = stages.encode_condition(vae, image, 81)
    assert_equal_to_rounding(ours[:, 4:], (mode - mean) * inverse_std)
    assert ours[:, :4, 0].eq(1).all()
    assert ours[:, :4, 1:].eq(0).all()


@torch.inference_mode()
def test_layers_stop_computing_where_grey_has_settled(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    convolved, conv2d = Counter[int](), functional.conv2d

    def counted(frames: Tensor, *args: object, **kwargs: object) -> Tensor:
        convolved[frames.shape[3]] += len(frames)
        return conv2d(frames, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "conv2d", counted)
    video = torch.zeros(1, 3, 81, 32, 32)
    stream_of(video, encoder_layers(vae), 4)
    everything, _ = convolved[32], convolved.clear()
    stream_of(video, encoder_layers(vae), 4, still_from=1)
    assert convolved[32] <= 0.25 * everything


@torch.inference_mode()
def test_laying_out_changes_no_value_and_spares_copies(vae: AutoencoderKLWan) -> None:
    laid_out = lay_out(AutoencoderKLWan(base_dim=8, num_res_blocks=2).eval().requires_grad_(False))
    laid_out.load_state_dict(vae.state_dict())
    video = torch.rand(1, 3, 5, 16, 16)
    torch.testing.assert_close(laid_out.encode(video).latent_dist.mean, vae.encode(video).latent_dist.mean)
    layers = [*encoder_layers(laid_out), *decoder_layers(laid_out)]
    weights = {module.weight.data_ptr() for module in laid_out.modules() if isinstance(module, nn.Conv3d)}
    used = {memory._weight.data_ptr() for layer in layers for memory in layer.memories()}  # type: ignore[attr-defined]
    assert used <= weights


def test_another_vae_than_wan_21s_is_refused() -> None:
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1, is_residual=True)
    with pytest.raises(ModelError, match="WanResidualDownBlock"):
        encoder_layers(vae)


@torch.inference_mode()
def decoded(vae: AutoencoderKLWan, latents: Tensor, tiling: Tiling | None) -> Tensor:
    decoder = stages.ClipDecoder.start(vae, latents, tiling)
    parts = []
    while decoder.frame < decoder.total_frames:
        parts.append(decoder.next_frames())
    return torch.cat(parts)


def psnr(one: Tensor, other: Tensor) -> float:
    return -10 * math.log10(float((one - other).square().mean()))


@torch.inference_mode()
def test_tiles_differ_from_whole_frames_by_less_than_can_be_seen(wan_tiny: AutoencoderKLWan) -> None:
    tiling = Tiling(rows=((0, 32),), columns=((0, 32), (16, 48)))
    slope = np.linspace(0, 1, 256)[:, None] + np.linspace(0, 1, 384)[None]
    image = np.stack([slope / 2, 0.5 + 0.4 * np.sin(slope * 20), 1 - slope / 2], axis=-1)
    pixels = (image * 255).round().astype(np.uint8)
    latents = stages.encode_condition(wan_tiny, pixels, 5)[:, 4:]
    whole = decoded(wan_tiny, latents, None)
    assert psnr(decoded(wan_tiny, latents, tiling), whole) > 55
    both = stages.encode_condition(wan_tiny, pixels, 1, tiling)[:, 4:]
    true = torch.from_numpy(pixels) / 255.0
    assert psnr(decoded(wan_tiny, both, None)[0], true) > psnr(whole[0], true) - 0.5


def test_two_tiled_clips_decode_in_turn(vae: AutoencoderKLWan) -> None:
    tiling = Tiling(rows=((0, 8),), columns=((0, 10), (4, 14)))
    latents = [torch.randn(1, 16, 3, 8, 14) for _ in range(2)]
    decoders = [stages.ClipDecoder.start(vae, each, tiling) for each in latents]
    with torch.inference_mode():
        chunks = [[decoder.next_frames() for decoder in decoders] for _ in range(3)]
    for index, each in enumerate(latents):
        assert torch.equal(torch.cat([chunk[index] for chunk in chunks]), decoded(vae, each, tiling))


def test_a_frame_is_cut_only_where_it_does_not_fit(vae: AutoencoderKLWan) -> None:
    def plan(free: int | None) -> Tiling:
        return plan_tiling(encoder_layers(vae), decoder_layers(vae), 90, 160, 8, 4, free)

    for whole in (plan(None), plan(2**36)):
        assert whole.whole
        assert whole.note == ""
    tiled, least = plan(2**30), plan(2**20)
    assert not tiled.whole
    assert f"{len(tiled.rows)} x {len(tiled.columns)} overlapping tiles" in tiled.note
    assert len(least.tiles) > len(tiled.tiles)
    for tiling in (tiled, least):
        total = torch.zeros(90, 160)
        for (top, bottom), (left, right), weight in tiling.weighted(1, total):
            assert min(bottom - top, right - left) >= vae_tiles.LEAST_TILE
            total[top:bottom, left:right] += weight
        torch.testing.assert_close(total, torch.ones(90, 160))


def test_a_full_disk_is_told_with_what_helps(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, data: object) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(vae_tiles.tempfile, "TemporaryFile", Full)
    with pytest.raises(vae_tiles.EngineError, match="set TMPDIR"):
        decoded(vae, torch.randn(1, 16, 1, 8, 14), Tiling(((0, 8),), ((0, 10), (4, 14))))


_PEAK = """
import sys, torch
from pathlib import Path
from diffusers import AutoencoderKLWan
from cinecat.engines import stages
from cinecat.engines.vae import decoder_layers, encoder_layers
from cinecat.engines.vae_tiles import plan_tiling

def most():  # of this program alone: what getrusage tells may be its parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
free, latent_frames = int(sys.argv[1]), int(sys.argv[2])
vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval().requires_grad_(False)
tiling = plan_tiling(encoder_layers(vae), decoder_layers(vae), 48, 64, 8, 4, free)
decoder = stages.ClipDecoder.start(vae, torch.zeros(1, 16, latent_frames, 48, 64), tiling)
before = most()
with torch.inference_mode():
    for _ in range(latent_frames):
        decoder.next_frames()
print(len(tiling.tiles), most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_decoding_keeps_within_the_memory_that_there_is_however_long_the_clip() -> None:
    def peak(free: int, latent_frames: int) -> tuple[int, int]:
        command = [sys.executable, "-c", _PEAK, str(free), str(latent_frames)]
        tiles, used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(tiles), int(used)

    free = 260 * 2**20
    # The first two chunks are smaller: from the third on they are alike.
    tiles, used = peak(free, 4)
    assert tiles > 1
    assert used < free
    assert peak(free, 8)[1] < 1.2 * used
    whole, more = peak(2**40, 4)
    assert whole == 1
    assert more > used
