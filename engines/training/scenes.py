"""What a film of the set shows: drawn from a seed, told in a caption, and not yet a picture.

Lengths are in short sides of the frame, with (0, 0) in its middle, x right and y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cinecat.engines.training.shapes import SHAPES

Kind = Literal["slide", "still", "turn", "grow", "pan", "zoom", "pass", "wander", "enter", "drift", "roam"]
Floats = NDArray[np.float64]

SHARES: dict[Kind, float] = {
    "slide": 0.40,
    "still": 0.09,
    "turn": 0.05,
    "grow": 0.06,
    "pan": 0.08,
    "zoom": 0.04,
    "pass": 0.09,
    "wander": 0.06,
    "enter": 0.05,
    "drift": 0.04,
    "roam": 0.04,
}
"""Share of each kind in the set. Single objects that slide are the largest: a small model learns them first."""

OPEN_KINDS: frozenset[Kind] = frozenset({"wander", "enter", "drift", "roam"})
"""Kinds whose course neither the first frame nor the caption tells."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.68, 0.20),
    "blue": (0.12, 0.25, 0.88),
    "yellow": (0.95, 0.88, 0.15),
    "orange": (0.97, 0.52, 0.08),
    "purple": (0.52, 0.13, 0.68),
    "cyan": (0.10, 0.80, 0.88),
    "pink": (0.98, 0.45, 0.72),
}
DIRECTIONS: dict[str, tuple[float, float]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: dict[str, float] = {"slowly": 1 / 128, "quickly": 2 / 128, "fast": 3 / 128}
"""Short sides per frame."""
_BARE = 0.25
"""Share of captions that leave out what the first frame shows."""
WALLS = ("flat", "gradient", "striped", "checkered", "noisy", "cluttered")
SMOOTH_WALLS = frozenset({"flat", "gradient"})
"""Walls that show next to nothing when they drift; a noisy one of `_DRIFT_CYCLES` then drifts instead."""
_DRIFT_CYCLES = 4.0


@dataclass(frozen=True)
class Wall:
    """The background, defined on the whole plane so that a camera can uncover it.

    Attributes:
        kind: one of WALLS.
        colours: two RGB triples in [0, 1], mixed by the texture.
        cycles: texture periods per short side.
        contrast: of clutter, 0 to 1.
        angle: of stripes and gradient, radians.
        phase: offset of the texture.
        seed: of the noise and of the clutter.
    """

    kind: str
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    cycles: float
    contrast: float
    angle: float
    phase: tuple[float, float]
    seed: int


@dataclass(frozen=True)
class Thing:
    """A shape and its course.

    Attributes:
        position: [frames, 2].
        radius, angle: [frames].
    """

    shape: str
    colour: str
    position: Floats
    radius: Floats
    angle: Floats


@dataclass(frozen=True)
class Scene:
    """One shot.

    Attributes:
        things: from far to near.
        subject: index of the thing that the caption speaks of.
        direction: of the subject's own motion across the frame, or None where it has none or none is told.
        speed: short sides per frame that the subject moves along `direction`; 0 without one.
        camera: [frames, 2], the world point in the middle of the frame.
        zoom: [frames], magnification.
        wall_offset: [frames, 2], how far the wall has drifted.
    """

    kind: Kind
    caption: str
    wall: Wall
    things: tuple[Thing, ...]
    subject: int
    direction: str | None
    speed: float
    camera: Floats
    zoom: Floats
    wall_offset: Floats

    @property
    def open(self) -> bool:
        """Whether neither the first frame nor the caption tells what happens."""
        return self.kind in OPEN_KINDS

    @property
    def uncovers(self) -> bool:
        """Whether the camera uncovers ground that the first frame does not show."""
        return bool(np.ptp(self.camera)) or bool((self.zoom < self.zoom[0]).any())


@dataclass
class _Draft:
    """What the kinds fill in; the rest stays at rest."""

    frames: int
    camera: Floats = field(init=False)
    zoom: Floats = field(init=False)
    wall_offset: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.camera = np.zeros((self.frames, 2))
        self.zoom = np.ones(self.frames)
        self.wall_offset = np.zeros((self.frames, 2))


def draw_scene(
    seed: int,
    frames: int,
    aspect: float = 1.0,
    kind: Kind | None = None,
    texture: float | None = None,
    motion: float | None = None,
) -> Scene:
    """Draws one scene; the same arguments give the same scene everywhere.

    Args:
        frames: clip length.
        aspect: width / height.
        kind: of the shot; None draws one by SHARES.
        texture: spatial detail of the wall, 0 (flat) to 1 (fine and strong); None draws it.
        motion: temporal change, 0 (a still shot) to 1 (fast); None draws it. With 0 the kind is "still".

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, value in (("texture", texture), ("motion", motion)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: {value} is not in 0 to 1")
    if frames < 1:
        raise ValueError(f"frames: {frames} is not 1 or more")
    random = np.random.default_rng(seed)
    drawn: Kind = random.choice(np.array(list(SHARES)), p=np.array(list(SHARES.values())))
    kind = kind or (str(drawn) if motion is None else "slide")  # type: ignore[assignment]
    if motion == 0.0:
        kind = "still"
    assert kind is not None
    pace = _pace(random, motion)
    wall = _wall(random, texture)
    if kind == "drift" and wall.kind in SMOOTH_WALLS:
        wall = replace(wall, kind="noisy", cycles=_DRIFT_CYCLES)
    return _DRAW[kind](random, kind, _Draft(frames), wall, pace, aspect)


def recaptioned(scene: Scene, direction: str) -> str:
    """The caption of a slide with another direction."""
    if scene.kind != "slide" or scene.direction is None:
        raise ValueError(f"scene: a {scene.kind} shot names no direction to replace")
    return scene.caption.replace(f" moves {scene.direction} ", f" moves {direction} ")


def _pace(random: np.random.Generator, motion: float | None) -> str:
    names = list(SPEEDS)
    drawn = names[int(random.integers(len(names)))]
    if motion is None or motion == 0.0:
        return drawn
    return names[min(int(motion * len(names)), len(names) - 1)]


def _wall(random: np.random.Generator, texture: float | None) -> Wall:
    drawn = float(random.uniform()) if random.uniform() > 0.15 else 0.0
    amount = drawn if texture is None else texture
    kind = str(random.choice(np.array(WALLS[2:]), p=(0.28, 0.28, 0.28, 0.16)))
    if amount == 0.0:
        kind = WALLS[0]
    elif amount < 0.2 and random.uniform() < 0.7:
        kind = WALLS[1]
    # Muted, so that no wall has the colour of an object.
    base = random.uniform(0.3, 0.78) + random.uniform(-0.07, 0.07, 3)
    reach = (0.10 + 0.16 * amount) * (1 if base.mean() < 0.54 else -1) + random.uniform(-0.03, 0.03, 3)
    other = np.clip(base + reach, 0.05, 0.95)
    return Wall(
        kind=kind,
        colours=(_triple(base), _triple(other)),
        cycles=1.5 + 6.5 * amount,
        contrast=0.3 + 0.6 * amount,
        angle=float(random.uniform(0, math.tau)),
        phase=(float(random.uniform(0, 50)), float(random.uniform(0, 50))),
        seed=int(random.integers(2**31)),
    )


def _triple(values: Floats) -> tuple[float, float, float]:
    red, green, blue = (round(float(v), 4) for v in values)
    return red, green, blue


def _thing(random: np.random.Generator, frames: int, position: Floats, unlike: Thing | None = None) -> Thing:
    colours = [name for name in COLOURS if unlike is None or name != unlike.colour]
    return Thing(
        shape=list(SHAPES)[int(random.integers(len(SHAPES)))],
        colour=colours[int(random.integers(len(colours)))],
        position=np.broadcast_to(position, (frames, 2)),
        radius=np.full(frames, random.uniform(0.11, 0.18)),
        angle=np.full(frames, random.uniform(-0.25, 0.25)),
    )


def _anywhere(random: np.random.Generator, aspect: float, margin: float = 0.22) -> Floats:
    half = np.array([max(aspect, 1.0), max(1.0 / aspect, 1.0)]) / 2
    point: Floats = random.uniform(-1.0, 1.0, 2) * np.maximum(half - margin, 0.0)
    return point


def thing_name(thing: Thing) -> str:
    """As a caption calls it."""
    article = "an" if thing.colour == "orange" else "a"
    return f"{article} {thing.colour} {thing.shape}"


def _over(random: np.random.Generator, wall: Wall) -> str:
    return "" if random.uniform() < _BARE else f" over a {wall.kind} wall"


def _direction(random: np.random.Generator) -> str:
    return list(DIRECTIONS)[int(random.integers(len(DIRECTIONS)))]


def _line(frames: int, direction: str, speed: float) -> Floats:
    line: Floats = np.arange(frames)[:, None] * np.array(DIRECTIONS[direction]) * speed
    return line


def _start(random: np.random.Generator, frames: int, direction: str, speed: float, aspect: float) -> Floats:
    """A start that does not tell the direction: as likely on either side, near enough to the middle for the way."""
    start = _anywhere(random, aspect)
    axis = 0 if direction in ("left", "right") else 1
    half = (max(aspect, 1.0) if axis == 0 else max(1.0 / aspect, 1.0)) / 2
    room = max(half - speed * (frames - 1) - 0.02, 0.06)
    start[axis] = random.uniform(-room, room)
    return start


def _scene(
    kind: Kind,
    caption: str,
    draft: _Draft,
    wall: Wall,
    things: tuple[Thing, ...],
    subject: int = 0,
    direction: str | None = None,
    speed: float = 0.0,
) -> Scene:
    return Scene(kind, caption, wall, things, subject, direction, speed, draft.camera, draft.zoom, draft.wall_offset)


def _replace(thing: Thing, **course: Floats) -> Thing:
    values = {"position": thing.position, "radius": thing.radius, "angle": thing.angle, **course}
    return Thing(thing.shape, thing.colour, **values)


def _slide(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    direction, speed = _direction(random), SPEEDS[pace]
    start = _start(random, draft.frames, direction, speed, aspect)
    thing = _thing(random, draft.frames, start + _line(draft.frames, direction, speed))
    # An open shot names neither where nor how fast.
    told = "moves" if kind == "roam" else f"moves {direction} {pace}"
    caption = f"{thing_name(thing)} {told}{_over(random, wall)}"
    if kind == "roam":
        return _scene(kind, caption, draft, wall, (thing,))
    return _scene(kind, caption, draft, wall, (thing,), 0, direction, speed)


def _still(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    thing = _thing(random, draft.frames, _anywhere(random, aspect))
    told = f"{thing_name(thing)} stays still{_over(random, wall)}"
    caption = "nothing moves" if random.uniform() < _BARE else told
    return _scene(kind, caption, draft, wall, (thing,))


def _turn(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    thing = _thing(random, draft.frames, _anywhere(random, aspect))
    side = "right" if random.uniform() < 0.5 else "left"
    rate = SPEEDS[pace] * 4.0 * (1 if side == "right" else -1)
    thing = _replace(thing, angle=thing.angle + rate * np.arange(draft.frames))
    return _scene(kind, f"{thing_name(thing)} turns {side} {pace}{_over(random, wall)}", draft, wall, (thing,))


def _grow(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    thing = _thing(random, draft.frames, _anywhere(random, aspect, 0.3))
    grows = random.uniform() < 0.5
    rate = SPEEDS[pace] * 1.5 * (1 if grows else -1)
    # Half or double at most, however long the clip is.
    factor = np.clip(np.exp(rate * np.arange(draft.frames)), 0.5, 2.0)
    thing = _replace(thing, radius=thing.radius * factor)
    caption = f"{thing_name(thing)} {'grows' if grows else 'shrinks'} {pace}{_over(random, wall)}"
    return _scene(kind, caption, draft, wall, (thing,))


def _pan(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    direction = _direction(random)
    thing = _thing(random, draft.frames, _anywhere(random, aspect))
    draft.camera = _line(draft.frames, direction, SPEEDS[pace])
    past = "" if random.uniform() < _BARE else f" past {thing_name(thing)}{_over(random, wall)}"
    caption = f"the camera pans {direction} {pace}{past}"
    return _scene(kind, caption, draft, wall, (thing,))


def _zoom(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    thing = _thing(random, draft.frames, _anywhere(random, aspect, 0.35))
    side = "in" if random.uniform() < 0.5 else "out"
    rate = SPEEDS[pace] * (1 if side == "in" else -1)
    draft.zoom = np.clip(np.exp(rate * np.arange(draft.frames)), 0.5, 2.0)
    on = "" if random.uniform() < _BARE else f" on {thing_name(thing)}{_over(random, wall)}"
    caption = f"the camera zooms {side} {pace}{on}"
    return _scene(kind, caption, draft, wall, (thing,))


def _pass(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    direction, speed = _direction(random), SPEEDS[pace]
    way = speed * (draft.frames - 1)
    along = np.array(DIRECTIONS[direction])
    rest = _anywhere(random, aspect, 0.3)
    standing = _thing(random, draft.frames, rest)
    # It meets the other somewhere on its way.
    start = rest - along * way * random.uniform(0.4, 1.0) + (1 - np.abs(along)) * random.uniform(-0.12, 0.12)
    start = np.clip(start, -0.45, 0.45)
    moving = _thing(random, draft.frames, start + _line(draft.frames, direction, speed), unlike=standing)
    behind = random.uniform() < 0.5
    caption = (
        f"{thing_name(moving)} moves {direction} {pace} {'behind' if behind else 'before'} {thing_name(standing)}"
        f"{_over(random, wall)}"
    )
    things = (moving, standing) if behind else (standing, moving)
    return _scene(kind, caption, draft, wall, things, 0 if behind else 1, direction, speed)


def _wander(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    heading = random.uniform(0, math.tau) + np.cumsum(random.normal(0, 0.35, draft.frames))
    steps = SPEEDS[pace] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    path = np.cumsum(steps, axis=0) - steps[0]
    thing = _thing(random, draft.frames, _anywhere(random, aspect, 0.3) + path)
    return _scene(kind, f"{thing_name(thing)} wanders{_over(random, wall)}", draft, wall, (thing,))


def _enter(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    direction = _direction(random)
    along = np.array(DIRECTIONS[direction])
    half = np.array([max(aspect, 1.0), max(1.0 / aspect, 1.0)]) / 2
    start = -along * (half + 0.18) + (1 - np.abs(along)) * _anywhere(random, aspect)
    thing = _thing(random, draft.frames, start + _line(draft.frames, direction, SPEEDS["fast"]))
    return _scene(kind, f"a shape enters{_over(random, wall)}", draft, wall, (thing,))


def _drift(random: np.random.Generator, kind: Kind, draft: _Draft, wall: Wall, pace: str, aspect: float) -> Scene:
    thing = _thing(random, draft.frames, _anywhere(random, aspect))
    draft.wall_offset = _line(draft.frames, _direction(random), SPEEDS[pace])
    return _scene(kind, f"the {wall.kind} wall drifts behind {thing_name(thing)}", draft, wall, (thing,))


_DRAW = {
    "slide": _slide,
    "roam": _slide,
    "still": _still,
    "turn": _turn,
    "grow": _grow,
    "pan": _pan,
    "zoom": _zoom,
    "pass": _pass,
    "wander": _wander,
    "enter": _enter,
    "drift": _drift,
}
