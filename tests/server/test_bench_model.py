"""The model's benchmark judges what was measured, and can be lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinecat.engines.training.evaluation import ModelReport, ShotResult
from cinecat.server.bench.harness import Check
from cinecat.server.bench.model import bench_model, checks_of

SLIDE = ShotResult("slide", "a red ring moves left fast", True, True, first_psnr=34.0, last_psnr=31.0, clip_psnr=32.0)
STILL = ShotResult("still", "nothing moves", True, True, first_psnr=34.0, last_psnr=33.0, clip_psnr=33.5)
ROAM = ShotResult("roam", "a red ring moves", False, None, first_psnr=34.0, last_psnr=20.0, clip_psnr=24.0)
GOOD = ModelReport(
    shots=(SLIDE, STILL, ROAM), stills=(STILL,), four=((True,) * 4,), open_psnrs=(30.0,), vae_psnrs=(34.0, 35.0)
)


def judged(report: ModelReport) -> dict[str, bool]:
    return {name: check.met for name, check in checks_of(report).items()}


def test_a_good_model_meets_every_goal() -> None:
    assert set(judged(GOOD).values()) == {True}
    assert len(judged(GOOD)) == 7


def test_a_shot_is_not_held_to_what_nobody_told() -> None:
    assert checks_of(GOOD)["last_frame_psnr_drop_db"].value == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("bad", "lost"),
    [
        (replace(GOOD, vae_psnrs=(32.0,)), "vae_psnr_db"),
        (replace(GOOD, shots=(replace(SLIDE, first_psnr=20.0, last_psnr=20.0),)), "first_frame_psnr_db"),
        (replace(GOOD, shots=(replace(SLIDE, last_psnr=27.0),)), "last_frame_psnr_drop_db"),
        (replace(GOOD, shots=(replace(SLIDE, right=False),)), "motion_accuracy"),
        (replace(GOOD, stills=(replace(STILL, right=False),)), "still_accuracy"),
        (replace(GOOD, four=((True, True, True, False),)), "four_directions_accuracy"),
        (replace(GOOD, open_psnrs=(41.0,)), "open_few_to_many_steps_psnr_db"),
    ],
)
def test_each_goal_can_be_missed(bad: ModelReport, lost: str) -> None:
    assert [name for name, met in judged(bad).items() if not met] == [lost]


@pytest.mark.slow
def test_the_benchmark_runs_on_the_bundled_model() -> None:
    report = bench_model(quick=True, out=None)
    assert {row.get("photograph") for row in report.results} >= {"chelsea"}
    assert isinstance(report.checks["vae_psnr_db"], Check)
    assert report.checks["vae_psnr_db_at_256"].goal == ""
