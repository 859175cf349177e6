"""What the training of a style takes of a device's memory, told before anything is loaded.

Encoders and VAE are freed before the transformer is loaded, so the larger of two phases decides. Where LPIPS judges the
held-out clips, the VAE's decoder stays with the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cinecat.engines.checkpoint import Checkpoint, read_json
from cinecat.engines.errors import OutOfMemory
from cinecat.engines.memory import in_words
from cinecat.engines.memory_plan import (
    VAE_DECODER_MAPS,
    VAE_ENCODER_MAPS,
    empty_transformer,
    image_tokens,
    numbers,
    parameter_bytes,
)
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.stages import TEXT_TOKENS
from cinecat.engines.training.styles.clips import ClipShape
from cinecat.engines.training.styles.recipe import StyleRecipe
from cinecat.engines.training.styles.trainer import add_lora


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one process takes on its device, estimated.

    On a CPU in float32, live memory at its peak was 1% below the estimate with activations computed again and 11% below
    with activations kept (4 blocks of 512 channels, 2,048 tokens); in a VAE encoder at 256x256, 16% below to 12% above.
    Not counted: what torch, its libraries and the driver take, half a GiB to one, and what glibc does not give back to
    the system, 0.3 GiB in that training. At 14B and on a GPU it has not been compared yet.

    Attributes:
        encoders: weights of text encoder, image encoder and VAE.
        encoding: what the VAE holds while it encodes a clip.
        transformer: weights, this process's share of them.
        lora: weights, gradients and AdamW's two moments of the LoRA.
        activations: what a step keeps for the way back.
        decoder: weights of the VAE's decoder, where LPIPS needs it; otherwise 0.
        decoding: what it holds while it decodes a clip, which is never while activations are kept.
    """

    encoders: int
    encoding: int
    transformer: int
    lora: int
    activations: int
    decoder: int = 0
    decoding: int = 0

    @property
    def encoding_phase(self) -> int:
        return self.encoders + self.encoding

    @property
    def training_phase(self) -> int:
        return self.transformer + self.lora + self.decoder + max(self.activations, self.decoding)

    @property
    def needed(self) -> int:
        return max(self.encoding_phase, self.training_phase)

    def __str__(self) -> str:
        lpips = f"; for LPIPS, VAE decoder {in_words(self.decoder)}, a clip in it {in_words(self.decoding)}"
        return (
            f"memory: {in_words(self.encoding_phase)} to encode the clips (encoders {in_words(self.encoders)}, "
            f"a clip in the VAE {in_words(self.encoding)}), then {in_words(self.training_phase)} to train "
            f"(transformer {in_words(self.transformer)}, LoRA and AdamW {in_words(self.lora)}, "
            f"activations {in_words(self.activations)}{lpips if self.decoder else ''})"
        )


def estimate_memory(
    checkpoint: Checkpoint,
    shape: ClipShape,
    recipe: StyleRecipe,
    dtype: torch.dtype,
    shards: int = 1,
    lpips: bool = False,
) -> TrainingMemory:
    """Estimates from configs and headers; no weight is read.

    Args:
        dtype: of transformer and text encoder.
        shards: processes that the transformer is divided among; 1 where each has all of it.
        lpips: whether it judges the held-out clips.

    Raises:
        ModelError: a header cannot be read.
    """
    folder = checkpoint.folder
    vae = read_json(folder / "vae" / "config.json")
    encoders = {"text_encoder": dtype, "image_encoder": torch.float32, "vae": torch.float32}
    feature_map = int(vae.get("base_dim", 96)) * shape.width * shape.height * 4
    weights, lora, activations = _training(folder, shape, recipe, dtype, shards)
    return TrainingMemory(
        encoders=sum(numbers(folder / part) * kind.itemsize for part, kind in encoders.items()),
        encoding=VAE_ENCODER_MAPS * feature_map,
        transformer=weights,
        lora=lora,
        activations=activations,
        decoder=numbers(folder / "vae", ("decoder.", "post_quant_conv.")) * 4 if lpips else 0,
        decoding=VAE_DECODER_MAPS * feature_map if lpips else 0,
    )


def check_memory(memory: TrainingMemory, available: int | None, device: str, processes: int = 1) -> None:
    """Raises OutOfMemory, naming what to lower, when processes that share a device need more than it has left.

    Args:
        available: bytes; None where that cannot be told.
    """
    needed = memory.needed * processes
    if available is None or needed <= available:
        return
    if memory.encoding_phase > memory.training_phase:
        advice = "lower width or height, or free memory for the encoders"
    elif memory.decoding > memory.activations:
        advice = "lower width or height, leave out lpips-weights, or shard over more GPUs with FSDP"
    else:
        advice = "lower width, height or frames, checkpoint activations, or shard over more GPUs with FSDP"
    several = f" for {processes} processes" if processes > 1 else ""
    raise OutOfMemory(
        f"{memory}; {in_words(needed)}{several} are needed, {device} has {in_words(available)} left; {advice}"
    )


def _training(
    folder: Path, shape: ClipShape, recipe: StyleRecipe, dtype: torch.dtype, shards: int
) -> tuple[int, int, int]:
    """Bytes of the transformer's share, of the LoRA with its optimiser, and of activations."""
    transformer = empty_transformer(read_json(folder / "transformer" / "config.json"), dtype)
    weights = parameter_bytes(transformer)
    with torch.device("meta"):  # shapes and dtypes alone
        largest = max(parameter_bytes(block) for block in transformer.blocks)
        added = add_lora(transformer, recipe)
        for parameter in added:
            parameter.data = parameter.data.to(dtype)  # as autocast would for each use
        lora = sum(parameter.numel() for parameter in added)
        saved, passed, working = _block(transformer, image_tokens(folder), shape, dtype)
    layers = len(transformer.blocks)
    kept_blocks = 1 if recipe.checkpoint_activations else layers
    # A sharded block is gathered whole while it computes.
    share = weights if shards == 1 else weights // shards + largest
    return share, lora * 4 * 4, layers * passed + kept_blocks * saved + working


def _block(
    transformer: WanTransformer3DModel, image_tokens: int, shape: ClipShape, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Bytes that one block keeps for the way back, that it passes on, and that gradients take on that way."""
    config: Any = transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    _, patch_height, patch_width = config.patch_size
    latent_frames = (shape.frames - 1) // VAE_TEMPORAL_STRIDE + 1
    tokens = latent_frames * (shape.height // (8 * patch_height)) * (shape.width // (8 * patch_width))
    context = torch.empty(1, image_tokens + TEXT_TOKENS, dim, dtype=dtype)
    modulation = torch.empty(1, 6, dim, dtype=dtype)
    rope = (torch.empty(1, tokens, 1, config.attention_head_dim), torch.empty(1, tokens, 1, config.attention_head_dim))
    hidden = torch.empty(1, tokens, dim, dtype=dtype, requires_grad=True)
    known = {_storage(tensor) for tensor in (context, modulation, hidden, *rope, *transformer.parameters())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        transformer.blocks[0](hidden, context, modulation, rope)
    saved = sum(tensor.untyped_storage().nbytes() for storage, tensor in found.items() if storage not in known)
    widest = max(dim * 4, config.ffn_dim * dtype.itemsize)
    return saved, hidden.nbytes, 3 * tokens * widest


class _FusedAttention(TorchFunctionMode):
    """Counts attention as fused kernels keep it, without the table of all pairs that the meta device would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        if func is functional.scaled_dot_product_attention:
            return _Fused.apply(named["query"], named["key"], named["value"])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
