"""Optical flow, on motion that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cinecat.engines.quality import motion
from cinecat.engines.quality.motion import motion_scores
from tests.engines.quality.samples import noisy, panned


def test_the_motion_score_is_the_speed_in_percent_of_the_short_side_a_second() -> None:
    scores = motion_scores(panned(pixels_a_frame=2.0, side=64), fps=8.0)
    assert scores.motion_score == pytest.approx(2.0 * 8.0 / 64 * 100, rel=0.15)


def test_twice_the_frame_rate_is_twice_the_speed() -> None:
    clip = panned()
    assert motion_scores(clip, 16.0).motion_score == pytest.approx(2 * motion_scores(clip, 8.0).motion_score)


def test_a_still_clip_neither_moves_nor_errs() -> None:
    scores = motion_scores(np.repeat(panned(frames=1), 3, axis=0), fps=8.0)
    assert (scores.motion_score, scores.warped_error) == (pytest.approx(0.0, abs=0.1), pytest.approx(0.0, abs=1e-3))


def test_motion_is_no_error_and_flicker_is() -> None:
    clip = panned()
    smooth, rough = motion_scores(clip, 8.0).warped_error, motion_scores(noisy(clip, 20.0), 8.0).warped_error
    unwarped = 1000 * float(np.square(np.diff(clip / 255.0, axis=0)).mean())
    assert smooth < 0.1 * unwarped
    assert rough > 10 * smooth


def test_what_gets_covered_counts_less() -> None:
    clip = panned(pixels_a_frame=0.0, frames=2, side=64)
    clip[0, 20:44, 8:32] = clip[1, 20:44, 18:42] = panned(frames=1, side=24, seed=5)[0]
    _, seen = motion._flow(clip[0], clip[1])
    assert seen[22:42, 33:41].mean() < seen[:16].mean() - 0.2


def test_what_leaves_the_frame_does_not_count() -> None:
    clip = panned(pixels_a_frame=6.0, frames=2, side=64)
    _, seen = motion._flow(clip[0], clip[1])
    assert seen[:, -5:].mean() < 0.1
    assert seen[:, 10:-12].mean() > 0.9


def test_large_frames_are_followed_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = panned(pixels_a_frame=2.0, side=64)
    exact = motion_scores(clip, 8.0)
    monkeypatch.setattr(motion, "_FLOW_SIDE", 32)
    assert motion_scores(clip, 8.0).motion_score == pytest.approx(exact.motion_score, rel=0.2)


def test_a_clip_that_cannot_be_followed_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion, "_flow", lambda before, after: (np.zeros((2, 48, 48)), np.zeros((48, 48), dtype=bool)))
    scores = motion_scores(panned(), 8.0)
    assert math.isnan(scores.motion_score)
    assert math.isnan(scores.warped_error)
