"""Training of the VAE: near-isometric start, single images first, then clips, one cosine over both."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor, nn
from torch.nn import functional

from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.training.film import HELD_OUT, Window, make_clip, render
from cinecat.engines.training.loop import run_training
from cinecat.engines.training.muon import Optimisers
from cinecat.engines.training.progress import Journal
from cinecat.engines.training.scenes import draw_scene


@dataclass(frozen=True)
class VaeRecipe:
    """How the VAE is trained.

    Attributes:
        steps: optimiser steps; the learning rate's cosine ends there.
        image_share: part of the steps that see single images.
        crop: side of the square training crops, of frames with a short side of `side`.
        image_batch, clip_batch: crops per step.
        clip_frames: 4k + 1.
        muon_rate, adam_rate: learning rates of the kernels and of the rest.
        noise: standard deviation added to the latents, so that the decoder forgives the denoiser.
        average: longest decay of the averaged weights.
    """

    steps: int = 1000
    image_share: float = 0.46
    side: int = 128
    crop: int = 64
    image_batch: int = 16
    clip_batch: int = 4
    clip_frames: int = 9
    muon_rate: float = 0.02
    adam_rate: float = 1e-3
    warmup: int = 20
    noise: float = 0.02
    average: float = 0.98
    seed: int = 21


def initialise(vae: AutoencoderKLWan, seed: int) -> None:
    """Starts every path near an isometry of each frame by itself: the default start stalls for hundreds of steps.

    Orthogonal kernels in the newest frame's slice, nothing in the older ones, residual branches silent, and
    resampling in time as a copy.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, module in vae.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Conv3d):
                continue
            if module.bias is not None:
                module.bias.zero_()
            weight = module.weight
            if isinstance(module, nn.Conv2d):
                kernel = weight
            else:
                weight.zero_()
                kernel = weight[:, :, -1]
            if name.endswith("time_conv"):
                copies = weight.shape[0] // weight.shape[1]
                kernel[:, :, 0, 0] = torch.eye(weight.shape[1]).repeat(copies, 1)
            elif name.endswith(("conv2", ".proj")):
                kernel.zero_()
            else:
                matrix = torch.empty(kernel.shape[0], kernel[0].numel())
                kernel.copy_(nn.init.orthogonal_(matrix).view(kernel.shape))


def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Latent modes [B, 16, (F - 1) / 4 + 1, H / 8, W / 8] of video [B, 3, F, H, W] in [-1, 1], before normalising."""
    cache: list[Any] = [None] * vae._cached_conv_counts["encoder"]
    chunks = [video[:, :, :1], *torch.split(video[:, :, 1:], VAE_TEMPORAL_STRIDE, dim=2)]
    encoded = [vae.encoder(chunk, feat_cache=cache, feat_idx=[0]) for chunk in chunks if chunk.shape[2]]
    modes: Tensor = vae.quant_conv(torch.cat(encoded, dim=2)).chunk(2, dim=1)[0]
    return modes


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Video [B, 3, F, H, W], unclamped, of latents as VAE input."""
    cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    frames = vae.post_quant_conv(latents).split(1, dim=2)
    decoded = [
        vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=index == 0) for index, frame in enumerate(frames)
    ]
    return torch.cat(decoded, dim=2)


def to_video(frames: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Float32 [3, F, H, W] in [-1, 1] of uint8 [F, H, W, 3]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def psnr(first: Tensor, second: Tensor, peak: float = 2.0) -> float:
    """Decibels over all elements; `peak` is the range of the values."""
    error = float((first.float() - second.float()).square().mean())
    return 99.0 if error == 0.0 else 10 * math.log10(peak**2 / error)


def train_vae(
    vae: AutoencoderKLWan, recipe: VaeRecipe, journal: Journal, save_seconds: float = 120.0, clips: int = 6
) -> None:
    """Trains in place as `run_training` does.

    Args:
        clips: held-out clips of 17 frames.
    """
    initialise(vae, recipe.seed)
    optimisers = Optimisers(vae, recipe.muon_rate, recipe.adam_rate, (0.9, 0.99))
    use_faster_layers(vae)
    held_out = _held_out(recipe, clips)

    def images(step: int) -> bool:
        return step < recipe.steps * recipe.image_share

    def loss_at(step: int) -> Tensor:
        video = _batch(recipe, step, images(step))
        latents = encode(vae, video)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        noise = torch.randn(latents.shape, generator=generator)
        error = decode(vae, latents + recipe.noise * noise) - video
        # Keeps latents near unit scale, where the noise means something.
        return error.abs().mean() + 4 * error.square().mean() + 1e-4 * latents.square().mean()

    def measure(model: AutoencoderKLWan, step: int) -> tuple[float, dict[str, float | str]]:
        measured = held_out_psnr(model, held_out)
        rounded = {name: round(value, 3) for name, value in measured.items()}
        return -measured["held_out_psnr"], {"kind": "images" if images(step - 1) else "clips", **rounded}

    run_training(
        "VAE",
        vae,
        optimisers,
        journal,
        steps=recipe.steps,
        warmup=recipe.warmup,
        average_decay=recipe.average,
        save_seconds=save_seconds,
        loss_at=loss_at,
        measure=measure,
    )


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKLWan, clips: list[Tensor]) -> dict[str, float]:
    """Mean PSNR over clips [3, F, H, W]: of all frames, of the first, and of the clip's first frame as an image."""
    everything, first, image = [], [], []
    for clip in clips:
        video = clip[None]
        decoded = decode(vae, encode(vae, video)).clamp(-1.0, 1.0)
        everything.append(psnr(decoded, video))
        first.append(psnr(decoded[:, :, 0], video[:, :, 0]))
        still = decode(vae, encode(vae, video[:, :, -1:])).clamp(-1.0, 1.0)
        image.append(psnr(still, video[:, :, -1:]))
    return {
        "held_out_psnr": float(np.mean(everything)),
        "held_out_first_frame_psnr": float(np.mean(first)),
        "held_out_image_psnr": float(np.mean(image)),
    }


@torch.no_grad()
def latent_statistics(latents: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of latents [N, 16, T, H, W]."""
    flat = latents.double().transpose(0, 1).flatten(1)
    return flat.mean(1).tolist(), flat.std(1).tolist()


def _batch(recipe: VaeRecipe, step: int, images: bool) -> Tensor:
    """Random crops [B, 3, F, crop, crop]: of fresh films, mirrored and with their colours swapped at random."""
    count = recipe.image_batch if images else recipe.clip_batch
    frames = 1 if images else recipe.clip_frames
    crops = []
    for index in range(count):
        seed = step * 64 + index
        random = np.random.default_rng((recipe.seed, seed))
        scene = draw_scene(seed % HELD_OUT, frames)
        top, left = (int(v) for v in random.integers(0, recipe.side - recipe.crop + 1, 2))
        window = Window(top, left, recipe.crop, recipe.crop)
        video = to_video(render(scene, recipe.side, recipe.side, window).frames)
        mirrored = [axis for axis, flip in zip((2, 3), random.uniform(size=2) < 0.5, strict=True) if flip]
        video = video.flip(mirrored)
        if random.uniform() < 0.5:
            video = video[torch.from_numpy(random.permutation(3))]
        crops.append(video)
    return torch.stack(crops)


def _held_out(recipe: VaeRecipe, clips: int) -> list[Tensor]:
    return [to_video(make_clip(HELD_OUT + seed, 17, recipe.side, recipe.side).frames) for seed in range(clips)]


def half_precision(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """A copy in bfloat16 whose kernels lie channels last: with AMX it encodes twice as fast as autocast does, which
    reorders inputs and kernels at every convolution. Its latents' error is 44 dB below them, ten under the VAE's own.

    Give it bfloat16 video in `torch.channels_last_3d`.
    """
    half = copy.deepcopy(vae).bfloat16()
    for module in half.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    use_faster_layers(half)
    return half


def use_faster_layers(vae: AutoencoderKLWan) -> None:
    """Swaps two layers for equal ones that are faster here; together a fifth of a step.

    A lone first frame skips the two thirds of each kernel that only ever meet its zero padding, and norms over the
    channels are written out, since the fused one strides through memory.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and module.stride[0] == 1:
            module.forward = types.MethodType(_flat(type(module).forward), module)  # type: ignore[method-assign]
        elif isinstance(module, WanRMS_norm):
            module.forward = types.MethodType(_channel_norm, module)


def _channel_norm(self: Any, x: Tensor) -> Tensor:
    inverse = (x.square().sum(dim=1, keepdim=True) + 1e-12).rsqrt()
    normed: Tensor = x * inverse * self.scale * self.gamma + self.bias
    return normed


def _flat(full: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if cache_x is not None or x.shape[2] != 1:
            return full(self, x, cache_x)
        padding = (self._padding[2], self._padding[0])
        flat = functional.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, self.stride[1:], padding)
        return flat.unsqueeze(2)

    return forward
