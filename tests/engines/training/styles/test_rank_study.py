"""The rank study: what is kept apart, and what is measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.training.evaluation import follows
from cinecat.engines.training.film import HELD_OUT, make_clip
from cinecat.engines.training.grades import GRADES
from cinecat.engines.training.styles import rank_study
from cinecat.engines.training.styles.rank_study import STATISTICS, RankWork, study_ranks

SMALL = RankWork(
    targets="cross-attention",
    ranks=(1, 4),
    films=2,
    held_out=1,
    shots=1,
    steps=1,
    sampling_steps=1,
    side=48,
    frames=5,
)


def test_every_rank_is_trained_and_measured_on_the_same_shots(micro: Path, tmp_path: Path) -> None:
    results = study_ranks(find_checkpoint(str(micro)), SMALL, tmp_path)
    assert [result.rank for result in results] == [0, 1, 4]
    plain, first, last = results
    assert (plain.parameters, last.parameters) == (0, 4 * first.parameters)
    assert math.isnan(plain.seconds_per_step)
    assert first.seconds_per_step > 0
    for result in results:
        assert [len(shots) for shots in (result.in_domain, result.cross_domain)] == [1, 1]
        assert {"psnr_db", "ssim", "temporal_flicker"} <= set(result.shots[0].scores)
        assert result.shots[0].true_motion_score == plain.shots[0].true_motion_score
        assert result.validation_loss <= plain.validation_loss


def test_cross_domain_shots_share_nothing_with_the_training() -> None:
    trained = list(rank_study._films(0, 12, rank_study._TRAINED_KINDS, rank_study._seen, SMALL))
    far = list(rank_study._films(HELD_OUT, 4, ("slide",), rank_study._unseen, SMALL, tellable=True))

    def looks(films: list[rank_study.Clip]) -> set[str]:
        things = [thing for film in films for thing in film.scene.things]
        walls = {film.scene.wall.kind for film in films}
        return {thing.shape for thing in things} | {thing.colour for thing in things} | walls

    assert looks(trained).isdisjoint(looks(far))
    assert len({film.scene.kind for film in trained}) == 4


@pytest.mark.parametrize("grade", STATISTICS)
def test_a_shot_has_no_effect_as_it_was_and_the_whole_in_the_grade(grade: str) -> None:
    work = RankWork(grade=grade)
    film = make_clip(3, 5, 48, 64, kind="slide", texture=0.5)
    truth = rank_study._graded(film, work)
    assert rank_study._effect(film.frames, film, truth, work) == 0.0
    assert rank_study._effect(truth.frames, film, truth, work) == 1.0
    half = ((film.frames.astype(int) + truth.frames) / 2).astype(np.uint8)
    assert rank_study._effect(half, film, truth, work) == pytest.approx(0.5, abs=0.1)


def test_shots_are_such_that_the_truth_itself_passes() -> None:
    for film in rank_study._films(HELD_OUT, 3, ("slide",), rank_study._seen, SMALL, tellable=True):
        truth = rank_study._graded(film, SMALL)
        assert np.array_equal(truth.frames, GRADES["noir"](film.frames))
        assert follows(truth, truth.frames, film.scene.direction or "")
