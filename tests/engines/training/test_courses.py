"""Several films from one first frame: the frame is the same to the bit, and each caption tells its own course."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinecat.engines.training.courses import fits, other_courses, with_course
from cinecat.engines.training.film import render
from cinecat.engines.training.latents import lessons
from cinecat.engines.training.scenes import COLOURS, SHARES, SMOOTH_WALLS, Kind, draw_scene, thing_name

SINGLE = sorted(set(SHARES) - {"enter", "pass"})


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(SINGLE), frames=st.sampled_from((1, 5, 17)))
def test_every_course_begins_with_the_same_picture(seed: int, kind: Kind, frames: int) -> None:
    scene = draw_scene(seed, frames, kind=kind)
    first = render(scene, 32, 32).first_frame
    courses = other_courses(scene, seed, 3)
    assert len(courses) == 3
    for other in courses:
        assert np.array_equal(render(other, 32, 32).first_frame, first)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), other=st.integers(0, 10**6))
def test_a_caption_names_what_is_seen(seed: int, other: int) -> None:
    scene, course = draw_scene(seed, 5), draw_scene(other, 5)
    if not fits(scene, course):
        return
    taken = with_course(scene, course)
    thing = thing_name(scene.things[0])
    assert not {word for word in COLOURS if f" {word} " in f" {taken.caption} "} - {scene.things[0].colour}
    assert (thing in taken.caption) == (thing_name(course.things[0]) in course.caption)
    assert (f"{scene.wall.kind} wall" in taken.caption) == (f"{course.wall.kind} wall" in course.caption)


def test_what_moves_in_one_stays_in_another() -> None:
    still = draw_scene(3, 17, kind="still")
    course = draw_scene(4, 17, kind="slide")
    moved = with_course(still, course)
    way = moved.things[0].position[-1] - moved.things[0].position[0]
    assert way == pytest.approx(course.things[0].position[-1] - course.things[0].position[0])
    assert moved.direction == course.direction


@pytest.mark.parametrize("kind", ["enter", "pass"])
def test_a_course_that_is_a_scenes_own_is_kept(kind: Kind) -> None:
    assert other_courses(draw_scene(1, 5, kind=kind), 1, 3) == []


def test_a_smooth_wall_does_not_drift() -> None:
    smooth = [draw_scene(seed, 5, kind="still", texture=0.1 * (seed % 2)) for seed in range(12)]
    assert {scene.wall.kind for scene in smooth} >= SMOOTH_WALLS
    for scene in smooth:
        assert fits(scene, draw_scene(2, 5, kind="drift")) == (scene.wall.kind not in SMOOTH_WALLS)


def test_lessons_share_their_first_frame_through_a_window() -> None:
    seed = next(seed for seed in range(100) if draw_scene(seed, 5).kind == "slide")
    clips = lessons(seed, 5, 64, 32, 3)
    assert len(clips) == 3
    assert all(clip.frames.shape == (5, 32, 32, 3) for clip in clips)
    assert all(np.array_equal(clip.first_frame, clips[0].first_frame) for clip in clips)
