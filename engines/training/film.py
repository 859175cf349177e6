"""The procedural film set: clips with captions and ground truth, of any size and length, the same for a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cinecat.engines.training.leaves import leaves
from cinecat.engines.training.scenes import COLOURS, Kind, Scene, Wall, draw_scene
from cinecat.engines.training.shapes import SHAPES

HELD_OUT = 1_000_000
"""Seeds from here on are never trained on."""

_CLUTTER = 256
"""Pixels along two short sides of a cluttered wall."""


@dataclass(frozen=True)
class Clip:
    """A rendered scene.

    Attributes:
        frames: uint8 [frames, height, width, 3].
        track: [frames, 2], the subject's centre in pixels (x, y); it may lie outside the frame.
        mask: bool [frames, height, width], where the subject is seen.
    """

    scene: Scene
    frames: NDArray[np.uint8]
    track: NDArray[np.float64]
    mask: NDArray[np.bool_]

    @property
    def caption(self) -> str:
        return self.scene.caption

    @property
    def first_frame(self) -> NDArray[np.uint8]:
        first: NDArray[np.uint8] = self.frames[0]
        return first


def make_clip(
    seed: int,
    frames: int = 17,
    height: int = 128,
    width: int = 128,
    kind: Kind | None = None,
    texture: float | None = None,
    motion: float | None = None,
) -> Clip:
    """Draws and renders one clip; see `draw_scene` for the arguments."""
    return render(draw_scene(seed, frames, width / height, kind, texture, motion), height, width)


@dataclass(frozen=True)
class Window:
    """A part of the frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


def render(scene: Scene, height: int, width: int, window: Window | None = None) -> Clip:
    """Renders a scene with smooth edges at any size.

    Args:
        window: renders only this part of a frame of `height` x `width`; the track is then relative to it.
    """
    window = window or Window(0, 0, height, width)
    side = min(height, width)
    count = len(scene.zoom)
    x = (torch.arange(window.left, window.left + window.width, dtype=torch.float32) + 0.5 - width / 2) / side
    y = (torch.arange(window.top, window.top + window.height, dtype=torch.float32) + 0.5 - height / 2) / side
    zoom = _column(scene.zoom)
    camera_x, camera_y = _column(scene.camera[:, 0]), _column(scene.camera[:, 1])
    world_x = x[None, None, :] / zoom + camera_x  # [frames, 1, width]
    world_y = y[None, :, None] / zoom + camera_y  # [frames, height, 1]
    offset_x, offset_y = _column(scene.wall_offset[:, 0]), _column(scene.wall_offset[:, 1])
    moves = bool(np.ptp(scene.zoom) or np.ptp(scene.camera) or np.ptp(scene.wall_offset))
    seen = slice(None) if moves else slice(0, 1)
    paint = _paint_clutter if scene.wall.kind == "cluttered" else _paint_wall
    picture = paint(scene.wall, (world_x - offset_x)[seen], (world_y - offset_y)[seen])
    picture = picture.expand(count, 3, window.height, window.width).clone()
    mask = torch.zeros(count, window.height, window.width, dtype=torch.bool)
    for index, thing in enumerate(scene.things):
        radius, angle = _column(thing.radius), _column(thing.angle)
        dx = (world_x - _column(thing.position[:, 0])) / radius
        dy = (world_y - _column(thing.position[:, 1])) / radius
        cosine, sine = angle.cos(), angle.sin()
        distance = SHAPES[thing.shape](dx * cosine + dy * sine, dy * cosine - dx * sine)
        cover = (0.5 - distance * radius * zoom * side).clamp(0.0, 1.0)
        # Lit from above, so that a thing is not one flat patch.
        light = 1.0 - 0.16 * dy.clamp(-1.0, 1.0)
        colour = torch.tensor(COLOURS[thing.colour]).view(1, 3, 1, 1) * light[:, None]
        picture = torch.lerp(picture, colour.expand_as(picture), cover[:, None])
        mask = cover > 0.5 if index == scene.subject else mask & (cover <= 0.5)
    frames = (picture.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    subject = scene.things[scene.subject]
    centre = (subject.position - scene.camera) * scene.zoom[:, None] * side
    track = centre + np.array([width / 2 - 0.5 - window.left, height / 2 - 0.5 - window.top])
    return Clip(scene, frames.numpy(), track, mask.numpy())


def _column(values: NDArray[np.float64]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _paint_wall(wall: Wall, x: Tensor, y: Tensor) -> Tensor:
    """RGB [frames, 3, height, width] of the wall at the points x [frames, 1, width], y [frames, height, 1]."""
    turn_x, turn_y = math.cos(wall.angle), math.sin(wall.angle)
    across, along = x * turn_x + y * turn_y, y * turn_x - x * turn_y
    if wall.kind == "flat":
        mix = torch.zeros_like(across)
    elif wall.kind == "gradient":
        mix = (0.5 + across * 0.7).clamp(0.0, 1.0)
    elif wall.kind == "striped":
        mix = _soft_square(across * wall.cycles + wall.phase[0]) * 0.5 + 0.5
    elif wall.kind == "checkered":
        columns, rows = across * wall.cycles / 2 + wall.phase[0], along * wall.cycles / 2 + wall.phase[1]
        mix = _soft_square(columns) * _soft_square(rows) * 0.5 + 0.5
    else:
        mix = _lattice_noise(wall, x, y)
    near, far = (torch.tensor(colour).view(1, 3, 1, 1) for colour in wall.colours)
    return torch.lerp(near, far, mix[:, None])


def _paint_clutter(wall: Wall, x: Tensor, y: Tensor) -> Tensor:
    """As `_paint_wall`, of leaves on two short sides of the plane and their mirror images beyond."""
    picture = leaves(np.random.default_rng(wall.seed), _CLUTTER)
    near = torch.tensor(wall.colours[0]).view(3, 1, 1)
    picture = torch.lerp(near.expand_as(picture), picture, wall.contrast)
    grid = torch.stack([x + torch.zeros_like(y), y + torch.zeros_like(x)], dim=-1)
    return functional.grid_sample(
        picture.expand(len(grid), -1, -1, -1), grid, padding_mode="reflection", align_corners=False
    )


def _soft_square(cycles: Tensor) -> Tensor:
    return (2.2 * (cycles * math.tau).sin()).tanh()


def _lattice_noise(wall: Wall, x: Tensor, y: Tensor) -> Tensor:
    """Smooth noise: random values on a lattice that repeats only far outside any frame."""
    size = 64
    values = torch.from_numpy(np.random.default_rng(wall.seed).random((size, size), dtype=np.float32))
    u, v = x * wall.cycles + wall.phase[0], y * wall.cycles + wall.phase[1]
    column, row = u.floor(), v.floor()
    fx, fy = u - column, v - row
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    left, top = column.long() % size, row.long() % size
    right, bottom = (left + 1) % size, (top + 1) % size
    upper = torch.lerp(values[top, left], values[top, right], fx)
    lower = torch.lerp(values[bottom, left], values[bottom, right], fx)
    return torch.lerp(upper, lower, fy)
