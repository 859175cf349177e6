"""One forward of the Wan transformer, taken apart at the border of its blocks.

Patch embedding, condition embedding and head stay here; the stack of blocks is an engine (idea 5 of the design), which
only ever sees tokens. The arithmetic is diffusers' WanTransformer3DModel.forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cinecat.engines.backends.contract import Engine, StackInputs
from cinecat.engines.context import Branch, ContextKeys, RowContexts
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


KNOWN_CONTEXTS = 2
"""Contexts that ranks keep: a job that interrupts another does not cost it its own."""


@dataclass(frozen=True)
class Passage:
    """What a request sends through the blocks: the same tokens under each of its branches, a row for each.

    Attributes:
        tokens: [1, K, dim].
        modulation: [1, 6, dim], of the timestep.
        rope: cosines and sines, [1, K, head_dim / 2] each, float32.
        branches: the prompt's, then the negative prompt's where there is guidance.
        worn: the style that all its rows wear.
        key_bias: added to the logits of self-attention, [1, K] in the tokens' dtype; None for none.
    """

    tokens: Tensor
    modulation: Tensor
    rope: tuple[Tensor, Tensor]
    branches: Sequence[Branch]
    worn: Worn
    key_bias: Tensor | None


class BlockStack(Protocol):
    """Runs the transformer's blocks for several requests."""

    def __call__(self, passages: Sequence[Passage]) -> list[Tensor]:
        """Runs all blocks.

        Args:
            passages: at least one; all have as many tokens, and all a key bias or none.

        Returns:
            For each, in order, [branches, K, dim].
        """
        ...


def forward_rows(tokens: int, branches: Sequence[int]) -> int:
    """Rows of the largest forward of a step.

    Args:
        tokens: of each row.
        branches: of each request.
    """
    return sum(branches) if tokens <= TOGETHER_TOKENS else len(branches)


class EngineBlocks:
    """The blocks as an engine runs them.

    Args:
        transformer: diffusers', for the keys and values of the context.
        slots: what rows wear; None where they never wear anything.
        spread: the engine spreads its work over ranks. Then both rows of guidance always run in one forward, and the
            context comes as the same tensors in every step, so that ranks need to be sent it once.
    """

    def __init__(self, transformer: Any, engine: Engine, slots: StyleSlots | None, spread: bool = False) -> None:
        self.engine = engine
        self._transformer = transformer
        self._slots = slots
        self._spread = spread
        self._contexts: OrderedDict[tuple[int, ...], tuple[list[ContextKeys], RowContexts]] = OrderedDict()

    def __call__(self, passages: Sequence[Passage]) -> list[Tensor]:
        rows = [(index, branch) for index, passage in enumerate(passages) for branch in range(len(passage.branches))]
        if self._spread or passages[0].tokens.shape[1] <= TOGETHER_TOKENS:
            forwards = [rows]
        else:
            forwards = [[row for row in rows if row[1] == branch] for branch in sorted({branch for _, branch in rows})]
        found: dict[tuple[int, int], Tensor] = {}
        for forward in forwards:
            output = self._run([(passages[index], branch) for index, branch in forward])
            found |= zip(forward, torch.split(output, 1), strict=True)
        return [
            _joined([found[index, branch] for branch in range(len(passage.branches))])
            for index, passage in enumerate(passages)
        ]

    def _run(self, rows: Sequence[tuple[Passage, int]]) -> Tensor:
        """One forward: [rows, K, dim]. A row is a branch of a passage."""
        passages = [passage for passage, _ in rows]
        context = self._context(
            [
                passage.branches[branch].keys(self._transformer.blocks, self._slots, passage.worn)
                for passage, branch in rows
            ]
        )
        biases = [passage.key_bias for passage in passages if passage.key_bias is not None]
        return self.engine(
            StackInputs(
                tokens=_joined([passage.tokens for passage in passages]),
                rope_cos=_joined([passage.rope[0] for passage in passages]),
                rope_sin=_joined([passage.rope[1] for passage in passages]),
                modulation=_joined([passage.modulation for passage in passages]),
                **vars(context),
                key_bias=_joined(biases) if biases else None,
                styles=None if self._slots is None else self._slots.rows([passage.worn for passage in passages]),
            )
        )

    def _context(self, rows: list[ContextKeys]) -> RowContexts:
        if not self._spread:
            return RowContexts.of(rows)
        key = tuple(map(id, rows))
        known = self._contexts.pop(key, None) or (rows, RowContexts.of(rows))
        self._contexts[key] = known
        if len(self._contexts) > KNOWN_CONTEXTS:
            self._contexts.popitem(last=False)
        return known[1]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sigma_of(timestep: Tensor) -> float:
    """Share of noise at a timestep in the scheduler's units (0 to 1000)."""
    return float(timestep) / 1000.0


@dataclass(frozen=True)
class Merged:
    """A forward on fewer tokens.

    Attributes:
        plan: of the latents' patches.
        prediction: of the clean latents, by steps before, [1, 16, T, H, W].
    """

    plan: TokenPlan
    prediction: Tensor


@dataclass(frozen=True)
class Moment:
    """A request at one step.

    Attributes:
        latents: [1, 16, T, H, W].
        condition: [1, 20, T, H, W].
        timestep: scalar, in the scheduler's units (0 to 1000), best on the CPU: its value is read.
        branches: the prompt's, then the negative prompt's where there is guidance.
        worn: the style that it wears.
        merged: shares tokens between patches; None, or a uniform plan, gives each its own.
    """

    latents: Tensor
    condition: Tensor
    timestep: Tensor
    branches: Sequence[Branch]
    worn: Worn
    merged: Merged | None = None

    @property
    def sigma(self) -> float:
        """Share of noise in the latents."""
        return sigma_of(self.timestep)

    @property
    def shared(self) -> Merged | None:
        """`merged`, where tokens do stand for several patches."""
        return None if self.merged is None or self.merged.plan.is_uniform else self.merged

    @cached_property
    def patches(self) -> tuple[Tensor, Tensor]:
        """Latents and prediction of a forward on fewer tokens, [1, patches, 64] each."""
        assert self.merged is not None
        return path.to_patches(self.latents), path.to_patches(self.merged.prediction)

    @cached_property
    def content(self) -> Tensor:
        """The noisy content of shared tokens, [1, K, 64]."""
        assert self.merged is not None
        return path.merge(self.merged.plan, *self.patches, self.sigma)


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

    def context_bytes(self, branch: Branch, wears: int) -> int:
        """What a branch holds, with its keys and values for so many styles."""
        return branch.size_bytes + wears * branch.key_bytes(len(self._transformer.blocks))

    def grid(self, latent_frames: int, latent_height: int, latent_width: int) -> Grid:
        """The patches of latents of a size; the uniform path has a token for each."""
        patch_t, patch_h, patch_w = self._transformer.config.patch_size
        return Grid(latent_frames // patch_t, latent_height // patch_h, latent_width // patch_w)

    def velocities(
        self,
        latents: Tensor,
        condition: Tensor,
        timestep: Tensor,
        branches: Sequence[Branch],
        worn: Worn,
        merged: Merged | None = None,
    ) -> tuple[Tensor, ...]:
        """Velocities of one `Moment`, whose attributes the arguments are."""
        return self.velocities_of([Moment(latents, condition, timestep, branches, worn, merged)])[0]

    def velocities_of(self, moments: Sequence[Moment]) -> list[tuple[Tensor, ...]]:
        """Velocities of each moment's latents under each of its branches, [1, 16, T, H, W] each, in the transformer's
        dtype.

        Args:
            moments: all of as many tokens, all merged or none; sizes and everything else may differ.
        """
        times = [self._embed_time(moment) for moment in moments]
        passages = [self._passage(moment, modulation) for moment, (_, modulation) in zip(moments, times, strict=True)]
        hidden = self._blocks(passages)
        return [
            self._read_off(moment, self._head(states, time))
            for moment, states, (time, _) in zip(moments, hidden, times, strict=True)
        ]

    def _passage(self, moment: Moment, modulation: Tensor) -> Passage:
        transformer, latents = self._transformer, moment.latents
        merged = moment.shared
        if merged is None:
            video = torch.cat([latents, moment.condition], dim=1).to(transformer.dtype)
            tokens = transformer.patch_embedding(video).flatten(2).transpose(1, 2).contiguous()
            rope = self._rope_of_grid(self.grid(*latents.shape[2:]))
            return Passage(tokens, modulation, rope, moment.branches, moment.worn, None)
        plan = merged.plan
        patches = torch.cat([moment.content, plan.mean(path.to_patches(moment.condition))], dim=2)
        embedding = transformer.patch_embedding
        tokens = F.linear(patches.to(transformer.dtype), embedding.weight.flatten(1), embedding.bias)
        key_bias = plan.sizes.log().to(tokens.dtype)[None]
        return Passage(tokens, modulation, self._rope_at(plan.positions), moment.branches, moment.worn, key_bias)

    def _read_off(self, moment: Moment, velocities: Tensor) -> tuple[Tensor, ...]:
        """Velocities of the latents, by those of the tokens [branches, K, 64]."""
        shape, merged = moment.latents.shape, moment.shared
        if merged is None:
            return torch.split(path.from_patches(velocities, shape), 1)
        clean = moment.content - moment.sigma * velocities.float()
        noisy, prediction = moment.patches
        velocity = (noisy - path.unmerge(merged.plan, clean, prediction)) / moment.sigma
        return torch.split(path.from_patches(velocity, shape).to(self._transformer.dtype), 1)

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

    def _embed_time(self, moment: Moment) -> tuple[Tensor, Tensor]:
        """A timestep's embedding [1, dim] and modulation [1, 6, dim]."""
        embedder, dtype = self._transformer.condition_embedder, self._transformer.dtype
        timestep = moment.timestep.to(moment.latents.device).expand(1)
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
