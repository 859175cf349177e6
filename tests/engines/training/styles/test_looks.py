"""How far a clip has gone towards a look."""

from __future__ import annotations

import numpy as np
import pytest

from cinecat.engines.training.evaluation import follows
from cinecat.engines.training.film import HELD_OUT, make_clip
from cinecat.engines.training.grades import GRADES
from cinecat.engines.training.scenes import DIRECTIONS
from cinecat.engines.training.styles import looks
from cinecat.engines.training.styles.looks import STATISTICS, Look, draw_films, moves


@pytest.mark.parametrize("grade", STATISTICS)
def test_a_shot_has_no_effect_as_it_was_and_the_whole_in_the_grade(grade: str) -> None:
    look = Look(grade)
    film = make_clip(3, 5, 48, 64, kind="slide", texture=0.5)
    truth = look.graded(film)
    assert look.effect(film.frames, film) == 0.0
    assert look.effect(truth.frames, film) == 1.0
    half = ((film.frames.astype(int) + truth.frames) / 2).astype(np.uint8)
    assert look.effect(half, film) == pytest.approx(0.5, abs=0.1)


def test_films_are_judged_where_the_truth_itself_passes() -> None:
    for film in Look("noir").judged_films(HELD_OUT, 3, 5, 48, lambda scene: True):
        truth = Look("noir").graded(film)
        assert np.array_equal(truth.frames, GRADES["noir"](film.frames))
        assert follows(truth, truth.frames, film.scene.direction or "")


def test_films_that_nothing_fits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "_MOST_DRAWS", 50)
    with pytest.raises(ValueError, match="50 seeds from 7 hold 0 that fit, 1 are needed"):
        list(draw_films(7, 1, ("slide",), 5, 48, lambda scene: False))


@pytest.mark.parametrize("grade", STATISTICS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_motion_is_seen_in_every_look_and_in_no_other_direction(grade: str, direction: str) -> None:
    films = Look(grade).judged_films(HELD_OUT, 3, 17, 64, lambda scene: scene.direction == direction)
    seen = [name for film in films for name in DIRECTIONS if moves(Look(grade).graded(film).frames, name)]
    assert seen == [direction] * 3


def test_nothing_moves_in_a_still_clip() -> None:
    still = make_clip(3, 17, 48, 48, kind="still").frames
    assert not any(moves(still, direction) for direction in DIRECTIONS)
