"""The stages around the denoiser: text, image and VAE encoding, and streaming VAE decoding.

Each is the arithmetic of diffusers' WanImageToVideoPipeline, cut where Cinecat caches or streams; the parity tests
hold them together.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cinecat.engines.memory import available_bytes
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.model import WanEncoders
from cinecat.engines.vae import Stream, decoder_layers, encoder_layers
from cinecat.engines.vae_tiles import Pasts, Tiling, plan_tiling, remembered, whole_frame

TEXT_TOKENS = 512

ROUNDED_UP = 1.05
"""Of what a decoder is counted to hold, 1 % more was measured on a small model."""


def encode_text(model: WanEncoders, prompt: str) -> Tensor:
    """Text context [1, 512, text_dim] in the model's dtype; positions past the prompt's end are zero."""
    inputs = model.tokenizer(
        [prompt_clean(prompt)],
        padding="max_length",
        max_length=TEXT_TOKENS,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = inputs.attention_mask.to(model.device)
    hidden = model.text_encoder(inputs.input_ids.to(model.device), mask).last_hidden_state
    used = int(mask.sum())
    context = torch.zeros_like(hidden, dtype=model.dtype)
    context[:, :used] = hidden[:, :used].to(model.dtype)
    return context


def prompt_is_truncated(model: WanEncoders, prompt: str) -> bool:
    """Whether the text encoder sees only a part of the prompt."""
    return len(model.tokenizer(prompt_clean(prompt)).input_ids) > TEXT_TOKENS


def encode_image(model: WanEncoders, image: NDArray[np.uint8]) -> Tensor:
    """CLIP's penultimate hidden states [1, patches + 1, image_dim], in the model's dtype, of uint8 [H, W, 3]."""
    pixels = model.image_processor(images=Image.fromarray(image), return_tensors="pt").pixel_values
    hidden = model.image_encoder(pixel_values=pixels.to(model.device), output_hidden_states=True).hidden_states[-2]
    states: Tensor = hidden.to(model.dtype)
    return states


def vae_tiling(vae: AutoencoderKLWan, height: int, width: int) -> Tiling:
    """How frames of `height` x `width` pixels are cut for the VAE, by what the device has free now."""
    stride = int(vae.config.scale_factor_spatial)
    return plan_tiling(
        encoder_layers(vae),
        decoder_layers(vae),
        height // stride,
        width // stride,
        stride,
        vae.dtype.itemsize,
        available_bytes(vae.device),
    )


def encode_condition(
    vae: AutoencoderKLWan, image: NDArray[np.uint8], frames: int, tiling: Tiling | None = None
) -> Tensor:
    """The 20 condition channels [1, 4 + 16, latent frames, height / 8, width / 8], float32.

    Four mask channels (1 where a frame is given), then the normalised latents of the image followed by grey frames.
    The encoder runs chunk by chunk, so the grey video is never held whole, and layers stop where grey has settled: the
    first ones soon, the last ones later than most clips last.

    Args:
        tiling: as `vae_tiling` gives it; None cuts nothing.
    """
    first = torch.from_numpy(image.astype(np.float32) / 255.0).permute(2, 0, 1)[None] * 2.0 - 1.0
    first = first.to(vae.device, vae.dtype)
    moments = _encode(vae, first, (frames - 1) // VAE_TEMPORAL_STRIDE, tiling)
    # The first half of the moments is the mean, which is the mode.
    mode = moments.transpose(0, 1)[None].chunk(2, dim=1)[0]
    mean, inverse_std = latent_statistics(vae, mode)
    latents = (mode.float() - mean) * inverse_std
    mask = latents.new_zeros((1, VAE_TEMPORAL_STRIDE, *latents.shape[2:]))
    mask[:, :, 0] = 1.0
    return torch.cat([mask, latents], dim=1)


def _encode(vae: AutoencoderKLWan, first: Tensor, grey_chunks: int, tiling: Tiling | None) -> Tensor:
    """Moments [1 + grey chunks, 32, h, w] of a frame [1, 3, H, W] and the grey behind it."""
    stride = int(vae.config.scale_factor_spatial)
    height, width = first.shape[2] // stride, first.shape[3] // stride
    tiling = tiling or whole_frame(height, width)
    layers = encoder_layers(vae)
    moments = first.new_zeros((1 + grey_chunks, 2 * vae.config.z_dim, height, width))
    for (top, bottom), (left, right), weight in tiling.weighted(1, first):
        stream = Stream(layers, still_from=1)
        corner = first[:, :, top * stride : bottom * stride, left * stride : right * stride]
        grey = corner.new_zeros(()).expand(VAE_TEMPORAL_STRIDE, *corner.shape[1:])
        for index in range(1 + grey_chunks):
            moments[index, :, top:bottom, left:right] += stream(grey if index else corner)[0] * weight
    return moments


def starting_noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Gaussian noise, float32, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32).to(device)


class Decoder(Protocol):
    """Decodes one clip's latents a latent frame at a time: 1 frame first, then 4 for each.

    Attributes:
        frame: frames that have been given, of `total_frames`.
    """

    @property
    def frame(self) -> int: ...

    @property
    def total_frames(self) -> int: ...

    def next_frames(self) -> Tensor:
        """The next frames, float32 [count, height, width, 3] in [0, 1]. Must not be called after the last.

        Raises:
            EngineError: they cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Forgets the clip."""
        ...


class ClipDecoder:
    """Decodes one clip's latents a latent frame at a time: 1 frame first, then 4 for each.

    What the VAE remembers of the clip lives here, so any number of clips can be in decoding.
    """

    def __init__(self, vae: AutoencoderKLWan, latents: Tensor, tiling: Tiling) -> None:
        """Takes latents as the VAE does, [latent frames, 16, height / 8, width / 8]; `start` makes them so."""
        self.latent_frame = 0
        self.frame = 0
        self._latents = latents
        self._stride = int(vae.config.scale_factor_spatial)
        self._stream = Stream(decoder_layers(vae))
        self._tiles = tiling.weighted(self._stride, latents)
        self._pasts = None if tiling.whole else Pasts()

    @classmethod
    def start(cls, vae: AutoencoderKLWan, latents: Tensor, tiling: Tiling | None = None) -> ClipDecoder:
        """Begins with final denoised latents [1, 16, latent frames, height / 8, width / 8].

        Args:
            tiling: as `vae_tiling` gives it; None cuts nothing.
        """
        return cls(vae, latents_for_decoder(vae, latents), tiling or whole_frame(*latents.shape[3:]))

    @property
    def total_frames(self) -> int:
        return (len(self._latents) - 1) * VAE_TEMPORAL_STRIDE + 1

    def next_frames(self) -> Tensor:
        """The next frames, float32 [count, height, width, 3] in [0, 1]. Must not be called after the last.

        Raises:
            EngineError: the temporary file of tiles that do not fit into memory cannot grow.
        """
        latent = self._latents[self.latent_frame : self.latent_frame + 1]
        video = self._decode(latent)
        self.latent_frame += 1
        self.frame += len(video)
        return finished_frames(video.permute(0, 2, 3, 1))

    def close(self) -> None:
        """Nothing to do: what is remembered goes with it."""

    def _decode(self, latent: Tensor) -> Tensor:
        if self._pasts is None:
            return self._stream(latent)
        stride, video = self._stride, latent.new_zeros(())
        for index, ((top, bottom), (left, right), weight) in enumerate(self._tiles):
            self._pasts.restore(index, self._stream.memories)
            tile = self._stream(latent[:, :, top:bottom, left:right])
            self._pasts.keep(index, self._stream.memories)
            if not video.dim():
                video = tile.new_zeros((*tile.shape[:2], latent.shape[2] * stride, latent.shape[3] * stride))
            video[:, :, top * stride : bottom * stride, left * stride : right * stride] += tile * weight
        return video


def latents_for_decoder(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """As the decoder's layers take them, [latent frames, 16, h, w] in the VAE's dtype, of denoised latents
    [1, 16, latent frames, h, w].
    """
    scaled = latents.to(vae.dtype)
    mean, inverse_std = latent_statistics(vae, scaled)
    return (scaled / inverse_std + mean)[0].transpose(0, 1)


def finished_frames(video: Tensor) -> Tensor:
    """Float32 in [0, 1] of what the decoder's layers give, [count, height, width, 3] in the VAE's dtype."""
    return (video.float().clamp(-1.0, 1.0) / 2 + 0.5).clamp(0.0, 1.0).contiguous()


def decoder_bytes(vae: AutoencoderKLWan, latents: Tensor, tiling: Tiling) -> int:
    """What a ClipDecoder holds between two chunks: the latents, and what layers remember of whole frames. Tiles wait in
    a file, and leave only their weights in memory.
    """
    stride = int(vae.config.scale_factor_spatial)
    values = latents.numel()
    if tiling.whole:
        values += int(remembered(decoder_layers(vae), stride) * latents[0, 0, 0].numel() * stride**2)
    values += sum((row[1] - row[0]) * (column[1] - column[0]) for row, column in tiling.tiles) * stride**2
    return int(ROUNDED_UP * values) * int(vae.dtype.itemsize)


def latent_statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation per latent channel, [1, 16, 1, 1, 1]."""
    config = vae.config
    mean = torch.tensor(config.latents_mean, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
    return mean, 1.0 / std
