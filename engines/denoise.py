"""One forward of the Wan transformer, taken apart at the border of its blocks.

Patch embedding, condition embedding and head stay here; the stack of blocks is an engine (idea 5 of the design), which
only ever sees tokens. The arithmetic is diffusers' WanTransformer3DModel.forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cinecat.engines.slots import StyleSlots, Worn


class BlockStack(Protocol):
    """The compiled part of the denoiser.

    Attributes:
        name: the backend, as results report it.
    """

    name: str

    def __call__(
        self, tokens: Tensor, context: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], rows: list[Worn]
    ) -> Tensor:
        """Runs all blocks.

        Args:
            tokens: [rows, K, dim].
            context: image tokens followed by text tokens, [rows, image + 512, dim].
            modulation: [rows, 6, dim], of each row's timestep.
            rope: cosines and sines, [1, K, 1, head_dim] each, float32.
            rows: the style that each row wears.

        Returns:
            [rows, K, dim].
        """
        ...


class TorchBlocks:
    """diffusers' own blocks, run eagerly."""

    name = "torch"

    def __init__(self, transformer: Any, slots: StyleSlots) -> None:
        self._blocks = transformer.blocks
        self._slots = slots

    def __call__(
        self, tokens: Tensor, context: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], rows: list[Worn]
    ) -> Tensor:
        self._slots.dress(rows)
        for block in self._blocks:
            tokens = block(tokens, context, modulation, rope)
        return tokens


@dataclass(frozen=True)
class Branch:
    """One side of guidance: its context [1, image + 512, dim], projected once per request."""

    context: Tensor


class Denoiser:
    """Predicts velocities. Holds no state of any request."""

    def __init__(self, transformer: Any, blocks: BlockStack) -> None:
        self._transformer = transformer
        self._blocks = blocks

    def project_context(self, text: Tensor, image: Tensor) -> Branch:
        """Projects text [1, 512, text_dim] and image [1, n, image_dim] states into the blocks' context."""
        embedder = self._transformer.condition_embedder
        return Branch(torch.cat([embedder.image_embedder(image), embedder.text_embedder(text)], dim=1))

    def token_count(self, latent_frames: int, latent_height: int, latent_width: int) -> int:
        """Tokens of the uniform path: one for each (1, 2, 2) patch of the latents."""
        patch_t, patch_h, patch_w = self._transformer.config.patch_size
        return int((latent_frames // patch_t) * (latent_height // patch_h) * (latent_width // patch_w))

    def velocities(
        self, latents: Tensor, condition: Tensor, timestep: Tensor, branches: tuple[Branch, ...], worn: Worn
    ) -> tuple[Tensor, ...]:
        """Velocity of the same latents under each branch, [1, 16, T, H, W] each, in the transformer's dtype.

        Branches run in turn: at 14B two rows at once save no time and double the activations.

        Args:
            latents: [1, 16, T, H, W].
            condition: [1, 20, T, H, W].
            timestep: scalar, in the scheduler's units (0 to 1000).
        """
        transformer = self._transformer
        video = torch.cat([latents, condition], dim=1).to(transformer.dtype)
        rope = transformer.rope(video)
        tokens = transformer.patch_embedding(video).flatten(2).transpose(1, 2).contiguous()
        time_embedding, modulation = self._embed_time(timestep.expand(1), tokens.dtype)
        outputs = []
        for branch in branches:
            hidden = self._blocks(tokens, branch.context, modulation, rope, [worn])
            outputs.append(self._head(hidden, time_embedding, video.shape))
        return tuple(outputs)

    def _embed_time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedder = self._transformer.condition_embedder
        sinusoids = embedder.timesteps_proj(timestep).to(embedder.time_embedder.linear_1.weight.dtype)
        embedding = embedder.time_embedder(sinusoids).to(dtype)
        return embedding, embedder.time_proj(embedder.act_fn(embedding)).unflatten(1, (6, -1))

    def _head(self, hidden: Tensor, time_embedding: Tensor, video_shape: torch.Size) -> Tensor:
        transformer = self._transformer
        shift, scale = (transformer.scale_shift_table + time_embedding.unsqueeze(1)).chunk(2, dim=1)
        hidden = (transformer.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        hidden = transformer.proj_out(hidden)
        rows, _, frames, height, width = video_shape
        patch_t, patch_h, patch_w = transformer.config.patch_size
        grid = (frames // patch_t, height // patch_h, width // patch_w)
        patches = hidden.reshape(rows, *grid, patch_t, patch_h, patch_w, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)
