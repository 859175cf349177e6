"""One transformer on all tokens and on merged ones, in and out of the adapter and styles."""

from __future__ import annotations

import pytest
import torch

from cinecat.engines.training.cat.two_paths import Given, misfit
from tests.engines.samples import IMAGE, TEXT, small_transformer
from tests.engines.training.cat.samples import two_paths

STYLE = {"blocks.1.attn2.to_q": (0.1 * torch.ones(1, 24), torch.ones(24, 1))}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


NOISY, PREDICTION = drawn(16, 3, 8, 8), 0.5 * drawn(16, 3, 8, 8)
GIVEN = Given(drawn(20, 3, 8, 8), drawn(5, TEXT), drawn(3, IMAGE))


@torch.no_grad()
def test_an_untrained_adapter_changes_nothing() -> None:
    paths, _ = two_paths({"style": STYLE})
    for style in ("", "style"):
        plain = paths.clean(NOISY, 800.0, GIVEN, style, PREDICTION, 0.5)
        assert torch.equal(plain, paths.clean(NOISY, 800.0, GIVEN, style, PREDICTION, 0.5, adapted=True))


@torch.no_grad()
def test_the_adapter_is_worn_only_where_it_is_asked_for() -> None:
    paths, _ = two_paths()
    before = paths.clean(NOISY, 800.0, GIVEN, "", PREDICTION, 0.5)
    for parameter in paths.adapter.parameters():
        parameter.fill_(0.1)
    assert torch.equal(before, paths.clean(NOISY, 800.0, GIVEN, "", PREDICTION, 0.5))
    assert not torch.allclose(before, paths.clean(NOISY, 800.0, GIVEN, "", PREDICTION, 0.5, adapted=True))


@torch.no_grad()
def test_all_tokens_predict_what_the_model_does_with_the_padded_prompt() -> None:
    paths, _ = two_paths()
    text = torch.zeros(512, TEXT)
    text[:5] = GIVEN.text
    velocity = small_transformer()(
        torch.cat([NOISY, GIVEN.condition])[None],
        torch.tensor([800.0]),
        text[None],
        GIVEN.image[None],
        return_dict=False,
    )[0][0]
    assert paths.clean(NOISY, 800.0, GIVEN) == pytest.approx(NOISY - 0.8 * velocity, abs=1e-4)


@torch.no_grad()
def test_a_style_is_worn_as_if_it_were_in_the_weights() -> None:
    paths, _ = two_paths({"style": STYLE})
    other, transformer = two_paths()
    a, b = STYLE["blocks.1.attn2.to_q"]
    plain = other.clean(NOISY, 800.0, GIVEN)
    transformer.blocks[1].attn2.to_q.base_layer.weight += b @ a
    fused = other.clean(NOISY, 800.0, GIVEN)
    assert not torch.allclose(plain, fused, atol=1e-4)
    assert paths.clean(NOISY, 800.0, GIVEN, "style") == pytest.approx(fused, abs=1e-5)
    assert paths.clean(NOISY, 800.0, GIVEN) == pytest.approx(plain, abs=1e-5)


def test_only_the_adapter_gets_gradients() -> None:
    paths, transformer = two_paths({"style": STYLE})
    paths.clean(NOISY, 800.0, GIVEN, "style", PREDICTION, 0.5, adapted=True).square().mean().backward()
    moved = {name for name, parameter in transformer.named_parameters() if parameter.grad is not None}
    assert all(".default." in name for name in moved)
    assert len(moved) == len(list(paths.adapter.parameters())) == 2 * 2 * 12


def test_a_style_for_another_model_is_found_out() -> None:
    transformer = small_transformer()
    assert misfit(transformer, STYLE) == ""
    wide = {"blocks.0.attn1.to_q": (torch.ones(1, 32), torch.ones(24, 1))}
    assert misfit(transformer, wide) == "blocks.0.attn1.to_q takes no 32 -> 24"
    assert misfit(transformer, {"proj_out": (torch.ones(1, 24), torch.ones(64, 1))}) == (
        "it changes nothing inside the blocks"
    )
