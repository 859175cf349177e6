"""The stages around the denoiser: text, image and VAE encoding, and streaming VAE decoding.

Each is the arithmetic of diffusers' WanImageToVideoPipeline, cut where Cinecat caches or streams; the parity tests
hold them together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.model import WanEncoders

TEXT_TOKENS = 512


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


def encode_condition(vae: AutoencoderKLWan, image: NDArray[np.uint8], frames: int) -> Tensor:
    """The 20 condition channels [1, 4 + 16, latent frames, height / 8, width / 8], float32.

    Four mask channels (1 where a frame is given), then the normalised latents of the image followed by grey frames.
    The encoder runs chunk by chunk with its own causal cache, so the grey video is never held whole. There is no
    shortcut for it: the encoder's reach in time is longer than a clip.
    """
    first = torch.from_numpy(image.astype(np.float32) / 255.0).permute(2, 0, 1)[None, :, None] * 2.0 - 1.0
    first = first.to(vae.device, vae.dtype)
    height, width = image.shape[:2]
    grey = first.new_zeros((1, 3, VAE_TEMPORAL_STRIDE, height, width))
    cache: list[Tensor | str | None] = [None] * vae._cached_conv_counts["encoder"]
    inputs = [first] + [grey] * ((frames - 1) // VAE_TEMPORAL_STRIDE)
    chunks = [vae.encoder(frame, feat_cache=cache, feat_idx=[0]) for frame in inputs]
    # The first half of the moments is the mean, which is the mode.
    mode = vae.quant_conv(torch.cat(chunks, dim=2)).chunk(2, dim=1)[0]
    mean, inverse_std = latent_statistics(vae, mode)
    latents = (mode.float() - mean) * inverse_std
    mask = latents.new_zeros((1, VAE_TEMPORAL_STRIDE, *latents.shape[2:]))
    mask[:, :, 0] = 1.0
    return torch.cat([mask, latents], dim=1)


def starting_noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Gaussian noise, float32, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32).to(device)


@dataclass
class ClipDecoder:
    """Decodes one clip's latents a latent frame at a time: 1 frame first, then 4 for each.

    The VAE's causal cache lives here and not in the VAE, so any number of clips can be in decoding.
    """

    vae: AutoencoderKLWan
    latents: Tensor  # [1, 16, latent frames, height / 8, width / 8], as VAE input
    cache: list[Tensor | str | None]
    latent_frame: int = 0
    frame: int = 0

    @classmethod
    def start(cls, vae: AutoencoderKLWan, latents: Tensor) -> ClipDecoder:
        """Begins with final denoised latents [1, 16, latent frames, height / 8, width / 8]."""
        scaled = latents.to(vae.dtype)
        mean, inverse_std = latent_statistics(vae, scaled)
        return cls(vae, scaled / inverse_std + mean, [None] * vae._cached_conv_counts["decoder"])

    @property
    def total_frames(self) -> int:
        return (self.latents.shape[2] - 1) * VAE_TEMPORAL_STRIDE + 1

    def next_frames(self) -> Tensor:
        """The next frames, float32 [count, height, width, 3] in [0, 1]. Must not be called after the last."""
        vae = self.vae
        latent = vae.post_quant_conv(self.latents[:, :, self.latent_frame : self.latent_frame + 1])
        video = vae.decoder(latent, feat_cache=self.cache, feat_idx=[0], first_chunk=self.latent_frame == 0)
        self.latent_frame += 1
        self.frame += video.shape[2]
        unit = (video[0].float().clamp(-1.0, 1.0) / 2 + 0.5).clamp(0.0, 1.0)
        frames: Tensor = unit.permute(1, 2, 3, 0).contiguous()
        return frames


def latent_statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation per latent channel, [1, 16, 1, 1, 1]."""
    config = vae.config
    mean = torch.tensor(config.latents_mean, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
    return mean, 1.0 / std
