"""Training of the transformer: flow matching on latents, conditioned as the engine conditions it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from cinecat.engines.stages import TEXT_TOKENS
from cinecat.engines.training.latents import LatentSet
from cinecat.engines.training.loop import run_training
from cinecat.engines.training.muon import Optimisers
from cinecat.engines.training.precision import mixed_precision
from cinecat.engines.training.progress import Journal

# Layers at the transformer's edges, which AdamW trains.
_EDGES = ("patch_embedding", "condition_embedder", "proj_out")

# Of the latents' unit variance. A still film's latents lie 0.11 from those of its first frame, which the encoder treats
# by itself; nine tenths of a moving film's lie below the second.
_STILL_CHANGE, _FULL_CHANGE = 0.2, 0.8


@dataclass(frozen=True)
class DitRecipe:
    """How the transformer is trained.

    Attributes:
        steps: optimiser steps; the learning rate's cosine ends there.
        muon_rate, adam_rate: learning rates of the blocks' matrices and of the rest.
        warmup: steps of their rise.
        prompt_dropout: part of the samples that see an empty prompt, so that guidance works.
        shift: time shift of the sampled noise levels, as the scheduler's.
        average: longest decay of the averaged weights.
        motion_weight: how much more the loss of latents that change over time weighs than that of still ones. What
            stands still is copied from the first frame, soon learnt and most of the picture; where the caption tells
            the course, the best prediction is the same under any weights.
    """

    steps: int = 1200
    muon_rate: float = 0.02
    adam_rate: float = 1.2e-3
    warmup: int = 20
    prompt_dropout: float = 0.1
    shift: float = 3.0
    average: float = 0.99
    motion_weight: float = 0.0
    seed: int = 31


@dataclass(frozen=True)
class Lessons:
    """Films of one size that a training draws from.

    Attributes:
        batch: films of a step.
        share: of the steps that have these films.
    """

    films: LatentSet
    batch: int
    share: float = 1.0


def initialise(transformer: WanTransformer3DModel, seed: int) -> None:
    """Starts with residual branches open and a text attention that sees the words.

    A prompt's dozen words stand among some five hundred empty positions, which would take nearly all of the attention
    for hundreds of steps. All of those share one key: queries and that key begin at odds.
    """
    dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()
        nn.init.xavier_uniform_(transformer.patch_embedding.weight.view(dim, -1))
        transformer.patch_embedding.bias.zero_()
        embedder = transformer.condition_embedder
        embedder.text_embedder.linear_1.weight.mul_(1.5)
        embedder.text_embedder.linear_2.weight.mul_(1.5)
        embedder.time_proj.weight.zero_()
        transformer.proj_out.weight.zero_()
        signs = torch.randint(0, 2, (dim,)).float() * 2 - 1
        for block in transformer.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, (2, 5)] = 0.4
            block.attn2.to_k.bias.copy_(0.03 * signs)
            block.attn2.to_q.bias.copy_(-0.7 * signs)
        transformer.scale_shift_table.zero_()


class SelfAttention:
    """Attention between the video's tokens, written out.

    For some hundred tokens in a CPU's bfloat16 it is faster than the fused kernel, whose backward pass alone took a
    quarter of a step.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert rotary_emb is not None
        cosine, sine = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]

        def turned(states: Tensor) -> Tensor:
            first, second = states.view(*states.shape[:2], attention.heads, -1, 2).unbind(-1)
            pairs = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
            return pairs.flatten(3).transpose(1, 2)

        value = split_heads(attention, attention.to_v(hidden_states))
        query = turned(attention.norm_q(attention.to_q(hidden_states))).to(value.dtype)
        key = turned(attention.norm_k(attention.to_k(hidden_states))).to(value.dtype)
        result = attend(query, key, value)
        output: Tensor = attention.to_out[0](result.transpose(1, 2).flatten(2))
        return output


class PaddedTextAttention:
    """Cross-attention over the words of a prompt and one key that stands for all of its empty positions.

    With `bias` = log of how many positions a key stands for, this is exactly attention over the padded prompt.
    """

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias  # [B, 1, 1, words + 1]

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        words = self.bias.shape[-1]
        image, text = encoder_hidden_states[:, :-words], encoder_hidden_states[:, -words:]

        query = split_heads(attention, attention.norm_q(attention.to_q(hidden_states)))
        text_key = split_heads(attention, attention.norm_k(attention.to_k(text)))
        text_value = split_heads(attention, attention.to_v(text))
        image_key = split_heads(attention, attention.norm_added_k(attention.add_k_proj(image)))
        image_value = split_heads(attention, attention.add_v_proj(image))
        result = attend(query, text_key, text_value, self.bias) + attend(query, image_key, image_value)
        output: Tensor = attention.to_out[0](result.transpose(1, 2).flatten(2))
        return output


def split_heads(attention: Any, states: Tensor) -> Tensor:
    """States [B, n, heads * d] as [B, heads, n, d]."""
    return states.view(*states.shape[:2], attention.heads, -1).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention [B, heads, n, d] without a fused kernel; `bias` is added to the scores."""
    scores = (query * (1 / math.sqrt(query.shape[-1]))) @ key.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1).to(value.dtype) @ value


def text_bias(counts: Tensor, words: int) -> Tensor:
    """Log of the positions that each key stands for, [B, 1, 1, words + 1]; the last key is the empty one.

    Args:
        counts: [B], tokens of each prompt, at most `words`.
    """
    used = torch.arange(words)[None] < counts[:, None]
    bias = torch.where(used, 0.0, float("-inf"))
    empty = (TEXT_TOKENS - counts).float().log()[:, None]
    return torch.cat([bias, empty], dim=1)[:, None, None]


def predict(
    transformer: WanTransformer3DModel, video: Tensor, timestep: Tensor, text: Tensor, counts: Tensor, image: Tensor
) -> Tensor:
    """Velocity [B, 16, T, H, W], equal to the transformer's own forward with the text padded to 512.

    Args:
        video: noisy latents and condition, [B, 36, T, H, W].
        timestep: [B], 0 to 1000.
        text: [B, words, text_dim], zero past each prompt's end.
        counts: [B], tokens of each prompt.
        image: [B, n, image_dim].
    """
    processor = PaddedTextAttention(text_bias(counts, text.shape[1]))
    kept = [(block.attn1.processor, block.attn2.processor) for block in transformer.blocks]
    empty = text.new_zeros(text.shape[0], 1, text.shape[2])
    try:
        for block in transformer.blocks:
            block.attn1.processor, block.attn2.processor = SelfAttention(), processor
        velocity: Tensor = transformer(video, timestep, torch.cat([text, empty], dim=1), image, return_dict=False)[0]
    finally:
        for block, (own, cross) in zip(transformer.blocks, kept, strict=True):
            block.attn1.processor, block.attn2.processor = own, cross
    return velocity


@dataclass(frozen=True)
class Batch:
    """Samples of a latent set with their noise.

    Attributes:
        clean, noise: [B, 16, T, H, W].
        level: [B], share of noise.
    """

    clean: Tensor
    noise: Tensor
    level: Tensor
    condition: Tensor
    text: Tensor
    counts: Tensor
    image: Tensor


def flow_loss(transformer: WanTransformer3DModel, batch: Batch, motion_weight: float = 0.0) -> Tensor:
    """Squared error of the velocity noise - clean at the batch's noise levels, a mean weighted by `motion_weights`."""
    level = batch.level.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * batch.clean + level * batch.noise
    video = torch.cat([noisy, batch.condition], dim=1)
    with mixed_precision():
        velocity = predict(transformer, video, batch.level * 1000.0, batch.text, batch.counts, batch.image)
    error = (velocity.float() - (batch.noise - batch.clean)).square().mean(dim=1, keepdim=True)
    weights = motion_weights(batch.clean, motion_weight)
    return (weights * error).sum() / weights.sum()


def motion_weights(clean: Tensor, motion_weight: float) -> Tensor:
    """Weights [B, 1, T, H, W] of latents [B, 16, T, H, W]: 1 where they are as in the first frame, and up to
    `motion_weight` more where they change."""
    change = (clean - clean[:, :, :1]).square().mean(dim=1, keepdim=True)
    return 1.0 + motion_weight * ((change - _STILL_CHANGE) / (_FULL_CHANGE - _STILL_CHANGE)).clamp(0.0, 1.0)


def train_dit(
    transformer: WanTransformer3DModel,
    lessons: Sequence[Lessons],
    held_out: LatentSet,
    recipe: DitRecipe,
    journal: Journal,
    save_seconds: float = 120.0,
    fresh: bool = True,
    compiled: bool = False,
) -> None:
    """Trains in place as `run_training` does.

    Args:
        lessons: what most steps draw from, and what the other steps do.
        held_out: films of the size of the first lessons.
        fresh: starts from the recipe's initialisation rather than from the weights that are there.
        compiled: compiles the blocks for each size first, with Inductor.
    """
    if fresh:
        initialise(transformer, recipe.seed)
    if compiled:
        for block in transformer.blocks:
            block.compile(dynamic=False)
    probe = _probe(held_out, lessons[0].batch, recipe)

    def measure(model: WanTransformer3DModel, step: int) -> tuple[float, dict[str, float | str]]:
        loss = _held_out_loss(model, probe)
        return loss, {"held_out_loss": round(loss, 5)}

    def loss_at(step: int) -> Tensor:
        these, turn = lessons_of(lessons, step)
        return flow_loss(transformer, draw_batch(these, recipe, turn), recipe.motion_weight)

    run_training(
        "DiT",
        transformer,
        Optimisers(transformer, recipe.muon_rate, recipe.adam_rate, (0.9, 0.98), _EDGES),
        journal,
        steps=recipe.steps,
        warmup=recipe.warmup,
        average_decay=recipe.average,
        save_seconds=save_seconds,
        loss_at=loss_at,
        measure=measure,
    )


def lessons_of(lessons: Sequence[Lessons], step: int) -> tuple[Lessons, int]:
    """Which lessons a step has, and their how manieth it is: the first wherever no other's share falls due."""
    for others in lessons[1:]:
        turn = int(step * others.share)
        if int((step + 1) * others.share) > turn:
            return others, turn
    return lessons[0], step


def draw_batch(lessons: Lessons, recipe: DitRecipe, step: int) -> Batch:
    """The samples of one step; every epoch is another order of the whole set."""
    latents = lessons.films
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    count, size = len(latents), min(lessons.batch, len(latents))
    first = step * size
    places = torch.arange(first, first + size)
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed + epoch))
        for epoch in sorted(set((places // count).tolist()))
    }
    index = torch.stack([orders[place // count][place % count] for place in places.tolist()])
    # One level from each of B equal parts: less noise in the loss than B free draws.
    uniform = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    level = shifted(uniform[torch.randperm(size, generator=generator)], recipe.shift)
    dropped = torch.rand(size, generator=generator) < recipe.prompt_dropout
    clean = latents.clean[index].float()
    noise = torch.randn(clean.shape, generator=generator)
    text, counts = latents.text[index].float(), latents.counts[index]
    text = torch.where(dropped[:, None, None], latents.empty_text.float()[None], text)
    counts = torch.where(dropped, latents.empty_count, counts)
    condition = latents.condition(index)
    return Batch(clean, noise, level, condition, text, counts, latents.image[index].float())


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels of the scheduler's time shift, kept off both ends."""
    level = shift * uniform / (1 + (shift - 1) * uniform)
    return level.clamp(0.001, 0.999)


def _probe(held_out: LatentSet, batch: int, recipe: DitRecipe) -> list[Batch]:
    """The held-out set with fixed noise."""
    lessons = Lessons(held_out, min(batch, len(held_out)))
    fixed = replace(recipe, prompt_dropout=0.0, seed=recipe.seed + 7)
    return [draw_batch(lessons, fixed, step) for step in range(len(held_out) // lessons.batch)]


@torch.no_grad()
def _held_out_loss(transformer: WanTransformer3DModel, probe: list[Batch]) -> float:
    return sum(float(flow_loss(transformer, batch)) for batch in probe) / len(probe)
