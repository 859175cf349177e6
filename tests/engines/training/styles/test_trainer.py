"""The training: it learns, stops when it no longer does, and a killed run goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cinecat.engines.errors import SettingError
from cinecat.engines.stages import starting_noise
from cinecat.engines.training.progress import Journal
from cinecat.engines.training.styles.plugin import save_lora
from cinecat.engines.training.styles.recipe import TARGETS
from cinecat.engines.training.styles.trainer import TrainedStyle, _Sampler, add_lora, train_style
from cinecat.plugins.adapter_file import LoraShape
from cinecat.plugins.lora import load_lora
from tests.engines.samples import small_transformer
from tests.engines.training.styles.samples import RECIPE, encoded_clips, killed_at

CLIPS = encoded_clips(4)


def train(
    journal: Journal, save_seconds: float = 60.0, lpips: Callable[..., float] | None = None, **changes: object
) -> TrainedStyle:
    recipe = replace(RECIPE, **changes)  # type: ignore[arg-type]
    return train_style(
        small_transformer(), CLIPS[:3], CLIPS[3:], recipe, 3.0, journal, save_seconds, cpu=True, lpips=lpips
    )


def test_a_killed_training_resumes_as_if_never_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(Journal(tmp_path, "whole"))
    with killed_at(5, monkeypatch):  # in the middle of the third step
        train(Journal(tmp_path, "killed"), save_seconds=0.0)
    resumed = train(Journal(tmp_path, "killed"))
    assert resumed.steps == whole.steps == 4
    assert (resumed.loss, resumed.first_loss) == (whole.loss, whole.first_loss)
    assert resumed.factors.keys() == whole.factors.keys()
    assert all(torch.equal(resumed.factors[key], factor) for key, factor in whole.factors.items())
    assert without_seconds(tmp_path / "killed.csv") == without_seconds(tmp_path / "whole.csv")


def test_a_training_that_is_killed_before_its_first_checkpoint_begins_its_curve_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(0, monkeypatch):
        train(Journal(tmp_path, "killed"))
    train(Journal(tmp_path, "killed"))
    assert [row[0] for row in without_seconds(tmp_path / "killed.csv")] == ["step", "0", "2", "4"]


def test_a_finished_training_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(Journal(tmp_path, "run"))
    monkeypatch.setattr(_Sampler, "loss", None)
    assert train(Journal(tmp_path, "run")).loss == first.loss


def test_training_lowers_the_validation_loss_of_what_it_trains_on(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=12, evaluate_every=4, targets="all")
    style = train_style(small_transformer(), CLIPS[:1], CLIPS[:1], recipe, 3.0, Journal(tmp_path, "run"), cpu=True)
    assert style.loss < 0.99 * style.first_loss


def test_it_stops_when_nothing_gets_better_and_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 4.0, 4.5, 4.5, 1.0])
    monkeypatch.setattr(_Sampler, "validation_loss", lambda self, model: next(losses))
    style = train(Journal(tmp_path, "run"), steps=50, evaluate_every=1, patience=2)
    assert (style.steps, style.best_step, style.loss, style.first_loss) == (3, 1, 4.0, 5.0)


def test_lpips_decides_where_there_is_one_and_both_are_in_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, distances = iter([5.0, 4.0, 3.0, 2.0]), iter([0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr(_Sampler, "validation_loss", lambda self, model: next(losses))
    style = train(Journal(tmp_path, "run"), lpips=lambda clips: next(distances), steps=50, evaluate_every=1, patience=2)
    assert (style.steps, style.best_step, style.criterion) == (3, 1, "LPIPS")
    assert (style.loss, style.first_loss) == (0.2, 0.5)
    rows = without_seconds(tmp_path / "run.csv")
    assert [row[-2:] for row in rows] == [
        ["validation_loss", "lpips"],
        ["5.0", "0.5"],
        ["4.0", "0.2"],
        ["3.0", "0.4"],
        ["2.0", "0.3"],
    ]


def test_lpips_sees_the_same_prediction_until_the_weights_change(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def lpips(predicted: Sequence[torch.Tensor]) -> float:
        seen.extend(predicted)
        return 1.0

    train(Journal(tmp_path, "one"), lpips=lpips, steps=2)
    train(Journal(tmp_path, "two"), lpips=lpips, steps=2, seed=1)
    before, after, before_again, _ = seen
    assert before.shape == CLIPS[3].clean.shape
    assert torch.equal(before, before_again)
    assert not torch.equal(before, after)


def test_a_perfect_model_predicts_the_clip_itself() -> None:
    clip = CLIPS[0]

    def perfect(latents: torch.Tensor, timestep: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        return ((latents[:, :16] - clip.clean) / (timestep / 1000.0),)

    sampler = _Sampler([clip], RECIPE, 3.0, torch.device("cpu"), torch.float32)
    assert sampler.predictions(perfect)[0] == pytest.approx(clip.clean, abs=1e-5)


def test_activations_may_be_kept_instead_of_computed_again(tmp_path: Path) -> None:
    again = train(Journal(tmp_path, "again"), steps=2)
    kept = train(Journal(tmp_path, "kept"), steps=2, checkpoint_activations=False)
    for key, factor in again.factors.items():
        assert kept.factors[key] == pytest.approx(factor, abs=1e-6)


def test_a_lora_on_half_precision_is_float32_and_trains(tmp_path: Path) -> None:
    transformer = small_transformer().to(torch.bfloat16)
    style = train_style(
        transformer, CLIPS[:1], CLIPS[1:2], replace(RECIPE, steps=2), 3.0, Journal(tmp_path, "run"), cpu=True
    )
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert max(factor.abs().max() for key, factor in style.factors.items() if ".lora_B." in key) > 0


def test_nothing_but_the_lora_is_trained() -> None:
    transformer = small_transformer()
    parameters = add_lora(transformer, RECIPE)
    named = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert len(named) == len(parameters) == 2 * 2 * 6
    assert all(".lora_" in name for name in named)


def without_seconds(curve: Path) -> list[list[str]]:
    rows = [line.split(",") for line in curve.read_text().splitlines()]
    return [row[:1] + row[2:] for row in rows]


def test_a_clip_of_the_models_own_meets_the_noise_that_it_was_made_from() -> None:
    seen = []

    def model(inputs: torch.Tensor, *rest: object, **options: object) -> tuple[torch.Tensor]:
        seen.append(inputs[0, :16])
        return (torch.zeros_like(inputs[:, :16]),)

    for clip in (CLIPS[0], replace(CLIPS[0], seed=7)):
        sampler = _Sampler([clip], RECIPE, 3.0, torch.device("cpu"), torch.float32)
        for number in (0, 1):
            sampler.loss(model, number)
    clean, own = CLIPS[0].clean, starting_noise(7, (1, *CLIPS[0].clean.shape), torch.device("cpu"))[0]

    def on_the_way_to_its_own(noisy: torch.Tensor) -> bool:
        """Whether it lies on the line between the clip and that noise."""
        level = ((noisy - clean) * (own - clean)).sum() / (own - clean).square().sum()
        return torch.allclose(noisy, torch.lerp(clean, own, level), atol=1e-5)

    assert [on_the_way_to_its_own(noisy) for noisy in seen] == [False, False, True, True]
    assert not torch.allclose(seen[2], seen[3])


def test_a_training_that_starts_from_a_lora_begins_where_that_one_ended(tmp_path: Path) -> None:
    first = train(Journal(tmp_path, "first"), targets="all")
    file = tmp_path / "first.safetensors"
    recipe = replace(RECIPE, targets="all")
    save_lora(file, first.factors, recipe.lora_config(2))
    further = train_style(
        small_transformer(), CLIPS[:3], CLIPS[3:], recipe, 3.0, Journal(tmp_path, "further"), cpu=True,
        start=load_lora(file),
    )  # fmt: skip
    assert further.first_loss == pytest.approx(first.loss, rel=1e-6)
    assert further.first_loss != pytest.approx(first.first_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"targets": "attention"}, "start: it changes 12 layers, which are not the 20 of targets 'attention'"),
        ({"rank": 3}, "start: its rank is 2, and rank is 3"),
    ],
)
def test_a_lora_of_other_layers_or_rank_cannot_be_trained_further(changes: dict[str, Any], sentence: str) -> None:
    modules = [f"blocks.{layer}.{target}" for layer in range(2) for target in TARGETS["cross-attention"]]
    with pytest.raises(SettingError, match=sentence):
        replace(RECIPE, **changes).check_start(dict.fromkeys(modules, LoraShape(2, 8, 8)), 2)
