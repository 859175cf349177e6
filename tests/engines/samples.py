"""A transformer and a VAE smaller than any checkpoint, LoRAs for the transformer's layers, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from cinecat.engines.slots import StyleSlots
from tests.plugins.samples import Factors, random_factors

DIM, FFN, TEXT, IMAGE = 24, 40, 16, 12


def small_transformer() -> WanTransformer3DModel:
    """The same weights every time, none of them zero; float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=DIM // 2,
            in_channels=36,
            out_channels=16,
            text_dim=TEXT,
            freq_dim=8,
            ffn_dim=FFN,
            num_layers=2,
            cross_attn_norm=True,
            image_dim=IMAGE,
            added_kv_proj_dim=DIM,
            rope_max_seq_len=32,
        )
        for parameter in transformer.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return transformer.eval().requires_grad_(False)


def small_vae() -> AutoencoderKLWan:
    """Two residual blocks a level, as in the 14B model, and norms that do something; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(base_dim=8, num_res_blocks=2).eval().requires_grad_(False)
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.normal_(1.0, 0.3)
    return vae


@torch.no_grad()
def velocity(transformer: WanTransformer3DModel, rows: int = 1) -> Tensor:
    """Of one shot that every row has: [rows, 16, 2, 4, 4]."""
    draw = torch.Generator().manual_seed(1)
    shapes = {
        "hidden_states": (36, 2, 4, 4),
        "encoder_hidden_states": (512, TEXT),
        "encoder_hidden_states_image": (3, IMAGE),
    }
    inputs = {name: torch.randn(1, *shape, generator=draw).repeat_interleave(rows, 0) for name, shape in shapes.items()}
    output: Tensor = transformer(**inputs, timestep=torch.full((rows,), 500.0), return_dict=False)[0]
    return output


def factors_for(
    targets: Mapping[str, tuple[int, int]], seed: int, rank: int, alpha: float | None
) -> dict[str, Factors]:
    """A LoRA of the targets given with their (in, out) features."""
    return {
        target: random_factors(rank, alpha, in_features=n, out_features=m, seed=seed + index)
        for index, (target, (n, m)) in enumerate(targets.items())
    }


def slot_targets(transformer: WanTransformer3DModel) -> dict[str, tuple[int, int]]:
    """Sizes of all layers that a style may change. Spoils the transformer."""
    return StyleSlots(transformer.blocks, 1, 1, torch.float32).targets
