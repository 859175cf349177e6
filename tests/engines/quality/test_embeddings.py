"""CLIP-SIM and FVD, on trunks that stand for the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from cinecat.engines.quality.clip_similarity import load_clip_similarity
from cinecat.engines.quality.fvd import frechet_distance, load_fvd
from cinecat.engines.quality.weights import WeightsError
from tests.engines.quality.samples import noisy, panned

CLIP = panned(frames=3)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "clip"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 16},
        text_config={**small, "vocab_size": 64, "max_position_embeddings": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_equal_clips_are_as_similar_as_can_be(clip_folder: Path) -> None:
    similarity = load_clip_similarity(clip_folder)
    assert similarity(CLIP, CLIP) == pytest.approx(1.0, abs=1e-5)
    assert similarity(CLIP, noisy(CLIP, 60.0)) < 0.9999


def test_a_folder_without_a_clip_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"clip-weights: .* cannot be loaded"):
        load_clip_similarity(tmp_path)
    with pytest.raises(WeightsError, match=r"clip-weights: .* is not a folder"):
        load_clip_similarity(tmp_path / "missing")


class Trunk(nn.Module):
    """Called as I3D is; its features are the mean colour."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean(dim=(2, 3, 4))


class OtherTrunk(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_the_trunk_is_called_as_that_of_stylegan_v(tmp_path: Path) -> None:
    torch.jit.script(Trunk()).save(str(tmp_path / "i3d.pt"))
    assert load_fvd(tmp_path / "i3d.pt")(CLIP) == pytest.approx(CLIP.mean(axis=(0, 1, 2)), rel=1e-5)


def test_another_trunk_is_refused(tmp_path: Path) -> None:
    torch.jit.script(OtherTrunk()).save(str(tmp_path / "other.pt"))
    with pytest.raises(WeightsError, match="does not take clips as StyleGAN-V's does"):
        load_fvd(tmp_path / "other.pt")(CLIP)
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="is no TorchScript file"):
        load_fvd(tmp_path / "no.pt")
    with pytest.raises(WeightsError, match="is not a file"):
        load_fvd(tmp_path / "missing.pt")


def test_the_distance_of_gaussians_is_that_of_their_means_and_deviations() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(0, 1, (4000, 2)), draw.normal((3, 0), 2, (4000, 2))
    # |3|^2 + 2 dimensions of (2 - 1)^2
    assert frechet_distance(list(one), list(other)) == pytest.approx(11.0, rel=0.05)
    assert frechet_distance(list(one), list(one)) == pytest.approx(0.0, abs=1e-6)


def test_fewer_clips_than_features_still_have_a_distance() -> None:
    draw = np.random.default_rng(0)
    few, moved = draw.normal(size=(3, 20)), draw.normal(size=(3, 20)) + 5
    assert (
        frechet_distance(list(few), list(moved)) > frechet_distance(list(few), list(few)) == pytest.approx(0, abs=1e-3)
    )
