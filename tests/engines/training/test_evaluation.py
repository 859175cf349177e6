"""The measurements: perfect on the films themselves, bad on films that do something else."""

from __future__ import annotations

import numpy as np
import pytest

from cinecat.engines.training.evaluation import compare, follows, stays, track
from cinecat.engines.training.film import Clip, make_clip
from cinecat.engines.training.scenes import DIRECTIONS

SLIDES = [make_clip(seed, 9, 64, 64, kind="slide") for seed in range(8)]
STILLS = [make_clip(seed, 9, 64, 64, kind="still") for seed in range(4)]


@pytest.mark.parametrize("film", SLIDES, ids=lambda film: film.caption)
def test_a_film_follows_its_own_caption(film: Clip) -> None:
    result = compare(film, film.frames)
    assert result.right is True
    assert result.clip_psnr == 99.0


@pytest.mark.parametrize("film", SLIDES, ids=lambda film: film.caption)
def test_a_film_follows_no_other_direction(film: Clip) -> None:
    others = [direction for direction in DIRECTIONS if direction != film.scene.direction]
    assert [follows(film, film.frames, direction) for direction in others] == [False, False, False]


@pytest.mark.parametrize("film", SLIDES, ids=lambda film: film.caption)
def test_a_clip_played_backwards_is_wrong(film: Clip) -> None:
    assert compare(film, film.frames[::-1]).right is False


def test_a_clip_that_stands_still_does_not_follow() -> None:
    film = SLIDES[0]
    assert compare(film, np.repeat(film.frames[:1], 9, axis=0)).right is False


@pytest.mark.parametrize("film", STILLS, ids=lambda film: film.caption)
def test_a_still_film_stays(film: Clip) -> None:
    assert compare(film, film.frames).right is True


def test_what_a_camera_uncovers_is_not_told() -> None:
    for kind, told in (("slide", True), ("pan", False), ("roam", False)):
        film = make_clip(3, 9, 48, 48, kind=kind)  # type: ignore[arg-type]
        assert compare(film, film.frames).told is told


def test_a_still_prompt_whose_clip_moves_is_wrong() -> None:
    film = STILLS[0]
    assert not stays(film, np.stack([np.roll(film.frames[0], shift, axis=1) for shift in range(9)]))


def test_the_track_is_the_truth_on_a_flat_wall() -> None:
    film = make_clip(5, 9, 64, 64, kind="slide", texture=0.0, motion=0.1)
    assert np.abs(np.diff(track(film, film.frames) - film.track, axis=0)).max() < 0.5


def test_a_subject_that_is_gone_has_no_track() -> None:
    film = STILLS[1]
    grey = np.full_like(film.frames, 128)
    assert np.isnan(track(film, grey)).all()
