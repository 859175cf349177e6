"""`cinecat train-style` on a micro checkpoint, from clips to a style that the engine wears."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from cinecat.engines import commands
from cinecat.engines.training.styles import plugin, session, trainer
from cinecat.engines.training.styles.recipe import StyleRecipe
from cinecat.plugins.manifest import read_manifest
from tests.engines.quality.samples import random_lpips_weights
from tests.engines.training.styles.samples import killed_at, write_clip


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(commands.train_style)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a", "b", "c"):
        write_clip(folder / f"{name}.mp4", f"a star {name}")
    write_clip(folder / "bare.mp4")
    return folder


@pytest.fixture
def options(micro: Path, clips: Path, tmp_path: Path) -> list[object]:
    size = ["--width", 32, "--height", 32, "--frames", 5, "--steps", 2, "--evaluate-every", 1, "--accumulation", 1]
    folders = ["--model", micro, "--out", tmp_path / "styles", "--work", tmp_path / "work"]
    return [clips, *folders, *size, "--device", "cpu", "--rank", 2, "--learning-rate", 0.01]


def test_clips_become_a_style_that_the_engine_renders(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(1, monkeypatch):
        raise run(*options, "--name", "dusk").exception or AssertionError
    result = run(*options, "--name", "dusk", "--title", "Dusk", "--prompt-template", "dusk, {prompt}")
    # Captions under the template are others: nothing is taken over from the killed run.
    assert result.exit_code == 0, result.output
    folder = tmp_path / "styles" / "dusk"
    manifest = read_manifest(folder)
    assert (manifest.title, manifest.prompt_template, manifest.preview) == ("Dusk", "dusk, {prompt}", "preview.webp")
    assert "left out: bare.mp4: has no caption" in result.stderr
    assert "memory: " in result.stderr
    assert "2 clips to train on, 1 held out; the validation loss decides when to stop" in result.stderr
    assert f"cinecat styles install {folder}" in result.stdout
    assert "--style dusk" in result.stdout
    assert "- bare.mp4: has no caption" in (folder / "README.md").read_text()
    assert len(list((tmp_path / "work" / "clips").glob("*.safetensors"))) == 6


def test_a_second_training_encodes_nothing_again(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "draw_curves", lambda *arguments: None)
    assert run(*options, "--name", "one", "--no-preview").exit_code == 0
    monkeypatch.setattr(session, "load_encoders", None)
    result = run(*options, "--name", "two", "--rank", 1, "--no-preview")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "styles" / "two" / "preview.webp").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--name", "Noir"], "style.toml: name is 'Noir'; it must be 1 to 64 lower-case letters"),
        (["--version", "1"], "style.toml: version is '1'; it must be three numbers"),
        (["--prompt-template", "noir"], "style.toml: prompt_template is 'noir'; it must be one line"),
        (["--width", 40], "width: 40 is not a multiple of 16 from 16 to 16384"),
        (["--frames", 6], "frames: 6 is not 4k + 1"),
        (["--frames", 9], "clips: "),
        (["--fps", 0], "fps: 0 is not above 0"),
        (["--targets", "norms"], "targets: 'norms' is not one of cross-attention, attention, all"),
        (["--dtype", "float16"], "dtype: 'float16' is not one of auto, float32, bfloat16"),
        (["--device", "cuda:1"], "device: 'cuda:1' is not one of auto, cpu, cuda; choose a GPU with CUDA_VISIBLE_"),
        (["--model", "no such"], "model: 'no such' is neither"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_anything_is_trained(
    options: list[object], changes: list[object], sentence: str, tmp_path: Path
) -> None:
    result = run(*options, "--name", "dusk", *changes)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"train-style: {sentence}")
    assert not (tmp_path / "styles").exists()
    assert not (tmp_path / "work").exists()


def test_too_little_memory_is_refused_before_anything_is_loaded(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "available_bytes", lambda device: 1000)
    result = run(*options, "--name", "dusk")
    assert result.exit_code == 2
    assert "cpu has 0.0 MiB left; lower" in result.stderr
    assert not (tmp_path / "work").exists()


def test_a_training_that_never_helped_writes_no_style(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 1.5, 2.0])
    monkeypatch.setattr(trainer._Sampler, "validation_loss", lambda self, model: next(losses))
    result = run(*options, "--name", "dusk")
    assert result.exit_code == 2
    assert "train-style: learning_rate: 0.01 never came below the validation loss without the style" in result.stderr
    assert not (tmp_path / "styles").exists()


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save_file(random_lpips_weights(), path)
    return path


def test_lpips_decides_where_its_weights_are_given_and_log_and_card_say_so(
    options: list[object], lpips_weights: Path, tmp_path: Path
) -> None:
    result = run(*options, "--name", "dusk", "--no-preview", "--lpips-weights", lpips_weights)
    assert result.exit_code == 0, result.output
    assert "2 clips to train on, 1 held out; LPIPS decides when to stop" in result.stderr
    assert "; for LPIPS, VAE decoder " in result.stderr
    assert "\nLPIPS 0." in result.stderr
    folder = tmp_path / "styles" / "dusk"
    card = (folder / "README.md").read_text()
    assert "| LPIPS of these weights | 0." in card
    assert "LPIPS decides which weights are kept" in card
    assert "| lpips_weights | lpips.safetensors (SHA-256 " in card
    assert (folder / "training.csv").read_text().startswith("step,seconds,schedule,loss,validation_loss,lpips\n")


def test_another_criterion_begins_a_new_training(
    options: list[object], lpips_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "draw_curves", lambda *arguments: None)
    asked = [*options, "--name", "dusk", "--no-preview"]
    assert run(*asked).exit_code == 0
    asked += ["--lpips-weights", lpips_weights]
    other = run(*asked, "--out", tmp_path / "other")
    assert other.exit_code == 0
    assert "going on from" not in other.stderr
    assert "going on from" in run(*asked, "--out", tmp_path / "again").stderr


def test_clips_too_small_for_lpips_are_refused(options: list[object], lpips_weights: Path, tmp_path: Path) -> None:
    result = run(*options, "--name", "dusk", "--lpips-weights", lpips_weights, "--width", 16)
    assert result.exit_code == 2
    assert result.stderr.startswith("train-style: width: 16 is below 32, which lpips-weights need")
    result = run(*options, "--name", "dusk", "--lpips-weights", tmp_path / "none.safetensors")
    assert result.exit_code == 2
    assert result.stderr.startswith("train-style: lpips-weights: ")
    assert not (tmp_path / "work").exists()


def test_a_style_that_exists_is_not_trained_again(options: list[object], tmp_path: Path) -> None:
    (tmp_path / "styles" / "dusk").mkdir(parents=True)
    result = run(*options, "--name", "dusk")
    assert result.exit_code == 2
    assert "give another --name or --out" in result.stderr


@pytest.mark.parametrize(("count", "share", "amount"), [(2, 0.15, 1), (20, 0.15, 3), (3, 0.9, 2), (5, 0.0, 1)])
def test_some_clips_are_held_out_and_some_are_not(count: int, share: float, amount: int) -> None:
    held = session.held_out(count, StyleRecipe(held_out=share))
    assert len(held) == len(set(held)) == amount
    assert held == session.held_out(count, StyleRecipe(held_out=share))
