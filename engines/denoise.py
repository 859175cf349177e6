"""One forward of the Wan transformer, taken apart at the border of its blocks.

Patch embedding, condition embedding and head stay here; the stack of blocks is an engine (idea 5 of the design), which
only ever sees tokens. The arithmetic is diffusers' WanTransformer3DModel.forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cinecat.engines.backends.contract import Engine, StackInputs
from cinecat.engines.context import Branch, RowContexts
from cinecat.engines.slots import StyleSlots, Worn
from cinecat.engines.tokens import path
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan

_THETA = 10000.0
"""Base of Wan's rotary frequencies; diffusers keeps it in no config."""


TOGETHER_TOKENS = 512
"""Up to so many tokens both rows of guidance run in one forward, which takes 0.65 of the time of two at 32 tokens and
0.91 at 320 (docs/engines.md); beyond, they fill the processor one by one, and two at once would need twice the memory.
"""


class BlockStack(Protocol):
    """Runs the transformer's blocks for the rows of one request."""

    def __call__(
        self,
        tokens: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        branches: Sequence[Branch],
        worn: Worn,
        key_bias: Tensor | None,
    ) -> Tensor:
        """Runs all blocks on the same tokens under each branch.

        Args:
            tokens: [1, K, dim].
            modulation: [1, 6, dim], of the timestep.
            rope: cosines and sines, [1, K, head_dim / 2] each, float32.
            worn: the style that all rows wear.
            key_bias: added to the logits of self-attention, [1, K] in the tokens' dtype; None for none.

        Returns:
            [branches, K, dim].
        """
        ...


class EngineBlocks:
    """The blocks as an engine runs them.

    Args:
        transformer: diffusers', for the keys and values of the context.
        slots: what rows wear; None where they never wear anything.
    """

    def __init__(self, transformer: Any, engine: Engine, slots: StyleSlots | None) -> None:
        self.engine = engine
        self._transformer = transformer
        self._slots = slots

    def __call__(
        self,
        tokens: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        branches: Sequence[Branch],
        worn: Worn,
        key_bias: Tensor | None,
    ) -> Tensor:
        if tokens.shape[1] <= TOGETHER_TOKENS:
            return self._run(tokens, modulation, rope, branches, worn, key_bias)
        return torch.cat([self._run(tokens, modulation, rope, [each], worn, key_bias) for each in branches])

    def _run(
        self,
        tokens: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        branches: Sequence[Branch],
        worn: Worn,
        key_bias: Tensor | None,
    ) -> Tensor:
        rows = len(branches)
        context = RowContexts.of([branch.keys(self._transformer.blocks, self._slots, worn) for branch in branches])

        def each(shared: Tensor) -> Tensor:
            return shared if rows == 1 else shared.repeat_interleave(rows, dim=0)

        return self.engine(
            StackInputs(
                tokens=each(tokens),
                rope_cos=each(rope[0]),
                rope_sin=each(rope[1]),
                modulation=each(modulation),
                **vars(context),
                key_bias=None if key_bias is None else each(key_bias),
                styles=None if self._slots is None else self._slots.rows([worn] * rows),
            )
        )


@dataclass(frozen=True)
class Merged:
    """A forward on fewer tokens.

    Attributes:
        plan: of the latents' patches.
        prediction: of the clean latents, by the step before, [1, 16, T, H, W].
    """

    plan: TokenPlan
    prediction: Tensor


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
        self._rope_of_grid = lru_cache(maxsize=8)(self._rope_of)

    def project_context(self, text: Tensor, image: Tensor) -> Branch:
        """Projects text [1, 512, text_dim] and image [1, n, image_dim] states into the blocks' context."""
        return Branch.project(self._transformer.condition_embedder, text, image)

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

        Args:
            latents: [1, 16, T, H, W].
            condition: [1, 20, T, H, W].
            timestep: scalar, in the scheduler's units (0 to 1000), best on the CPU: its value is read.
            merged: shares tokens between patches; None, or a uniform plan, gives each its own.
        """
        transformer = self._transformer
        time_embedding, modulation = self._embed_time(timestep.to(latents.device).expand(1), transformer.dtype)
        if merged is None or merged.plan.is_uniform:
            video = torch.cat([latents, condition], dim=1).to(transformer.dtype)
            tokens = transformer.patch_embedding(video).flatten(2).transpose(1, 2).contiguous()
            rope = self._rope_of_grid(self.grid(*latents.shape[2:]))
            hidden = self._blocks(tokens, modulation, rope, branches, worn, None)
            return torch.split(path.from_patches(self._head(hidden, time_embedding), latents.shape), 1)
        plan, sigma = merged.plan, float(timestep) / 1000.0
        noisy, prediction = path.to_patches(latents), path.to_patches(merged.prediction)
        content = path.merge(plan, noisy, prediction, sigma)
        patches = torch.cat([content, plan.mean(path.to_patches(condition))], dim=2).to(transformer.dtype)
        embedding = transformer.patch_embedding
        tokens = F.linear(patches, embedding.weight.flatten(1), embedding.bias)
        key_bias = plan.sizes.log().to(tokens.dtype)[None]
        hidden = self._blocks(tokens, modulation, self._rope_at(plan.positions), branches, worn, key_bias)
        clean = content - sigma * self._head(hidden, time_embedding).float()
        velocity = (noisy - path.unmerge(plan, clean, prediction)) / sigma
        return torch.split(path.from_patches(velocity, latents.shape).to(transformer.dtype), 1)

    def _rope_of(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return self._rope_at(grid.positions(self._transformer.device))

    def _rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE's tables at positions [K, 3] in patches, which need not be whole: [1, K, head_dim / 2] each, float32."""
        rope = self._transformer.rope
        angles = [
            position.double()[:, None] * _THETA ** -(torch.arange(0, dim, 2, device=positions.device).double() / dim)
            for position, dim in zip(positions.unbind(1), (rope.t_dim, rope.h_dim, rope.w_dim), strict=True)
        ]
        angle = torch.cat(angles, dim=1)[None]
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
