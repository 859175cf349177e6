"""Training of the transformer: flow matching on latents, conditioned as the engine conditions it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from cinecat.engines.stages import TEXT_TOKENS
from cinecat.engines.training.latents import LatentSet
from cinecat.engines.training.loop import run_training
from cinecat.engines.training.muon import Optimisers
from cinecat.engines.training.progress import Journal

# Layers at the transformer's edges, which AdamW trains.
_EDGES = ("patch_embedding", "condition_embedder", "proj_out")


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
    """

    steps: int = 1200
    batch: int = 16
    muon_rate: float = 0.02
    adam_rate: float = 1.2e-3
    warmup: int = 20
    prompt_dropout: float = 0.1
    shift: float = 3.0
    average: float = 0.99
    seed: int = 31


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

        def heads(states: Tensor) -> Tensor:
            return states.view(*states.shape[:2], attention.heads, -1).transpose(1, 2)

        query = heads(attention.norm_q(attention.to_q(hidden_states)))
        text_key, text_value = heads(attention.norm_k(attention.to_k(text))), heads(attention.to_v(text))
        image_key = heads(attention.norm_added_k(attention.add_k_proj(image)))
        image_value = heads(attention.add_v_proj(image))
        # Few keys: written out it is faster than a fused kernel, and it takes the bias.
        scores = query @ text_key.transpose(2, 3) / math.sqrt(query.shape[-1]) + self.bias
        result = scores.softmax(dim=-1) @ text_value
        result = result + functional.scaled_dot_product_attention(query, image_key, image_value)
        output: Tensor = attention.to_out[0](result.transpose(1, 2).flatten(2))
        return output


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
    kept = [block.attn2.processor for block in transformer.blocks]
    empty = text.new_zeros(text.shape[0], 1, text.shape[2])
    try:
        for block in transformer.blocks:
            block.attn2.processor = processor
        velocity: Tensor = transformer(video, timestep, torch.cat([text, empty], dim=1), image, return_dict=False)[0]
    finally:
        for block, before in zip(transformer.blocks, kept, strict=True):
            block.attn2.processor = before
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


def flow_loss(transformer: WanTransformer3DModel, batch: Batch) -> Tensor:
    """Mean squared error of the velocity noise - clean at the batch's noise levels."""
    level = batch.level.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * batch.clean + level * batch.noise
    video = torch.cat([noisy, batch.condition], dim=1)
    velocity = predict(transformer, video, batch.level * 1000.0, batch.text, batch.counts, batch.image)
    return functional.mse_loss(velocity, batch.noise - batch.clean)


def train_dit(
    transformer: WanTransformer3DModel,
    train: LatentSet,
    held_out: LatentSet,
    recipe: DitRecipe,
    journal: Journal,
    save_seconds: float = 120.0,
    fresh: bool = True,
) -> None:
    """Trains in place as `run_training` does.

    Args:
        fresh: starts from the recipe's initialisation rather than from the weights that are there.
    """
    if fresh:
        initialise(transformer, recipe.seed)
    probe = _probe(held_out, recipe)

    def measure(model: WanTransformer3DModel, step: int) -> tuple[float, dict[str, float | str]]:
        loss = _held_out_loss(model, probe)
        return loss, {"held_out_loss": round(loss, 5)}

    run_training(
        "DiT",
        transformer,
        Optimisers(transformer, recipe.muon_rate, recipe.adam_rate, (0.9, 0.98), _EDGES),
        journal,
        steps=recipe.steps,
        warmup=recipe.warmup,
        average_decay=recipe.average,
        save_seconds=save_seconds,
        loss_at=lambda step: flow_loss(transformer, draw_batch(train, recipe, step)),
        measure=measure,
    )


def draw_batch(latents: LatentSet, recipe: DitRecipe, step: int) -> Batch:
    """The samples of one step; every epoch is another order of the whole set."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    count, size = len(latents), min(recipe.batch, len(latents))
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


def _probe(held_out: LatentSet, recipe: DitRecipe) -> list[Batch]:
    """The held-out set with fixed noise."""
    size = min(recipe.batch, len(held_out))
    fixed = replace(recipe, batch=size, prompt_dropout=0.0, seed=recipe.seed + 7)
    return [draw_batch(held_out, fixed, step) for step in range(len(held_out) // size)]


@torch.no_grad()
def _held_out_loss(transformer: WanTransformer3DModel, probe: list[Batch]) -> float:
    return sum(float(flow_loss(transformer, batch)) for batch in probe) / len(probe)
