"""The film set: same seed, same film; captions, tracks and masks that agree with the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from cinecat.engines.training.film import Clip, Window, make_clip, render
from cinecat.engines.training.scenes import COLOURS, DIRECTIONS, OPEN_KINDS, SHARES, SPEEDS, draw_scene, recaptioned
from cinecat.engines.training.shapes import SHAPES

KINDS = list(SHARES)


def small(seed: int, **wanted: object) -> Clip:
    return make_clip(seed, frames=9, height=48, width=48, **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_film_twice(kind: str) -> None:
    first, second = small(3, kind=kind), small(3, kind=kind)
    assert first.caption == second.caption
    assert np.array_equal(first.frames, second.frames)
    assert np.array_equal(first.mask, second.mask)


def test_seeds_give_different_films() -> None:
    assert not np.array_equal(small(1).frames, small(2).frames)


@pytest.mark.parametrize(("height", "width", "frames"), [(32, 64, 1), (64, 32, 5), (40, 40, 21)])
def test_any_size_and_length(height: int, width: int, frames: int) -> None:
    clip = make_clip(4, frames, height, width)
    assert clip.frames.shape == (frames, height, width, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.track.shape == (frames, 2)
    assert clip.mask.shape == (frames, height, width)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "still"])
def test_every_kind_but_still_changes_the_picture(kind: str) -> None:
    clip = small(6, kind=kind, texture=0.8)
    assert not np.array_equal(clip.frames[0], clip.frames[-1])


def test_no_motion_is_a_still_shot() -> None:
    clip = small(6, motion=0.0)
    assert clip.scene.kind == "still"
    assert (clip.frames == clip.frames[0]).all()


def test_more_motion_moves_farther() -> None:
    slow, fast = small(7, motion=0.1), small(7, motion=1.0)
    assert np.linalg.norm(fast.track[-1] - fast.track[0]) > 2 * np.linalg.norm(slow.track[-1] - slow.track[0])


def test_more_texture_is_more_detail_of_the_wall() -> None:
    detail = [
        np.abs(np.diff(small(8, texture=amount).frames[0].astype(int), axis=1)).mean() for amount in (0.0, 0.5, 1)
    ]
    assert detail[0] < detail[1] < detail[2]


@pytest.mark.parametrize(("name", "value"), [("texture", 1.5), ("motion", -0.1)])
def test_a_parameter_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: {value} is not in 0 to 1"):
        small(1, **{name: value})


@pytest.mark.parametrize("seed", range(6))
def test_the_caption_of_a_slide_tells_its_track(seed: int) -> None:
    clip = small(seed, kind="slide")
    words = clip.caption.split()
    direction, pace = words[words.index("moves") + 1], words[words.index("moves") + 2]
    told = np.array(DIRECTIONS[direction]) * SPEEDS[pace] * 48 * 8
    assert clip.track[-1] - clip.track[0] == pytest.approx(told)
    assert words[1] in COLOURS
    assert words[2] in SHAPES


@pytest.mark.parametrize("kind", sorted(OPEN_KINDS))
def test_an_open_shot_tells_no_course(kind: str) -> None:
    scene = small(9, kind=kind).scene
    assert scene.open
    assert not set(scene.caption.split()) & (set(DIRECTIONS) | set(SPEEDS))


@pytest.mark.parametrize("texture", [0.0, 0.1])
def test_a_wall_that_drifts_is_seen_to_drift(texture: float) -> None:
    for seed in range(12):
        clip = make_clip(seed, 17, 48, 48, kind="drift", texture=texture)
        assert np.abs(clip.frames[16].astype(float) - clip.frames[0])[~clip.mask[0]].mean() > 1.5


def test_only_a_camera_that_moves_on_uncovers_ground() -> None:
    told = {small(seed, kind=kind).caption: small(seed, kind=kind).scene for seed in range(8) for kind in SHARES}
    for caption, scene in told.items():
        assert scene.uncovers == ("camera pans" in caption or "zooms out" in caption)


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_where_the_track_says(seed: int) -> None:
    clip = small(seed, kind="still")
    rows, columns = np.nonzero(clip.mask[0])
    assert np.hypot(columns.mean() - clip.track[0, 0], rows.mean() - clip.track[0, 1]) < 2.5


def test_a_thing_that_passes_behind_is_hidden_by_the_other() -> None:
    hidden = [small(seed, kind="pass") for seed in range(12)]
    behind = [clip for clip in hidden if " behind " in clip.caption]
    areas = [clip.mask.sum(axis=(1, 2)) for clip in behind]
    assert any(area.min() < 0.7 * area.max() for area in areas)


def test_a_camera_over_a_cluttered_wall_shows_the_same_wall_elsewhere() -> None:
    clip = next(c for c in (make_clip(s, 5, 128, 128, kind="pan") for s in range(400)) if _pans_right_over_clutter(c))
    assert clip.frames[0][:, 40:] == pytest.approx(clip.frames[4][:, 36:-4], abs=1)


def _pans_right_over_clutter(clip: Clip) -> bool:
    return clip.scene.wall.kind == "cluttered" and "pans right slowly" in clip.caption


def test_a_slide_takes_another_direction() -> None:
    scene = draw_scene(0, 5, kind="slide")
    assert " moves up " in recaptioned(scene, "up")


def test_a_window_is_a_part_of_the_frame() -> None:
    scene = draw_scene(5, 3, kind="pan")
    whole = render(scene, 64, 64)
    part = render(scene, 64, 64, Window(8, 16, 24, 32))
    assert np.array_equal(part.frames, whole.frames[:, 8:32, 16:48])
    assert part.track == pytest.approx(whole.track - [16, 8])
