"""The looks that GRADES puts on films, and how far a styled clip has gone towards one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cinecat.engines.training.evaluation import follows
from cinecat.engines.training.film import Clip, render
from cinecat.engines.training.grades import GRADES
from cinecat.engines.training.scenes import DIRECTIONS, Kind, Scene, draw_scene

Frames = NDArray[np.uint8]

_START, _END = slice(0, 4), slice(-4, None)
_LEAST_WAY = 2.0
_MOST_DRAWS = 20_000
_LEAST_EFFECT = 2.0
"""Grey levels by which a look must change a shot's statistic for a share of it to mean something."""


def saturation(clip: Frames) -> float:
    """Mean over all pixels of the largest less the smallest channel, in grey levels."""
    return float(np.ptp(clip.astype(np.int16), axis=-1).mean())


def warmth(clip: Frames) -> float:
    """Mean of red less blue, in grey levels."""
    return float((clip[..., 0].astype(np.int16) - clip[..., 2]).mean())


STATISTICS: dict[str, Callable[[Frames], float]] = {"noir": saturation, "amber": warmth, "blueprint": warmth}
"""What each grade of GRADES moves most plainly."""


@dataclass(frozen=True)
class Look:
    """A grade; a key of STATISTICS."""

    grade: str

    def graded(self, film: Clip) -> Clip:
        """The film in the grade."""
        return replace(film, frames=GRADES[self.grade](film.frames))

    def effect(self, clip: Frames, film: Clip) -> float:
        """How far the grade's statistic of a clip has gone from the plain film (0) to the graded one (1)."""
        statistic = STATISTICS[self.grade]
        plain, graded = statistic(film.frames), statistic(self.graded(film).frames)
        return (statistic(clip) - plain) / (graded - plain)

    def can_be_judged(self, film: Clip) -> bool:
        """Whether the graded film itself passes for moving as its caption says, and differs from the plain one.

        It does not where the subject cannot be told from the wall in the grade.
        """
        truth = self.graded(film)
        statistic = STATISTICS[self.grade]
        changed = abs(statistic(truth.frames) - statistic(film.frames)) >= _LEAST_EFFECT
        return changed and follows(truth, truth.frames, film.scene.direction or "")

    def judged_films(
        self, first_seed: int, count: int, frames: int, side: int, fits: Callable[[Scene], bool]
    ) -> list[Clip]:
        """The first slides from a seed on that fit and can be judged. Raises ValueError as `draw_films`."""
        return list(draw_films(first_seed, count, ("slide",), frames, side, fits, self.can_be_judged))


def moves(clip: Frames, direction: str) -> bool:
    """Whether what moves in a clip, whatever its colour, goes in a direction, and farther along it than across.

    A pixel's median over time is taken for the wall; where a frame differs from it by at least half as much as any
    does, something moves. Its centre in the last four frames is compared with that in the first four, and must be two
    pixels on.

    Args:
        clip: uint8 [frames, height, width, 3].
        direction: a key of DIRECTIONS.
    """
    frames = clip.astype(np.float32)
    change = np.abs(frames - np.median(frames, axis=0)).sum(axis=-1)
    change = np.where(change > 0.5 * change.max(), change, 0.0)
    mass = change.sum(axis=(1, 2))
    y, x = np.mgrid[: clip.shape[1], : clip.shape[2]]
    centres = np.stack([(change * x).sum(axis=(1, 2)), (change * y).sum(axis=(1, 2))], axis=1)
    first, last = (centres[part][mass[part] > 0] / mass[part][mass[part] > 0, None] for part in (_START, _END))
    if not len(first) or not len(last):
        return False
    way = last.mean(axis=0) - first.mean(axis=0)
    along = np.array(DIRECTIONS[direction])
    forward, across = float(way @ along), float(abs(way @ along[::-1]))
    return forward > _LEAST_WAY and forward > across


def draw_films(
    first_seed: int,
    count: int,
    kinds: Sequence[Kind],
    frames: int,
    side: int,
    fits: Callable[[Scene], bool],
    suits: Callable[[Clip], bool] = lambda film: True,
) -> Iterator[Clip]:
    """The first films from a seed on whose scenes fit and that suit, their kinds in turn.

    Raises:
        ValueError: too few are found.
    """
    found = 0
    for seed in range(first_seed, first_seed + _MOST_DRAWS):
        if found == count:
            return
        scene = draw_scene(seed, frames, kind=kinds[found % len(kinds)])
        if fits(scene) and suits(film := render(scene, side, side)):
            found += 1
            yield film
    if found < count:
        raise ValueError(f"films: {_MOST_DRAWS} seeds from {first_seed} hold {found} that fit, {count} are needed")
