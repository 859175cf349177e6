"""What a training run keeps: checkpoints that appear whole or not at all, curves as CSV, and a bar with an ETA."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Journal:
    """The files of one training run in one folder.

    Attributes:
        folder: holds NAME.pt and NAME.csv.
        name: of the part that is trained.
    """

    folder: Path
    name: str

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    @property
    def curve(self) -> Path:
        return self.folder / f"{self.name}.csv"

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint at once, so that a killed run keeps the one before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = self.checkpoint.with_suffix(".tmp")
        torch.save(dict(state), staging)
        staging.replace(self.checkpoint)

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None at the beginning."""
        if not self.checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        return state

    def log(self, row: Mapping[str, float | int | str]) -> None:
        """Appends one row to the curve; the first call writes the header."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = not self.curve.exists()
        with self.curve.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drops the curve's rows after `step`, which a resumed run will write again."""
        if not self.curve.exists():
            return
        with self.curve.open(newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or ())
            rows = [row for row in reader if int(row["step"]) <= step]
        with self.curve.open("w", newline="") as file:
            writer = csv.DictWriter(file, header)
            writer.writeheader()
            writer.writerows(rows)


@contextmanager
def training_bar(title: str, start: int, steps: int) -> Iterator[Any]:
    """A progress bar over steps, on stderr; yields a function (step, note) that moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1, speed_estimate_period=120) as progress:
        task = progress.add_task(title, total=steps, completed=start, note="")

        def move(step: int, note: str) -> None:
            progress.update(task, completed=step, note=note)

        yield move


class Pulse:
    """True once per interval of seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
