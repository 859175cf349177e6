"""Clips as the transformer sees them, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cinecat.engines import stages
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.model import WanEncoders
from cinecat.engines.training.styles.clips import CaptionedClip, ClipShape, first_frame, read_clip
from cinecat.engines.training.vae import to_video
from cinecat.engines.vae import Stream, encoder_layers
from cinecat.plugins.fingerprint import fingerprint as content_of


@dataclass(frozen=True)
class EncodedClip:
    """One clip, on the CPU.

    Attributes:
        clean: normalised latents [16, T, H, W], float32.
        condition: the 20 condition channels [20, T, H, W], float32.
        text: states of the caption's own tokens [n, text_dim], in the text encoder's dtype.
        image: CLIP states [patches + 1, image_dim].
        seed: of the noise that the model made the clip from; None for one that comes from elsewhere.
    """

    clean: Tensor
    condition: Tensor
    text: Tensor
    image: Tensor
    seed: int | None = None

    @property
    def context(self) -> Tensor:
        """The caption's states padded with zeros to the length that Wan reads, [512, text_dim]."""
        padded = self.text.new_zeros(stages.TEXT_TOKENS, self.text.shape[1])
        padded[: len(self.text)] = self.text
        return padded


def cached_path(clip: CaptionedClip, caption: str, shape: ClipShape, fingerprint: str, folder: Path) -> Path:
    """Where a clip's encoding is kept: under everything that changes it.

    Args:
        caption: as it is encoded.
        fingerprint: of the model and of the dtype that it computes in.
    """
    content = [content_of(path) for path in (clip.path, clip.image) if path is not None]
    key = repr((content, caption, shape, fingerprint))
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"


def encode_clips(
    load: Callable[[], WanEncoders],
    clips: Sequence[CaptionedClip],
    captions: Sequence[str],
    shape: ClipShape,
    fingerprint: str,
    folder: Path,
    moved: Callable[[int], None] = lambda done: None,
) -> list[EncodedClip]:
    """Encodes clips as the engine conditions on them, but for those that are in `folder` already.

    Args:
        load: loads the encoders; called only when a clip needs them.
        captions: of each clip, as they are encoded.
        fingerprint: as in `cached_path`.
        moved: told how many clips are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model: WanEncoders | None = None
    encoded = []
    for done, (clip, caption) in enumerate(zip(clips, captions, strict=True), start=1):
        path = cached_path(clip, caption, shape, fingerprint, folder)
        if not path.exists():
            model = model or load()
            staging = path.with_suffix(".tmp")
            save_file(_encoded(model, clip, caption, shape), staging)
            staging.replace(path)
        encoded.append(EncodedClip(**load_file(path), seed=clip.seed))
        moved(done)
    return encoded


@torch.inference_mode()
def _encoded(model: WanEncoders, clip: CaptionedClip, caption: str, shape: ClipShape) -> dict[str, Tensor]:
    start = first_frame(clip, shape)
    video = to_video(read_clip(clip.path, shape))[None].to(model.device, model.vae.dtype)
    mean, inverse_std = stages.latent_statistics(model.vae, video)
    text = stages.encode_text(model, caption)[0]
    used = int(text.abs().sum(dim=1).nonzero().max()) + 1
    tensors = {
        "clean": ((_modes(model, video[0].transpose(0, 1)) - mean) * inverse_std)[0].float(),
        "condition": stages.encode_condition(model.vae, start, shape.frames)[0],
        "text": text[:used],
        "image": stages.encode_image(model, start)[0],
    }
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _modes(model: WanEncoders, frames: Tensor) -> Tensor:
    """The VAE's latent modes [1, 16, T, H / 8, W / 8] of frames [4k + 1, 3, H, W], not normalised."""
    stream = Stream(encoder_layers(model.vae))
    chunks = (frames[:1], *torch.split(frames[1:], VAE_TEMPORAL_STRIDE))
    moments = torch.cat([stream(chunk) for chunk in chunks if len(chunk)])
    return moments.transpose(0, 1)[None].chunk(2, dim=1)[0]
