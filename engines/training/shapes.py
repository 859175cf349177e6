"""Shapes of the film set as signed distances, so that edges are smooth at any size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.92


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.82


def diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() + y.abs() - 1.1) * math.sqrt(0.5)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * 0.894 - y * 0.447, y) - 0.48


def hexagon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * 0.866 + y.abs() * 0.5, y.abs()) - 0.86


def cross(x: Tensor, y: Tensor) -> Tensor:
    upright = torch.maximum(x.abs() - 0.36, y.abs() - 1.0)
    lying = torch.maximum(x.abs() - 1.0, y.abs() - 0.36)
    return torch.minimum(upright, lying)


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.7).abs() - 0.26


def star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: the outline is straight between radius 1 at the points and 0.5 between them."""
    sector = math.tau / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    radius = torch.hypot(x, y)
    across, along = radius * angle.abs().sin(), radius * angle.cos()
    inner_x, inner_y = 0.5 * math.sin(sector / 2), 0.5 * math.cos(sector / 2)
    edge_x, edge_y = inner_x, inner_y - 1.0
    length = math.hypot(edge_x, edge_y)
    return (across * -edge_y + (along - 1.0) * edge_x) / length


def heart(x: Tensor, y: Tensor) -> Tensor:
    lobes = torch.hypot(x.abs() - 0.42, y + 0.32) - 0.5
    point = torch.maximum((x.abs() + y) * math.sqrt(0.5) - 0.63, -y - 0.32)
    return torch.minimum(lobes, torch.maximum(point, x.abs() - 0.92))


SHAPES: dict[str, Distance] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "ring": ring,
    "cross": cross,
    "diamond": diamond,
    "hexagon": hexagon,
    "heart": heart,
}
"""Signed distance by name, in units of the radius, negative inside; x grows right and y down."""
