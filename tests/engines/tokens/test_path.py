"""Patches: every latent in its place, and back again."""

from __future__ import annotations

import pytest
import torch

from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.path import from_patches, merge, to_patches, unmerge
from cinecat.engines.tokens.plan import TokenPlan

LATENTS = torch.randn(2, 3, 2, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_patch_holds_its_latents_channel_by_channel(dtype: torch.dtype) -> None:
    latents = LATENTS.to(dtype)
    patches = to_patches(latents)
    assert patches.shape == (2, 2 * 2 * 3, 3 * 4)
    assert torch.equal(patches[1, 6 + 3 + 2], latents[1, :, 1, 2:4, 4:6].flatten())
    assert torch.equal(from_patches(patches, latents.shape), latents)


def test_the_layout_in_memory_does_not_matter() -> None:
    turned = LATENTS.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(to_patches(turned), to_patches(LATENTS))


def test_gradients_flow_through_patches() -> None:
    latents = LATENTS.clone().requires_grad_()
    to_patches(latents).square().sum().backward()
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad, 2 * LATENTS)


def test_a_patch_follows_its_token_by_as_much_as_it_is_of_it() -> None:
    plan = TokenPlan.from_labels(Grid(1, 1, 7), torch.tensor([0, 1, 1, 2, 2, 2, 2]))
    expected = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(1))
    found = plan.mean(expected) + torch.tensor([1.0, 2.0, 4.0])[None, :, None]
    moved = unmerge(plan, found, expected) - expected
    torch.testing.assert_close(moved, torch.ones(1, 7, 3))


def test_a_token_has_the_mean_content_and_noise_of_full_variance() -> None:
    plan = TokenPlan.from_labels(Grid(1, 2, 2), torch.zeros(4, dtype=torch.long))
    clean, noise = torch.randn(2, 1, 4, 3, generator=torch.Generator().manual_seed(2))
    merged = merge(plan, 0.75 * clean + 0.25 * noise, clean, 0.25)
    torch.testing.assert_close(merged[:, 0], 0.75 * clean.mean(dim=1) + 0.25 * 2.0 * noise.mean(dim=1))
