"""The film set as the transformer sees it: latents, conditions and encoder states, computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cinecat.engines import stages
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.model import WanModel
from cinecat.engines.training.courses import other_courses
from cinecat.engines.training.film import Clip, Window, render
from cinecat.engines.training.precision import has_fast_bfloat16
from cinecat.engines.training.scenes import draw_scene
from cinecat.engines.training.vae import encode, half_precision, to_video

WORDS = 24
"""Longest caption of the film set, in tokens."""


@dataclass(frozen=True)
class LatentSet:
    """Encoded films; float16 where precision is not the point.

    Attributes:
        clean: normalised latents [N, 16, T, H, W].
        given: normalised latents of the first frame and grey, [N, 16, T, H, W].
        text: [N, WORDS, text_dim], zero past each prompt's end, with `counts` [N] tokens.
        image: [N, n, image_dim].
        empty_text: [WORDS, text_dim] of the empty prompt, with `empty_count` tokens.
    """

    clean: Tensor
    given: Tensor
    text: Tensor
    counts: Tensor
    image: Tensor
    empty_text: Tensor
    empty_count: Tensor

    def __len__(self) -> int:
        return len(self.clean)

    def condition(self, index: Tensor) -> Tensor:
        """The 20 condition channels [B, 20, T, H, W] of some films, as `stages.encode_condition` makes them."""
        given = self.given[index].float()
        mask = given.new_zeros(given.shape[0], VAE_TEMPORAL_STRIDE, *given.shape[2:])
        mask[:, :, 0] = 1.0
        return torch.cat([mask, given], dim=1)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(".tmp")
        torch.save(self.__dict__, staging)
        staging.replace(path)

    @classmethod
    def load(cls, path: Path) -> LatentSet:
        return cls(**torch.load(path, weights_only=True))


def lessons(seed: int, frames: int, side: int, crop: int, courses: int) -> list[Clip]:
    """A film and, behind its first frame, up to `courses` - 1 others.

    Args:
        crop: side of the square window near the subject's start through which the film of `side` is seen: the motion
            of the full size on fewer tokens.
    """
    scene = draw_scene(seed, frames)
    scenes = [scene, *other_courses(scene, seed, courses - 1)]
    if crop == side:
        return [render(each, side, side) for each in scenes]
    random = np.random.default_rng((seed, crop))
    start = (scene.things[scene.subject].position[0] - scene.camera[0]) * side + side / 2
    corner = np.clip(start + random.uniform(-crop / 5, crop / 5, 2) - crop / 2, 0, side - crop).astype(int)
    window = Window(int(corner[1]), int(corner[0]), crop, crop)
    return [render(each, side, side, window) for each in scenes]


@torch.inference_mode()
def encode_films(
    model: WanModel,
    make: Callable[[int], list[Clip]],
    seeds: range,
    moved: Callable[[int], None] = lambda done: None,
) -> LatentSet:
    """Encodes films as the engine would.

    Args:
        make: renders the films of a seed, which share their first frame: its latents are computed once.
        moved: told how many seeds are done.
    """
    config = model.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    vae, layout = model.vae, torch.contiguous_format
    if has_fast_bfloat16():
        vae, layout = half_precision(vae), torch.channels_last_3d
    clean, given, texts, images = [], [], [], []
    known: dict[str, tuple[Tensor, int]] = {}
    for done, seed in enumerate(seeds, start=1):
        clips = make(seed)
        videos = torch.stack([to_video(clip.frames) for clip in clips])
        # Behind the first frame the encoder is given grey.
        start = torch.zeros_like(videos[:1])
        start[:, :, 0] = videos[:1, :, 0]
        shown = torch.cat([videos, start]).to(vae.dtype, memory_format=layout)
        latents = (encode(vae, shown).float() - mean) * inverse_std
        clean.append(latents[:-1].half())
        given.append(latents[-1:].half().expand(len(clips), -1, -1, -1, -1))
        for clip in clips:
            if clip.caption not in known:
                known[clip.caption] = _words(model, clip.caption)
            texts.append(known[clip.caption])
            images.append(_image(model, clip.first_frame))
        moved(done)
    empty_text, empty_count = _words(model, "")
    return LatentSet(
        clean=torch.cat(clean),
        given=torch.cat(given),
        text=torch.stack([text for text, _ in texts]),
        counts=torch.tensor([count for _, count in texts]),
        image=torch.stack(images),
        empty_text=empty_text,
        empty_count=torch.tensor(empty_count),
    )


def _words(model: WanModel, caption: str) -> tuple[Tensor, int]:
    """The states of a caption, padded with zeros to WORDS, and how many of them are its own.

    They are what `stages.encode_text` gives, to rounding: the encoder masks the padding that is left out here.
    """
    inputs = model.tokenizer(caption, return_tensors="pt")
    count = inputs.input_ids.shape[1]
    if count > WORDS:
        raise ValueError(f"caption: {caption!r} is {count} tokens, more than {WORDS}")
    hidden = model.text_encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state[0]
    states = torch.zeros(WORDS, hidden.shape[-1])
    states[:count] = hidden
    return states, count


def _image(model: WanModel, first_frame: NDArray[np.uint8]) -> Tensor:
    return stages.encode_image(model, first_frame)[0].half()
