"""What serving a model takes of memory, told from configs and headers before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from cinecat.engines.backends.contract import TEXT_MULTIPLE
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.checkpoint import Checkpoint, read_json, weight_files
from cinecat.engines.errors import ModelError
from cinecat.engines.memory import in_words
from cinecat.engines.messages import Offload, StorageDtype
from cinecat.engines.placement import RESIDENT_BLOCKS, kept_bytes, matrices
from cinecat.engines.slots import bank_bytes
from cinecat.engines.tokens.flops import grid_of
from cinecat.plugins.errors import LoraError
from cinecat.plugins.safetensors_header import read_header

VAE_ENCODER_MAPS = 50
"""Full-size feature maps of the VAE's first level, a frame each, that its encoder holds at its peak: of four frames the
input, padding and output of a convolution and its workspace, and two cached frames for each; found by measuring."""

VAE_DECODER_MAPS = 56
"""Likewise of its decoder: 51 in tensors, and what a convolution works with; measured on a CPU at 128 to 256 pixels."""

WORDS = 4 * TEXT_MULTIPLE
"""Text keys of a prompt of usual length, its empty positions collapsed."""

_BLOCK_BYTES = {2: 35.5, 4: 58.0}
_LATENT_COPIES = 6

_PUBLISHED = "Wan-AI/Wan2.1-I2V-14B-"
_14B_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
_UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_CLIP_VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
}


@dataclass(frozen=True)
class ModelSizes:
    """What a model's parts hold.

    Attributes:
        text_encoder, image_encoder, vae: numbers.
        transformer: config of diffusers' WanTransformer3DModel.
        image_tokens: of the image encoder.
        vae_config: config of diffusers' AutoencoderKLWan.
    """

    text_encoder: int
    image_encoder: int
    vae: int
    transformer: Mapping[str, Any]
    image_tokens: int
    vae_config: Mapping[str, Any]

    @property
    def vae_base_dim(self) -> int:
        """Channels of the VAE's first level."""
        return int(self.vae_config.get("base_dim", 96))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelSizes:
        """Read from headers and configs. Raises ModelError when one cannot be read."""
        folder = checkpoint.folder
        return cls(
            text_encoder=numbers(folder / "text_encoder"),
            image_encoder=numbers(folder / "image_encoder"),
            vae=numbers(folder / "vae"),
            transformer=read_json(folder / "transformer" / "config.json"),
            image_tokens=image_tokens(folder),
            vae_config=read_json(folder / "vae" / "config.json"),
        )

    @classmethod
    def published(cls, model: str) -> ModelSizes | None:
        """Sizes of the published 14B models, whose hub ids are known, without their files; None for others."""
        if not model.startswith(_PUBLISHED):
            return None
        with torch.device("meta"):
            text = UMT5EncoderModel(UMT5Config(**_UMT5_XXL))
            image = CLIPVisionModel(CLIPVisionConfig(**_CLIP_VIT_H))
            vae = AutoencoderKLWan()
        text_encoder, image_encoder, vae_size = (
            sum(parameter.numel() for parameter in module.parameters()) for module in (text, image, vae)
        )
        return cls(text_encoder, image_encoder, vae_size, _14B_TRANSFORMER, 257, vae.config)


@dataclass(frozen=True)
class Clip:
    """What is asked for: pixels, frames, and rows of a forward (2 with guidance).

    Raises:
        ValueError: a size is none that the model takes, or the rows are not 1 or 2.
    """

    width: int
    height: int
    frames: int
    rows: int = 2

    def __post_init__(self) -> None:
        grid_of(self.width, self.height, self.frames)
        if self.rows not in (1, 2):
            raise ValueError(f"guidance-rows: {self.rows}; 1 without guidance, 2 with it")

    @property
    def tokens(self) -> int:
        """Of one row, on the uniform path."""
        return grid_of(self.width, self.height, self.frames).count


@dataclass(frozen=True)
class ServingMemory:
    """Bytes that the engine core takes on its device for one running clip, estimated.

    The caches that `cache_mib` and `style_cache_mib` bound grow beside it, and torch, its libraries and the driver take
    half a GiB to one. At 14B and on a GPU it has not been compared yet.

    Attributes:
        text_encoder: numbers x bytes of the dtype; 0 where it is offloaded.
        image_encoder, vae: numbers x 4; both are float32. An image encoder that is offloaded is 0.
        transformer: numbers x bytes of the dtype, and x 4 in Wan's float32 islands. The blocks' matrices x 1 where they
            are kept in float8, and those of one block in the dtype besides; two blocks where they are offloaded.
        style_banks: (slots + 1) x rank x (in + out) x bytes, over all styled linears of all layers.
        context: cached keys and values: rows x layers x (64 words + image tokens) x dim x 2 x bytes.
        activations: of the largest forward, a row at a time: tokens x dim x 35.5 bytes in 16 bits, x 58 in float32,
            which is what one block holds at its peak, its output of the feed-forward in float32 (measured on a CPU, for
            ffn_dim = 2.7 dim), and the tokens, rotations and head beside it.
        latents: 16 channels for each of noise, prediction, two velocities and two solver states, and 20 of the
            condition: latent pixels x 116 x 4.
        vae_work: 56 feature maps of full size, base_dim x width x height x 4 each, while it decodes.
        visiting: the larger of the encoders that are offloaded, while it encodes.
        host: what is offloaded, in the host's memory. Pinned blocks may take up to twice as much there, since torch
            rounds each tensor up to a power of two.
    """

    text_encoder: int
    image_encoder: int
    vae: int
    transformer: int
    style_banks: int
    context: int
    activations: int
    latents: int
    vae_work: int
    visiting: int = 0
    host: int = 0

    @property
    def weights(self) -> int:
        return self.text_encoder + self.image_encoder + self.vae + self.transformer

    @property
    def needed(self) -> int:
        """At the peak: of forwards, VAE and offloaded encoders only one runs at a time."""
        work = max(self.activations, self.vae_work, self.visiting)
        return self.weights + self.style_banks + self.context + self.latents + work

    def parts(self) -> dict[str, int]:
        """What the peak consists of, and what runs at another time, by name."""
        return {name: int(value) for name, value in vars(self).items()}

    def __str__(self) -> str:
        return (
            f"{in_words(self.needed)} (weights {in_words(self.weights)}, style banks {in_words(self.style_banks)}, "
            f"keys and values of the context {in_words(self.context)}, latents {in_words(self.latents)}, and the "
            f"largest of activations {in_words(self.activations)}, VAE {in_words(self.vae_work)} and encoders that "
            f"visit {in_words(self.visiting)})"
        )


def plan_memory(
    sizes: ModelSizes,
    clip: Clip,
    dtype: torch.dtype,
    style_slots: int,
    max_rank: int,
    offload: Offload = "none",
    storage_dtype: StorageDtype = "none",
) -> ServingMemory:
    """Estimates by the formulas of `ServingMemory`; no weight is read.

    Args:
        dtype: of transformer and text encoder.
        offload, storage_dtype: as in `messages.CoreConfig`; nothing is offloaded from a CPU.
    """
    size = dtype.itemsize
    transformer = empty_transformer(sizes.transformer, dtype)
    banks = bank_bytes(transformer.blocks, style_slots, max_rank, dtype)
    weights, on_host = _transformer_bytes(transformer, offload, storage_dtype)
    encoders = {"text_encoder": sizes.text_encoder * size, "image_encoder": sizes.image_encoder * 4}
    if offload != "none":
        on_host += sum(encoders.values())
    config: Any = transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    grid = grid_of(clip.width, clip.height, clip.frames)
    row = len(transformer.blocks) * (WORDS + sizes.image_tokens) * dim * 2 * size
    tokens = clip.tokens * (math.ceil(_BLOCK_BYTES[size] * dim) + dim * size + config.attention_head_dim * 8)
    return ServingMemory(
        **(encoders if offload == "none" else dict.fromkeys(encoders, 0)),
        vae=sizes.vae * 4,
        transformer=weights,
        style_banks=banks,
        context=clip.rows * row,
        activations=tokens,
        latents=grid.count * 4 * (_LATENT_COPIES * 16 + 20) * 4,
        vae_work=VAE_DECODER_MAPS * sizes.vae_base_dim * clip.width * clip.height * 4,
        visiting=0 if offload == "none" else max(encoders.values()),
        host=on_host,
    )


def _transformer_bytes(
    transformer: WanTransformer3DModel, offload: Offload, storage_dtype: StorageDtype
) -> tuple[int, int]:
    """Of a transformer's weights, what is on the device and what is on the host; its blocks become a stack's."""
    total = parameter_bytes(transformer)
    stack = WanStack(transformer)
    kept = kept_bytes(stack.parameters(), storage_dtype)
    wide = sum(weight.nbytes for weight in matrices(stack.blocks[0])) if storage_dtype != "none" else 0
    rest = total - stack.size_bytes + wide
    if offload != "blocks":
        return rest + kept, 0
    return rest + kept * min(RESIDENT_BLOCKS, len(stack.blocks)) // len(stack.blocks), kept


def empty_transformer(config: Mapping[str, Any], dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer on the meta device, of a dtype with Wan's float32 islands kept."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(dict(config))
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return transformer


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def numbers(part: Path, prefixes: tuple[str, ...] = ("",)) -> int:
    """Numbers in a part's weight files, of tensors whose names begin so. Raises ModelError when one cannot be read."""
    total = 0
    for path in weight_files(part):
        try:
            with path.open("rb") as file:
                tensors = read_header(file).tensors.items()
                total += sum(math.prod(entry.shape) for name, entry in tensors if name.startswith(prefixes))
        except (OSError, LoraError) as error:
            raise ModelError(f"model: {path} cannot be read: {error}") from error
    return total


def image_tokens(folder: Path) -> int:
    """Tokens of an image in a checkpoint's image encoder."""
    config = read_json(folder / "image_encoder" / "config.json")
    return int(config["image_size"] // config["patch_size"]) ** 2 + 1
