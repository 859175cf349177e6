"""A `cinecat train-style` that is killed from outside, and the same command again."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engines.training.styles.samples import write_clip

STEPS, KILL_AFTER, DEADLINE = 60, 20, 120.0
SIZE = "--width 32 --height 32 --frames 5 --device cpu --rank 2 --no-preview --accumulation 2 --learning-rate 0.003"
LENGTH = f"--steps {STEPS} --evaluate-every 5 --patience {STEPS} --save-seconds 0"


def command(micro: Path, clips: Path, folder: Path) -> list[str]:
    folders = ["--model", str(micro), "--out", str(folder / "styles"), "--work", str(folder / "work")]
    return [
        *(sys.executable, "-m", "cinecat.cli", "train-style", str(clips), "--name", "dusk"),
        *(*folders, *SIZE.split(), *LENGTH.split()),
    ]


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Until the curve has a row of that step or a later one."""
    end = time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < end:
        for curve in (folder / "work").glob("*.csv"):
            with curve.open(newline="") as file:
                if any(int(row["step"] or 0) >= step for row in csv.DictReader(file)):
                    return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}; exit code {process.poll()}")


def checkpoint(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "work").glob("*.pt")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def without_seconds(folder: Path) -> list[list[str]]:
    rows = (folder / "styles" / "dusk" / "training.csv").read_text().splitlines()
    return [[cell for place, cell in enumerate(row.split(",")) if place != 1] for row in rows]


@pytest.mark.slow
def test_a_killed_process_goes_on_to_what_an_undisturbed_one_makes(micro: Path, tmp_path: Path) -> None:
    clips, whole, killed = tmp_path / "clips", tmp_path / "whole", tmp_path / "killed"
    clips.mkdir()
    for name in ("a", "b", "c", "d"):
        write_clip(clips / f"{name}.mp4", f"a star {name}")
    subprocess.run(command(micro, clips, whole), check=True, capture_output=True)

    with subprocess.Popen(
        command(micro, clips, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for_step(process, killed, KILL_AFTER)
        process.kill()
    assert not (killed / "styles").exists()
    assert KILL_AFTER <= checkpoint(killed)["step"] + 1 < STEPS
    resumed = subprocess.run(command(micro, clips, killed), check=True, capture_output=True, text=True)

    assert "going on from" in resumed.stderr
    assert checkpoint(killed)["step"] == checkpoint(whole)["step"] == STEPS
    torch.testing.assert_close(checkpoint(killed)["weights"], checkpoint(whole)["weights"], rtol=1e-5, atol=1e-7)
    ours, theirs = (load_file(folder / "styles" / "dusk" / "dusk.safetensors") for folder in (killed, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert without_seconds(killed) == without_seconds(whole)
