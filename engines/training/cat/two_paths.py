"""One transformer on all tokens and on merged ones, through the denoiser that requests run on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cinecat.engines.backends.parity import BiasedAttention, diffusers_rope
from cinecat.engines.denoise import Denoiser, Merged, Passage
from cinecat.engines.slots import NO_STYLE, Factors
from cinecat.engines.tokens import path
from cinecat.engines.tokens.adaptive import price
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan
from cinecat.engines.tokens.schedule import rung_tokens
from cinecat.engines.training.cat.recipe import CatRecipe
from cinecat.engines.training.dit import PaddedTextAttention, text_bias
from cinecat.engines.training.styles.trainer import add_lora

_ADAPTER = "default"
"""peft's name for the adapter that `add_lora` adds."""


@dataclass(frozen=True)
class Given:
    """What a shot is made from.

    Attributes:
        condition: [20, T, H, W], float32.
        text: states of the prompt's own tokens, [n, text_dim].
        image: CLIP states [m, image_dim].
    """

    condition: Tensor
    text: Tensor
    image: Tensor


class CatAdapter(nn.Module):
    """The factors of the adapter in a transformer, which shares them: what is loaded here is worn there."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.factors = nn.ModuleDict(
            {
                name.replace(".", "/"): nn.ModuleList([layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]])
                for name, layer in transformer.named_modules()
                if isinstance(layer, LoraLayer)
            }
        )


class TwoPaths:
    """A frozen transformer with an adapter, which begins without effect, and styles.

    Args:
        transformer: gets peft's layers.
        styles: factors without a `misfit`, by any name that peft takes, e.g. a fingerprint; what they change outside
            the blocks is left out, as a server leaves it out.
    """

    def __init__(self, transformer: WanTransformer3DModel, recipe: CatRecipe, styles: Mapping[str, Factors]) -> None:
        add_lora(transformer, recipe.lora)
        self.adapter = CatAdapter(transformer)
        self._transformer = transformer
        self._denoiser = Denoiser(transformer, self._run_blocks)
        for name, factors in styles.items():
            _add_style(transformer, name, factors)
        self._layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]

    def clean(
        self,
        noisy: Tensor,
        timestep: float,
        given: Given,
        style: str = "",
        prediction: Tensor | None = None,
        rung: float = 1.0,
        adapted: bool = False,
    ) -> Tensor:
        """The clean latents that the transformer predicts, [16, T, H, W], float32, on its device.

        Args:
            noisy: [16, T, H, W], float32.
            timestep: in the scheduler's units (0 to 1000).
            style: that is worn at strength 1; empty for none.
            prediction: of the clean latents, carried on from steps before, [16, T, H, W], float32; None spends all
                tokens.
            rung: that the plan is made for.
            adapted: whether the adapter is worn, and gets gradients.
        """
        self._wear([name for name in (style, _ADAPTER if adapted else "") if name], adapted)
        transformer = self._transformer
        place, dtype = transformer.device, transformer.patch_embedding.weight.dtype
        text = torch.cat([given.text, given.text.new_zeros(1, given.text.shape[1])])
        branch = self._denoiser.project_context(text[None].to(place, dtype), given.image[None].to(place, dtype))
        noisy = noisy[None].to(place)
        merged = None
        if prediction is not None:
            prediction = prediction.to(place)
            merged = Merged(plan_for(prediction, rung), prediction[None])
        velocity = self._denoiser.velocities(
            noisy, given.condition[None].to(place), torch.tensor(timestep, device=place), (branch,), NO_STYLE, merged
        )[0]
        return (noisy - timestep / 1000.0 * velocity.float())[0]

    def _run_blocks(self, passages: Sequence[Passage]) -> list[Tensor]:
        """diffusers' blocks, with peft's layers in them and gradients through them; a BlockStack for one branch."""
        (passage,) = passages
        (branch,) = passage.branches
        tokens, key_bias = passage.tokens, passage.key_bias
        words = branch.text.shape[1] - 1
        # Exactly the padded prompt: all empty positions share one key, which counts for as many.
        text_attention = PaddedTextAttention(text_bias(torch.tensor([words]), words).to(tokens))
        self_attention = BiasedAttention(None if key_bias is None else key_bias[:, None, None])
        context = torch.cat([branch.image, branch.text], dim=1)
        tables = diffusers_rope(passage.rope)
        for block in self._transformer.blocks:
            block.attn1.processor, block.attn2.processor = self_attention, text_attention
            tokens = block(tokens, context, passage.modulation, tables)
        return [tokens]

    def _wear(self, names: list[str], adapted: bool) -> None:
        for layer in self._layers:
            layer.set_adapter(names, inference_mode=True)
        self.adapter.requires_grad_(adapted)


def misfit(transformer: WanTransformer3DModel, factors: Factors) -> str:
    """Why a style cannot be worn by a transformer that has no adapters yet, or nothing where it can."""
    layers = dict(transformer.named_modules())
    inside = {module: pair for module, pair in factors.items() if module.startswith("blocks.")}
    for module, (a, b) in inside.items():
        layer, sizes = layers.get(module), (a.shape[1], b.shape[0])
        if not isinstance(layer, nn.Linear) or sizes != (layer.in_features, layer.out_features):
            return f"{module} takes no {sizes[0]} -> {sizes[1]}"
    return "" if inside else "it changes nothing inside the blocks"


def plan_for(prediction: Tensor, rung: float) -> TokenPlan:
    """The plan that a merged step has at a rung.

    Args:
        prediction: of the clean latents, carried on from steps before, float32 [16, T, H, W].
    """
    frames, height, width = prediction.shape[1:]
    grid = Grid(frames, height // path.PATCH, width // path.PATCH)
    return price(grid, prediction[None]).allocate(rung_tokens(grid, rung))


@torch.no_grad()
def _add_style(transformer: WanTransformer3DModel, name: str, factors: Factors) -> None:
    """Adds a style's factors as a frozen adapter; where they have different ranks, the lower ones are filled up."""
    inside = {module: pair for module, pair in factors.items() if module.startswith("blocks.")}
    rank = max(a.shape[0] for a, _ in inside.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, that there is an adapter already
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(inside)), name)
    for module, (a, b) in inside.items():
        layer: Any = transformer.get_submodule(module)
        _fill(layer.lora_A[name].weight, a)
        _fill(layer.lora_B[name].weight, b)


def _fill(weight: Tensor, values: Tensor) -> None:
    weight.zero_()
    weight[: values.shape[0], : values.shape[1]] = values
