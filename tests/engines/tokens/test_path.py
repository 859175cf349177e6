"""Patches: every latent in its place, and back again."""

from __future__ import annotations

import pytest
import torch

from cinecat.engines.tokens.path import from_patches, to_patches

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
