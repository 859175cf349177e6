"""Grades, and films in them as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from cinecat.engines import commands
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.messages import CoreConfig
from cinecat.engines.training.evaluation import Sampling, generate
from cinecat.engines.training.film import make_clip
from cinecat.engines.training.grades import GRADES
from cinecat.engines.training.styles.clips import ClipShape, find_clips, first_frame, read_clip

FILM = make_clip(3, 5, 48, 64, kind="slide", texture=0.5).frames


def saturation(frames: NDArray[np.uint8]) -> float:
    return float(np.ptp(frames.astype(int), axis=-1).mean())


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(commands.film_set)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("grade", GRADES)
def test_a_grade_keeps_shape_dtype_and_what_it_was_given(grade: str) -> None:
    before = FILM.copy()
    graded = GRADES[grade](FILM)
    assert (graded.shape, graded.dtype) == (FILM.shape, np.uint8)
    assert np.array_equal(FILM, before)
    assert np.array_equal(GRADES[grade](FILM[2:3])[0], graded[2])


def test_noir_is_grey_steeper_and_darker_in_the_corners() -> None:
    graded = GRADES["noir"](FILM)
    assert saturation(graded) == 0.0
    grey = np.full((1, 49, 49, 3), 128, dtype=np.uint8)
    noir = GRADES["noir"](grey)[0, ..., 0].astype(int)
    assert noir[24, 24] > noir[0, 0] + 20
    dark, bright = (int(GRADES["noir"](np.full((1, 3, 3, 3), level, np.uint8))[0, 1, 1, 0]) for level in (64, 192))
    assert bright - dark > 192 - 64 + 20


def test_amber_is_warm_everywhere_and_keeps_the_order_of_brightness() -> None:
    graded = GRADES["amber"](FILM).astype(int)
    assert (graded[..., 0] >= graded[..., 1] - 12).mean() > 0.95
    assert (graded[..., 0].mean() - graded[..., 2].mean()) > 60
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=-1)[None]
    assert (np.diff(GRADES["amber"](ramp)[0, 0].astype(int), axis=0) >= 0).all()


def test_blueprint_draws_white_lines_on_a_wash_of_blue_where_things_end() -> None:
    flat = np.full((1, 32, 32, 3), 90, dtype=np.uint8)
    paper = GRADES["blueprint"](flat)[0]
    assert (paper == paper[0, 0]).all()
    assert paper[0, 0, 2] > 2 * paper[0, 0, 1] > 4 * paper[0, 0, 0]
    flat[:, :, 16:] = (200, 20, 20)
    lines = GRADES["blueprint"](flat)[0].astype(int)
    assert lines[:, 15:17].min() > 180
    assert (lines[:, :11] == paper[0, 0]).all()
    assert (lines[:, 21:] == lines[0, -1]).all()
    assert lines[0, -1].sum() < paper[0, 0].sum()
    assert lines[0, -1, 2] > 2 * lines[0, -1, 1] > 4 * lines[0, -1, 0]


def test_blueprint_draws_the_same_lines_at_every_size_and_none_where_little_changes() -> None:
    def inked(side: int, step: int) -> float:
        halves = np.full((1, side, side, 3), 90, dtype=np.uint8)
        halves[:, :, side // 2 :] += np.uint8(step)
        return float((GRADES["blueprint"](halves)[..., 0] > 120).mean())

    assert inked(64, 120) == pytest.approx(inked(256, 120), abs=0.02)
    assert inked(256, 120) > 0.02
    assert inked(256, 40) == 0.0


def test_films_are_written_as_a_training_reads_them(tmp_path: Path) -> None:
    size = ["--width", 64, "--height", 48, "--frames", 5]
    result = run(tmp_path / "set", "--clips", 3, "--grade", "amber", "--first-seed", 7, "--kinds", "slide,still", *size)
    assert result.exit_code == 0, result.output
    shape = ClipShape(64, 48, 5, 8.0)
    clips, problems = find_clips(tmp_path / "set", shape)
    assert problems == []
    for index, (clip, kind) in enumerate(zip(clips, ("slide", "still", "slide"), strict=True)):
        film = make_clip(7 + index, 5, 48, 64, kind=kind)  # type: ignore[arg-type]
        assert clip.caption == film.caption
        error = read_clip(clip.path, shape).astype(float) - GRADES["amber"](film.frames)
        assert np.sqrt((error**2).mean()) < 3.0
        assert np.array_equal(first_frame(clip, shape), film.first_frame)
    again = run(tmp_path / "set")
    assert again.exit_code == 2
    assert "holds films already" in again.stderr


def test_a_models_own_clips_come_with_picture_and_seed(micro: Path, tmp_path: Path) -> None:
    size = ["--width", 32, "--height", 32, "--frames", 5, "--first-seed", 7, "--clips", 2, "--grade", "noir"]
    result = run(tmp_path / "set", *size, "--kinds", "slide", "--from-model", micro)
    assert result.exit_code == 0, result.output
    shape = ClipShape(32, 32, 5, 8.0)
    clips, problems = find_clips(tmp_path / "set", shape)
    assert problems == []
    assert [clip.seed for clip in clips] == [7, 8]
    core = EngineCore(find_checkpoint(str(micro)), CoreConfig(str(micro), "cpu", "float32", 0, 1, 1, 0))
    for clip in clips:
        film = make_clip(clip.seed or 0, 5, 32, 32, kind="slide")
        assert clip.caption == film.caption
        assert np.array_equal(first_frame(clip, shape), film.first_frame)
        own = generate(core, film.first_frame, film.caption, 5, Sampling(12, 5.0, clip.seed or 0))
        error = read_clip(clip.path, shape).astype(float) - GRADES["noir"](own)
        assert np.sqrt((error**2).mean()) < 3.0


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--from-model", "no such"], "film-set: model: 'no such' is neither"),
        (["--from-model", "wan-tiny", "--frames", 6], "film-set: frames: 6 is not 4k + 1"),
    ],
)
def test_a_model_that_cannot_make_the_clips_is_refused_before_anything_is_written(
    option: list[object], sentence: str, tmp_path: Path
) -> None:
    result = run(tmp_path / "set", *option)
    assert result.exit_code == 2
    assert result.stderr.startswith(sentence)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--grade", "sepia"], "film-set: grade: 'sepia' is not one of none, noir, amber, blueprint"),
        (["--kinds", "slide,jump"], "film-set: kinds: 'jump' is not one of slide, still"),
    ],
)
def test_a_wrong_choice_is_refused(option: list[object], sentence: str, tmp_path: Path) -> None:
    result = run(tmp_path / "set", *option)
    assert result.exit_code == 2
    assert result.stderr.startswith(sentence)
    assert not (tmp_path / "set").exists()
