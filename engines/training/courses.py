"""What else could happen behind a film's first frame, so that only the caption tells which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cinecat.engines.training.scenes import SMOOTH_WALLS, Scene, draw_scene, thing_name

# Their course begins outside of the frame, or goes round another thing.
_OWN_COURSE = frozenset({"enter", "pass"})
_SEEDS = 900_000


def other_courses(scene: Scene, seed: int, count: int) -> list[Scene]:
    """Scenes with the same first frame, and the courses and captions of other films.

    A shot whose course is its own, as when something enters, has none.

    Args:
        seed: of the choice.
        count: how many.
    """
    if scene.kind in _OWN_COURSE:
        return []
    random = np.random.default_rng((seed, len(scene.zoom)))
    found: list[Scene] = []
    while len(found) < count:
        other = draw_scene(int(random.integers(_SEEDS)), len(scene.zoom))
        if fits(scene, other):
            found.append(with_course(scene, other))
    return found


def fits(scene: Scene, other: Scene) -> bool:
    """Whether `scene` can take the course of `other`."""
    shows_nothing = other.kind == "drift" and scene.wall.kind in SMOOTH_WALLS
    return not shows_nothing and not {scene.kind, other.kind} & _OWN_COURSE


def with_course(scene: Scene, other: Scene) -> Scene:
    """The wall and the thing of `scene`, to which what `other` tells happens."""
    thing, course = scene.things[0], other.things[0]
    moved = replace(
        thing,
        position=thing.position[0] + course.position - course.position[0],
        radius=thing.radius[0] * course.radius / course.radius[0],
        angle=thing.angle[0] + course.angle - course.angle[0],
    )
    caption = other.caption.replace(thing_name(course), thing_name(thing))
    caption = caption.replace(f" {other.wall.kind} wall", f" {scene.wall.kind} wall")
    return replace(other, caption=caption, wall=scene.wall, things=(moved,))
