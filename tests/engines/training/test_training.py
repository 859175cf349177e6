"""Training on a micro model: steps run, losses are finite, and a stopped run goes on as if it had not stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.model import load_model, load_transformer
from cinecat.engines.stages import encode_condition, encode_text
from cinecat.engines.tiny import TinyConfig, build_tiny
from cinecat.engines.training.dit import DitRecipe, Lessons, initialise, lessons_of, motion_weights, predict, train_dit
from cinecat.engines.training.film import make_clip
from cinecat.engines.training.latents import WORDS, LatentSet, encode_films
from cinecat.engines.training.precision import has_fast_bfloat16
from cinecat.engines.training.progress import Journal
from cinecat.engines.training.recipe import Films, Stage, TrainingPlan, train_tiny
from cinecat.engines.training.vae import VaeRecipe, decode, encode, latent_statistics, train_vae
from cinecat.engines.training.vae import initialise as initialise_vae

MICRO = TinyConfig(heads=1, head_dim=24, layers=1, ffn_dim=32, text_dim=64, image_dim=16, vae_base_dim=4)
VAE_RECIPE = VaeRecipe(steps=3, image_share=0.4, side=32, crop=16, image_batch=2, clip_batch=1, clip_frames=5)
DIT_RECIPE = DitRecipe(steps=4)


def micro_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def micro_transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=24,
        in_channels=36,
        out_channels=16,
        text_dim=8,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        image_dim=8,
        added_kv_proj_dim=24,
        rope_max_seq_len=64,
    )


def micro_latents(count: int = 6) -> LatentSet:
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return LatentSet(
        clean=drawn(count, 16, 2, 2, 2),
        given=drawn(count, 16, 2, 2, 2),
        text=drawn(count, WORDS, 8) * (torch.arange(WORDS) < 9)[None, :, None],
        counts=torch.full((count,), 9),
        image=drawn(count, 3, 8),
        empty_text=drawn(WORDS, 8) * (torch.arange(WORDS) < 1)[:, None],
        empty_count=torch.tensor(1),
    )


@pytest.fixture(scope="module")
def micro_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro") / "wan-micro"
    build_tiny(folder, MICRO)
    return folder


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    stage = Stage("dit", replace(DIT_RECIPE, steps=1), (Films(32, 16, 0, 4, batch=4),), frames=5, probes=4)
    return TrainingPlan(vae=replace(VAE_RECIPE, steps=1), stages=(stage,), model=MICRO)


@pytest.fixture(scope="module")
def trained(plan: TrainingPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the plan makes, `trained`, and what it works in, `work`."""
    folder = tmp_path_factory.mktemp("plan")
    train_tiny(folder / "trained", folder / "work", plan)
    return folder


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in module.state_dict().values()])


def test_a_fresh_vae_keeps_a_flat_picture_flat() -> None:
    vae = micro_vae()
    initialise_vae(vae, 1)
    with torch.no_grad():
        decoded = decode(vae, encode(vae, torch.full((1, 3, 5, 32, 32), 0.5)))
    assert decoded.shape == (1, 3, 5, 32, 32)
    assert torch.isfinite(decoded).all()


def test_the_vae_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    whole, stopped, resumed = micro_vae(), micro_vae(), micro_vae()
    train_vae(whole, VAE_RECIPE, Journal(tmp_path / "whole", "vae"), save_seconds=0.0, clips=1)
    journal = Journal(tmp_path / "stopped", "vae")
    with pytest.raises(_Stop):
        train_vae(stopped, VAE_RECIPE, _StopsAfter(journal, saves=2), save_seconds=0.0, clips=1)
    train_vae(resumed, VAE_RECIPE, journal, save_seconds=0.0, clips=1)
    assert torch.equal(weights(whole), weights(resumed))
    assert len(journal.curve.read_text().splitlines()) == 4


def test_the_transformer_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    whole, stopped, resumed = micro_transformer(), micro_transformer(), micro_transformer()
    latents = micro_latents()
    lessons = [Lessons(latents, batch=4)]
    train_dit(whole, lessons, latents, DIT_RECIPE, Journal(tmp_path / "whole", "dit"), save_seconds=0.0)
    journal = Journal(tmp_path / "stopped", "dit")
    with pytest.raises(_Stop):
        train_dit(stopped, lessons, latents, DIT_RECIPE, _StopsAfter(journal, saves=2), save_seconds=0.0)
    train_dit(resumed, lessons, latents, DIT_RECIPE, journal, save_seconds=0.0)
    assert torch.equal(weights(whole), weights(resumed))


def test_training_lowers_the_transformer_s_loss(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "dit")
    recipe = replace(DIT_RECIPE, steps=60, adam_rate=3e-3, warmup=5)
    latents = micro_latents()
    train_dit(micro_transformer(), [Lessons(latents, batch=4)], latents, recipe, journal, save_seconds=0.0)
    rows = journal.curve.read_text().splitlines()[1:]
    first, last = (float(rows[row].split(",")[-1]) for row in (0, -1))
    assert last < 0.97 * first


def test_other_lessons_have_their_share_of_the_steps_in_their_own_order() -> None:
    films = micro_latents(2)
    lessons = [Lessons(films, 2), Lessons(films, 1, share=0.25)]
    drawn = [lessons_of(lessons, step) for step in range(12)]
    assert [turn for these, turn in drawn if these is lessons[1]] == [0, 1, 2]
    assert [turn for these, turn in drawn if these is lessons[0]] == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_what_moves_weighs_more() -> None:
    still = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 3, -1, -1).clone()
    assert torch.equal(motion_weights(still, 4.0), torch.ones(1, 1, 3, 2, 2))
    still[:, :, 2, 1, 0] += 1.0
    weights = motion_weights(still, 4.0)
    assert weights[0, 0, 2, 1, 0] == 5.0
    assert weights.sum() == 11 + 5


def test_the_motion_s_weight_reaches_the_training(tmp_path: Path) -> None:
    trained = []
    for motion_weight in (0.0, 4.0):
        transformer, latents = micro_transformer(), micro_latents()
        recipe = replace(DIT_RECIPE, motion_weight=motion_weight)
        train_dit(transformer, [Lessons(latents, 4)], latents, recipe, Journal(tmp_path / f"{motion_weight}", "dit"))
        trained.append(weights(transformer))
    assert not torch.equal(*trained)


def test_collapsed_padding_is_the_padded_prompt() -> None:
    transformer, latents = micro_transformer(), micro_latents(2)
    initialise(transformer, 3)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    video, timestep = torch.randn(2, 36, 2, 4, 4), torch.tensor([900.0, 100.0])
    padded = torch.zeros(2, 512, 8)
    padded[:, :WORDS] = latents.text
    with torch.no_grad():
        short = predict(transformer, video, timestep, latents.text, latents.counts, latents.image)
        full = transformer(video, timestep, padded, latents.image, return_dict=False)[0]
    assert short == pytest.approx(full, abs=1e-5)


def test_films_are_encoded_as_the_engine_encodes_them(micro_folder: Path) -> None:
    model = load_model(find_checkpoint(str(micro_folder)), "cpu", "float32")
    film = make_clip(0, 5, 32, 32)
    latents = encode_films(model, lambda seed: [make_clip(seed, 5, 32, 32)], range(2))
    with torch.inference_mode():
        condition = encode_condition(model.vae, film.first_frame, 5)
        text = encode_text(model, film.caption)
    # In bfloat16 a latent of size 3 is rounded to a hundredth.
    assert latents.condition(torch.tensor([0])) == pytest.approx(condition, abs=5e-2 if has_fast_bfloat16() else 2e-3)
    assert latents.text[0] == pytest.approx(text[0, :WORDS], abs=1e-4)
    assert text[0, int(latents.counts[0]) :].abs().max() == 0.0
    assert text[0, : int(latents.counts[0])].abs().min() > 0.0


def test_statistics_are_per_channel() -> None:
    latents = torch.arange(2.0).view(1, 2, 1, 1, 1) + torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1, 1)
    mean, std = latent_statistics(latents)
    assert mean == pytest.approx([0.0, 1.0])
    assert std == pytest.approx([2**0.5, 2**0.5])


def test_a_plan_writes_a_folder_that_loads(trained: Path) -> None:
    model = load_model(find_checkpoint(str(trained / "trained")), "cpu", "float32")
    assert len(set(model.vae.config.latents_std)) == 16
    assert next(model.transformer.parameters()).dtype == torch.float32


def test_a_stage_that_is_blended_in_goes_a_part_of_the_way(
    trained: Path, plan: TrainingPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cinecat.engines.training.recipe.draw_curves", lambda *arguments: None)
    (first,) = plan.stages
    weights = []
    for share in (0.0, 0.5, 1.0):
        blended = replace(plan, stages=(first, replace(first, name=f"second-{share}", blend=share)))
        train_tiny(tmp_path / f"{share}", trained / "work", blended)
        transformer = load_transformer(find_checkpoint(str(tmp_path / f"{share}")), "cpu", "float32")
        weights.append(transformer.blocks[0].ffn.net[2].weight)
    assert not torch.equal(weights[0], weights[2])
    torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2, rtol=0, atol=1e-3)


def test_a_folder_that_exists_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="name a new folder"):
        train_tiny(tmp_path, tmp_path / "work", TrainingPlan())


class _Stop(Exception):
    """Stands for a killed process."""


class _StopsAfter(Journal):
    """A journal whose run is killed right after a save."""

    def __init__(self, journal: Journal, saves: int) -> None:
        super().__init__(journal.folder, journal.name)
        object.__setattr__(self, "_left", saves)

    def save(self, state: object) -> None:  # type: ignore[override]
        super().save(state)  # type: ignore[arg-type]
        object.__setattr__(self, "_left", self._left - 1)  # type: ignore[attr-defined, has-type]
        if self._left == 0:  # type: ignore[attr-defined]
            raise _Stop


def test_a_plan_scales_with_its_films() -> None:
    plan = TrainingPlan().scaled(0.01)
    scaled = [(stage.films[0].count, stage.recipe.steps) for stage in plan.stages]
    assert scaled == [(32, 4), (8, 10), (8, 22), (2, 1), (55, 50)]
    assert TrainingPlan().scaled(1.0) == TrainingPlan()
