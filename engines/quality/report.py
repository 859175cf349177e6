"""A comparison for people, for scripts and for spreadsheets."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cinecat.engines.quality.comparison import METRICS, Comparison, Side
from cinecat.engines.quality.intervals import Mean

CSV_NAME = "clips.csv"
_PIPE_WIDTH = 400
_SIDES: tuple[Side, ...] = ("a", "b", "difference")


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Means with their intervals by metric, and everything that was measured on each pair."""
    metrics: dict[str, Any] = {}
    for name, metric in METRICS.items():
        sides: tuple[Side, ...] = ("both",) if metric.of_pair else _SIDES
        means = {side: mean for side in sides if (mean := comparison.mean(name, side)) is not None}
        if means:
            figures = {side: asdict(mean) for side, mean in means.items()}
            metrics[name] = {"better": metric.better or None, **(figures["both"] if metric.of_pair else figures)}
    if comparison.fvd is not None:
        metrics["fvd"] = {"better": "lower", "value": comparison.fvd}
    return {
        "pairs": len(comparison.pairs),
        "metrics": metrics,
        "unavailable": dict(comparison.unavailable),
        "left_out": list(comparison.left_out),
        "clips": [asdict(pair) for pair in comparison.pairs],
    }


def show_table(comparison: Comparison) -> None:
    """Prints the means with their 95% intervals."""
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    table = Table("METRIC", "BETTER", "A", "B", "A - B", "A AGAINST B", box=None, pad_edge=False, header_style="bold")
    for name, metric in METRICS.items():
        if name in comparison.unavailable:
            continue
        if metric.of_pair:
            cells = ["", "", "", _cell(comparison.mean(name, "both"))]
        else:
            cells = [_cell(comparison.mean(name, side)) for side in _SIDES] + [""]
        table.add_row(metric.title, metric.better or "-", *cells)
    if comparison.fvd is not None:
        table.add_row("FVD", "lower", "", "", "", f"{comparison.fvd:.1f}")
    count = len(comparison.pairs)
    console.print(
        f"{count} {'pair' if count == 1 else 'pairs'}; means with 95% bootstrap intervals; B is the reference"
    )
    console.print(table)
    for name, reason in comparison.unavailable.items():
        title = METRICS[name].title if name in METRICS else name.upper()
        console.print(f"{title}: unavailable, {reason}")


def write_csv(comparison: Comparison, folder: Path) -> Path:
    """Writes one row a pair and returns the file. Raises OSError where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CSV_NAME
    columns = [
        column
        for name, metric in METRICS.items()
        if name not in comparison.unavailable
        for column in ([name] if metric.of_pair else [f"{name}_a", f"{name}_b"])
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["clip", "frames", "width", "height", *columns])
        writer.writeheader()
        for pair in comparison.pairs:
            scores = {
                **pair.both,
                **{f"{name}_a": value for name, value in pair.a.items()},
                **{f"{name}_b": value for name, value in pair.b.items()},
            }
            writer.writerow(
                {
                    "clip": pair.name,
                    "frames": pair.frames,
                    "width": pair.width,
                    "height": pair.height,
                    **{name: round(value, 6) for name, value in scores.items()},
                }
            )
    return path


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return "-"
    if mean.low is None or mean.high is None:
        return f"{mean.value:.4g}"
    return f"{mean.value:.4g} ({mean.low:.4g} to {mean.high:.4g})"
