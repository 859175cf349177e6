"""What latents look like, in a moment and without decoding: a linear map from their channels to colours.

A latent of Wan's VAE is nearly linear in the mean colour of the pixels that it stands for. How differs from one VAE to
another, so the map is fitted to the one that is loaded: it encodes a few pictures, and least squares say which colours
belong to the latents that come out. The first latent frame stands for one frame and each later one for four, which the
VAE encodes by other weights, so each has a map of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.stages import latent_statistics
from cinecat.engines.vae import Layer, Stream, encoder_layers

MAX_SIDE = 160
"""Pixels along the longer side of a picture, at most."""

_SEED = 17
_FILMS = 8
_SIDE = 48
_SPREAD = 0.3
"""Of the colours that films are painted with, about grey: a map fitted to vivid ones is worse for ordinary footage."""
_CONTRAST = 0.06
_LATTICES = (2, 4, 8, 16, 32)
"""Knots along a side of the noise that films are painted with, soft to fine."""

_RIDGE = 1e-4
"""Of the latents' mean square; holds the fit where a VAE leaves channels unused."""


@dataclass(frozen=True)
class Palette:
    """A map from normalised latents, as the denoiser has them, to colours.

    Attributes:
        first: float32 [16 + 1, 3], to red, green and blue in [0, 1]; the last row is the bias.
        later: the same, for all latent frames but the first.
    """

    first: Tensor
    later: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, vae: AutoencoderKLWan) -> Palette:
        """Fits a map to `vae`, on its device; the same VAE gives the same map.

        Raises:
            ModelError: the VAE is not built like Wan2.1's.
        """
        stride = int(vae.config.scale_factor_spatial)
        layers = encoder_layers(vae)
        random = torch.Generator().manual_seed(_SEED)
        films = [_film(random) for _ in range(_FILMS)]
        latents = torch.stack([_encoded(vae, layers, film) for film in films])
        colours = torch.stack([_block_means(film, stride) for film in films])
        return cls(
            _fitted(latents[:, :1], colours[:, :1]).to(vae.device),
            _fitted(latents[:, 1:], colours[:, 1:]).to(vae.device),
        )

    @torch.inference_mode()
    def pictures(self, clean: Tensor) -> NDArray[np.uint8]:
        """Pictures uint8 [T, h', w', 3] of clean latents [1, 16, T, h, w], one of each latent frame.

        A pixel is a latent, or the mean of several where a side has more than `MAX_SIDE`.
        """
        latents = clean[0].float()
        colours = torch.cat([_coloured(latents[:, :1], self.first), _coloured(latents[:, 1:], self.later)], dim=1)
        height, width = colours.shape[2:]
        scale = min(1.0, MAX_SIDE / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        small = functional.adaptive_avg_pool2d(colours, size)
        pixels = (small.clamp(0.0, 1.0) * 255.0).round().byte().permute(1, 2, 3, 0)
        pictures: NDArray[np.uint8] = pixels.contiguous().cpu().numpy()
        return pictures


def _film(random: torch.Generator) -> Tensor:
    """A film in [0, 1], float32 [1 + 4, 3, side, side]: a wall with the spectrum of photographs and a disc that moves.

    Drawn on the CPU, so that it is the same for every device.
    """
    wall = 0.25 + 0.5 * torch.rand((1, 1, 1, 1), generator=random)
    wall = wall + _SPREAD * (torch.rand((1, 3, 1, 1), generator=random) - 0.5)
    for knots in _LATTICES:
        noise = torch.randn((1, 3, knots, knots), generator=random)
        soft = functional.interpolate(noise, size=(_SIDE, _SIDE), mode="bicubic", align_corners=False)
        wall = wall + _CONTRAST * (2.0 / knots) ** 0.7 * soft
    disc = torch.rand((1, 3, 1, 1), generator=random)
    return torch.where(_disc(random, 1 + VAE_TEMPORAL_STRIDE), disc, wall).clamp(0.0, 1.0)


def _disc(random: torch.Generator, frames: int) -> Tensor:
    """Where a disc is that moves, bool [frames, 1, side, side]."""
    y, x, speed_y, speed_x, size = torch.rand(5, generator=random).tolist()
    time, axis = torch.linspace(0.0, 0.6, frames).view(-1, 1, 1), torch.linspace(0.0, 1.0, _SIDE)
    down = axis.view(1, -1, 1) - y - (speed_y - 0.5) * time
    across = axis.view(1, 1, -1) - x - (speed_x - 0.5) * time
    inside: Tensor = down.square() + across.square() < (0.1 + 0.2 * size) ** 2
    return inside[:, None]


def _encoded(vae: AutoencoderKLWan, layers: list[Layer], film: Tensor) -> Tensor:
    """Normalised latents of a film, float32 [latent frames, h, w, 16], on the CPU."""
    video = (film * 2.0 - 1.0).to(vae.device, vae.dtype)
    stream = Stream(layers)
    moments = torch.cat([stream(video[:1]), stream(video[1:])])
    mode = moments.transpose(0, 1)[None].chunk(2, dim=1)[0].float()
    mean, inverse_std = latent_statistics(vae, mode)
    latents: Tensor = (mode - mean) * inverse_std
    return latents[0].permute(1, 2, 3, 0).cpu()


def _block_means(film: Tensor, stride: int) -> Tensor:
    """What the latents of a film stand for: mean colours [latent frames, h, w, 3]."""
    blocks = functional.avg_pool2d(film, stride)
    later = torch.unflatten(blocks[1:], 0, (-1, VAE_TEMPORAL_STRIDE)).mean(dim=1)
    return torch.cat([blocks[:1], later]).permute(0, 2, 3, 1)


def _fitted(latents: Tensor, colours: Tensor) -> Tensor:
    """The map [channels + 1, 3] from latents [..., channels] to colours [..., 3]: ridge regression about the means."""
    x, y = latents.flatten(0, -2).double(), colours.flatten(0, -2).double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    centred = x - x_mean
    square = centred.T @ centred
    ridge = _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    weight = torch.linalg.lstsq(square + ridge, centred.T @ (y - y_mean), driver="gelsd").solution
    return torch.cat([weight, (y_mean - x_mean @ weight)[None]]).float()


def _coloured(latents: Tensor, mapping: Tensor) -> Tensor:
    """Colours [3, T, h, w] of latents [channels, T, h, w]."""
    colours = torch.addmm(mapping[-1][:, None], mapping[:-1].T, latents.flatten(1))
    return torch.unflatten(colours, 1, latents.shape[1:])
