"""The rank study: what is kept apart, and what is measured."""

from __future__ import annotations

import math
from pathlib import Path

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.training.film import HELD_OUT, Clip
from cinecat.engines.training.styles import rank_study
from cinecat.engines.training.styles.looks import Look, draw_films
from cinecat.engines.training.styles.rank_study import RankWork, study_ranks

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
    trained = list(draw_films(0, 12, rank_study._TRAINED_KINDS, 5, 48, rank_study._seen))
    far = Look("noir").judged_films(HELD_OUT, 2, 5, 48, rank_study._unseen)

    def seen_in(films: list[Clip]) -> set[str]:
        things = [thing for film in films for thing in film.scene.things]
        walls = {film.scene.wall.kind for film in films}
        return {thing.shape for thing in things} | {thing.colour for thing in things} | walls

    assert seen_in(trained).isdisjoint(seen_in(far))
    assert len({film.scene.kind for film in trained}) == 4
