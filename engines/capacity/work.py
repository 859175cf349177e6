"""What there is to compute for a clip, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cinecat.engines.backends.stack import WanStack
from cinecat.engines.memory_plan import WORDS, Clip, ModelSizes, empty_transformer
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.stages import TEXT_TOKENS
from cinecat.engines.tokens import flops
from cinecat.engines.tokens.budget import step_tokens
from cinecat.engines.tokens.flops import grid_of
from cinecat.engines.vae import Stream, decoder_layers, encoder_layers


@dataclass(frozen=True)
class Steps:
    """Steps of one kind.

    Attributes:
        count: how many.
        tokens: of each row.
        merged: whether tokens stand for several patches, and have a bias each.
    """

    count: int
    tokens: int
    merged: bool


@dataclass(frozen=True)
class ClipWork:
    """Everything that a clip costs, whatever the cards.

    Attributes:
        model: sizes of the transformer, with as many text keys as a prompt of usual length has.
        heads: of its attention.
        rows: of a forward, 2 with guidance.
        steps: that it takes, by kind.
        value_bytes: of a number in the blocks.
        block_bytes: of the blocks' weights, all layers together.
        encoder_flops: of text and image, with the negative prompt where there is guidance.
        encode_flops, decode_flops: of the VAE.
        latent_rows: of a frame, which ranks share when they decode.
        video_bytes: of the decoded frames, as ranks send them to the leader.
    """

    model: flops.Layout
    heads: int
    rows: int
    steps: tuple[Steps, ...]
    value_bytes: int
    block_bytes: int
    encoder_flops: float
    encode_flops: float
    decode_flops: float
    latent_rows: int
    video_bytes: int

    @property
    def step_count(self) -> int:
        return sum(each.count for each in self.steps)


def clip_work(sizes: ModelSizes, clip: Clip, steps: int, keep_ratio: float, dtype: torch.dtype) -> ClipWork:
    """Counts a clip's work; no weight is read.

    Args:
        keep_ratio: tokens over those of the uniform path, mean over all steps; 1 is the uniform path.
        dtype: of the transformer.
    """
    config = sizes.transformer
    heads = int(config["num_attention_heads"])
    grid = grid_of(clip.width, clip.height, clip.frames)
    spent = Counter(step_tokens(grid, steps, keep_ratio))
    vae = vae_of(sizes, "meta")
    latent = (grid.frames, 2 * grid.height, 2 * grid.width)
    return ClipWork(
        model=flops.Layout(
            dim=heads * int(config["attention_head_dim"]),
            layers=int(config["num_layers"]),
            ffn_dim=int(config["ffn_dim"]),
            text=WORDS,
            image=sizes.image_tokens,
        ),
        heads=heads,
        rows=clip.rows,
        steps=tuple(Steps(count, tokens, tokens < grid.count) for tokens, count in sorted(spent.items(), reverse=True)),
        value_bytes=dtype.itemsize,
        block_bytes=WanStack(empty_transformer(config, dtype)).size_bytes,
        # Every number of an encoder meets every token once.
        encoder_flops=2.0 * (clip.rows * TEXT_TOKENS * sizes.text_encoder + sizes.image_tokens * sizes.image_encoder),
        encode_flops=encode_flops(vae, *latent),
        decode_flops=decode_flops(vae, *latent),
        latent_rows=latent[1],
        video_bytes=3 * clip.frames * clip.height * clip.width * 4,
    )


def vae_of(sizes: ModelSizes, device: torch.device | str) -> AutoencoderKLWan:
    """A VAE with a model's sizes, its weights whatever the device gives."""
    with torch.device(device):
        return AutoencoderKLWan.from_config(dict(sizes.vae_config)).eval()


def decode_flops(vae: AutoencoderKLWan, latent_frames: int, height: int, width: int) -> float:
    """FLOPs of decoding latents of that size.

    Args:
        vae: on the device "meta".
    """
    stream = Stream(decoder_layers(vae))
    chunk = torch.empty(1, 16, height, width, device="meta")
    first, other = _counted(stream, chunk), _counted(stream, chunk)
    return first + (latent_frames - 1) * other


def encode_flops(vae: AutoencoderKLWan, latent_frames: int, height: int, width: int) -> float:
    """FLOPs of encoding an image and the grey behind it, of which layers that have settled compute nothing; as
    `decode_flops`.
    """
    stride = int(vae.config.scale_factor_spatial)
    stream = Stream(encoder_layers(vae), still_from=1)
    grey = torch.empty(VAE_TEMPORAL_STRIDE, 3, height * stride, width * stride, device="meta")
    return _counted(stream, grey[:1]) + sum(_counted(stream, grey) for _ in range(latent_frames - 1))


def _counted(stream: Stream, frames: Tensor) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        stream(frames)
    return float(counter.get_total_flops())
