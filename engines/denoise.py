"""One forward of the Wan transformer, taken apart at the border of its blocks.

Patch embedding, condition embedding and head stay here; the stack of blocks is an engine (idea 5 of the design), which
only ever sees tokens. The arithmetic is diffusers' WanTransformer3DModel.forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cinecat.engines.slots import StyleSlots, Worn
from cinecat.engines.tokens import path
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan

_THETA = 10000.0
"""Base of Wan's rotary frequencies; diffusers keeps it in no config."""


class BlockStack(Protocol):
    """The compiled part of the denoiser.

    Attributes:
        name: the backend, as results report it.
    """

    name: str

    def __call__(
        self,
        tokens: Tensor,
        context: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: list[Worn],
        key_bias: Tensor | None,
    ) -> Tensor:
        """Runs all blocks.

        Args:
            tokens: [rows, K, dim].
            context: image tokens followed by text tokens, [rows, image + 512, dim].
            modulation: [rows, 6, dim], of each row's timestep.
            rope: cosines and sines, [1, K, 1, head_dim] each, float32.
            rows: the style that each row wears.
            key_bias: added to the logits of self-attention, [1, 1, 1, K] in the tokens' dtype; None for none.

        Returns:
            [rows, K, dim].
        """
        ...


class TorchBlocks:
    """diffusers' own blocks, run eagerly.

    Args:
        slots: what rows wear; None for blocks that have none, as in training, where all rows must wear nothing.
    """

    name = "torch"

    def __init__(self, transformer: Any, slots: StyleSlots | None) -> None:
        self._blocks = transformer.blocks
        self._slots = slots
        self._self_attention = _BiasedAttention()
        for block in self._blocks:
            block.attn1.set_processor(self._self_attention)

    def __call__(
        self,
        tokens: Tensor,
        context: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: list[Worn],
        key_bias: Tensor | None,
    ) -> Tensor:
        if self._slots is not None:
            self._slots.dress(rows)
        self._self_attention.key_bias = key_bias
        for block in self._blocks:
            tokens = block(tokens, context, modulation, rope)
        return tokens


class _BiasedAttention(WanAttnProcessor):  # type: ignore[misc]
    """diffusers' self-attention with the key bias of the running forward, which its blocks do not pass on."""

    key_bias: Tensor | None = None

    def __call__(self, attn: Any, hidden: Tensor, context: Any = None, mask: Any = None, rope: Any = None) -> Tensor:
        output: Tensor = super().__call__(attn, hidden, context, self.key_bias, rope)
        return output


@dataclass(frozen=True)
class Merged:
    """A forward on fewer tokens.

    Attributes:
        plan: of the latents' patches.
        prediction: of the clean latents, by the step before, [1, 16, T, H, W].
    """

    plan: TokenPlan
    prediction: Tensor


@dataclass(frozen=True)
class Branch:
    """One side of guidance: its context [1, image + 512, dim], projected once per request."""

    context: Tensor


def guided(velocities: tuple[Tensor, ...], scale: float) -> Tensor:
    """Classifier-free guidance: of the prompt's velocity and the negative prompt's, or the prompt's alone as it is."""
    velocity, *unguided = velocities
    for other in unguided:
        velocity = other + scale * (velocity - other)
    return velocity


class Denoiser:
    """Predicts velocities. Holds no state of any request."""

    def __init__(self, transformer: Any, blocks: BlockStack) -> None:
        self._transformer = transformer
        self._blocks = blocks

    def project_context(self, text: Tensor, image: Tensor) -> Branch:
        """Projects text [1, 512, text_dim] and image [1, n, image_dim] states into the blocks' context."""
        embedder = self._transformer.condition_embedder
        return Branch(torch.cat([embedder.image_embedder(image), embedder.text_embedder(text)], dim=1))

    def grid(self, latent_frames: int, latent_height: int, latent_width: int) -> Grid:
        """The patches of latents of a size; the uniform path has a token for each."""
        patch_t, patch_h, patch_w = self._transformer.config.patch_size
        return Grid(latent_frames // patch_t, latent_height // patch_h, latent_width // patch_w)

    def velocities(
        self,
        latents: Tensor,
        condition: Tensor,
        timestep: Tensor,
        branches: tuple[Branch, ...],
        worn: Worn,
        merged: Merged | None = None,
    ) -> tuple[Tensor, ...]:
        """Velocity of the same latents under each branch, [1, 16, T, H, W] each, in the transformer's dtype.

        Branches run in turn: at 14B two rows at once save no time and double the activations.

        Args:
            latents: [1, 16, T, H, W].
            condition: [1, 20, T, H, W].
            timestep: scalar, in the scheduler's units (0 to 1000).
            merged: shares tokens between patches; None, or a uniform plan, gives each its own.
        """
        transformer = self._transformer
        time_embedding, modulation = self._embed_time(timestep.expand(1), transformer.dtype)
        if merged is None or merged.plan.is_uniform:
            video = torch.cat([latents, condition], dim=1).to(transformer.dtype)
            rope = transformer.rope(video)
            tokens = transformer.patch_embedding(video).flatten(2).transpose(1, 2).contiguous()
            return tuple(
                path.from_patches(self._head(hidden, time_embedding), latents.shape)
                for hidden in self._run(tokens, modulation, rope, branches, worn, None)
            )
        plan, sigma = merged.plan, float(timestep) / 1000.0
        noisy, prediction = path.to_patches(latents), path.to_patches(merged.prediction)
        content = path.merge(plan, noisy, prediction, sigma)
        patches = torch.cat([content, plan.mean(path.to_patches(condition))], dim=2).to(transformer.dtype)
        embedding = transformer.patch_embedding
        tokens = F.linear(patches, embedding.weight.flatten(1), embedding.bias)
        key_bias = plan.sizes.log().to(tokens.dtype).view(1, 1, 1, -1)
        outputs = []
        for hidden in self._run(tokens, modulation, self._rope_at(plan.positions), branches, worn, key_bias):
            clean = content - sigma * self._head(hidden, time_embedding).float()
            velocity = (noisy - path.unmerge(plan, clean, prediction)) / sigma
            outputs.append(path.from_patches(velocity, latents.shape).to(transformer.dtype))
        return tuple(outputs)

    def _run(
        self,
        tokens: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        branches: tuple[Branch, ...],
        worn: Worn,
        key_bias: Tensor | None,
    ) -> Iterator[Tensor]:
        for branch in branches:
            yield self._blocks(tokens, branch.context, modulation, rope, [worn], key_bias)

    def _rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE's tables between the positions that diffusers tabulates: positions are [K, 3], in patches."""
        rope = self._transformer.rope
        angles = [
            position.double()[:, None] * _THETA ** -(torch.arange(0, dim, 2, device=positions.device).double() / dim)
            for position, dim in zip(positions.unbind(1), (rope.t_dim, rope.h_dim, rope.w_dim), strict=True)
        ]
        angle = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)[None, :, None]
        return angle.cos().float(), angle.sin().float()

    def _embed_time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedder = self._transformer.condition_embedder
        sinusoids = embedder.timesteps_proj(timestep).to(embedder.time_embedder.linear_1.weight.dtype)
        embedding = embedder.time_embedder(sinusoids).to(dtype)
        return embedding, embedder.time_proj(embedder.act_fn(embedding)).unflatten(1, (6, -1))

    def _head(self, hidden: Tensor, time_embedding: Tensor) -> Tensor:
        """Velocity of every token, [rows, K, channels x 4], laid out as `path.to_patches` does."""
        transformer = self._transformer
        shift, scale = (transformer.scale_shift_table + time_embedding.unsqueeze(1)).chunk(2, dim=1)
        hidden = (transformer.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        output: Tensor = transformer.proj_out(hidden)
        return output.view(*output.shape[:2], path.PATCH**2, -1).transpose(2, 3).flatten(2)
