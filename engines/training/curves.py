"""Curves of a training run as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path


def draw_curves(title: str, curve: Path, panels: Sequence[Sequence[str]], picture: Path) -> None:
    """Draws columns of a journal's CSV over its column "step" as PNG.

    Args:
        panels: columns that share a vertical axis, panel by panel; empty cells are left out.
    """
    from matplotlib.figure import Figure

    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(5 * len(panels), 3.2), layout="constrained")
    figure.suptitle(title)
    for axes, columns in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for column in columns:
            known = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            axes.plot(*zip(*known, strict=True), marker=".", label=column.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
