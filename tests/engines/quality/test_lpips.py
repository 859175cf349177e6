"""LPIPS on random weights: its formula, not its taste."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cinecat.engines.quality.lpips import load_lpips
from cinecat.engines.quality.weights import WeightsError
from tests.engines.quality.samples import noisy, panned, random_lpips_weights

CLIP = panned(frames=3, side=64)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save_file({**random_lpips_weights(), "classifier.6.bias": torch.zeros(3)}, path)
    return path


def as_published(weights: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The distance as the paper writes it, on torchvision's AlexNet laid out layer by layer."""
    trunk = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
    trunk.load_state_dict({k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")})
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (torch.stack([a, b]) - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
    total = torch.zeros(())
    for index, layer in enumerate(trunk):
        x = layer(x)
        if index in (1, 4, 7, 9, 11):
            unit = x / x.norm(dim=1, keepdim=True)
            head = weights[f"lin{(1, 4, 7, 9, 11).index(index)}.model.1.weight"].flatten()
            total = total + ((unit[0] - unit[1]) ** 2 * head.view(-1, 1, 1)).sum(dim=0).mean()
    return total.detach()


def test_it_is_the_published_distance(file: Path) -> None:
    other = noisy(CLIP, 20.0)
    one, two = (torch.tensor(clip[0]).permute(2, 0, 1) / 127.5 - 1 for clip in (CLIP, other))
    assert load_lpips(file)(CLIP[:1], other[:1]) == pytest.approx(
        float(as_published(random_lpips_weights(), one, two)), rel=1e-4
    )


def test_equal_clips_are_at_no_distance_and_order_does_not_matter(file: Path) -> None:
    lpips, other = load_lpips(file), noisy(CLIP, 20.0)
    assert lpips(CLIP, CLIP) == 0.0
    assert lpips(CLIP, other) == pytest.approx(lpips(other, CLIP))


def test_it_grows_with_the_distortion(file: Path) -> None:
    lpips = load_lpips(file)
    distances = [lpips(CLIP, noisy(CLIP, amount)) for amount in (3.0, 10.0, 30.0)]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_a_long_clip_is_the_mean_of_its_frames(file: Path) -> None:
    lpips = load_lpips(file)
    long, other = np.tile(CLIP, (6, 1, 1, 1)), np.tile(noisy(CLIP, 20.0), (6, 1, 1, 1))
    assert lpips(long, other) == pytest.approx(lpips(long[:3], other[:3]), rel=1e-5)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    weights = random_lpips_weights()
    del weights["lin3.model.1.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"lpips-weights: lin3\.model\.1\.weight .* has no such key"):
        load_lpips(tmp_path / "part.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_lpips(tmp_path / "no.safetensors")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_lpips(tmp_path / "missing.safetensors")
