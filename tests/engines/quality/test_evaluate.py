"""`cinecat evaluate` on folders of small clips."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from cinecat.engines import commands
from tests.engines.quality.samples import noisy, panned, write_folder

CLIP, OTHER = panned(frames=3), panned(frames=3, seed=4)


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(commands.evaluate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two pairs that can be compared, and four clips that cannot."""
    a = write_folder(
        tmp_path / "a",
        {
            "one.mp4": noisy(CLIP, 10.0),
            "two.mp4": OTHER,
            "alone.mp4": CLIP,
            "wide.mp4": CLIP[:, :40],
            "long.mp4": panned(),
        },
    )
    b = write_folder(tmp_path / "b", {"one.mp4": CLIP, "two.mp4": OTHER, "wide.mp4": CLIP, "long.mp4": CLIP})
    (b / "torn.mp4").write_bytes((b / "one.mp4").read_bytes()[:300])
    (a / "torn.mp4").write_bytes((a / "one.mp4").read_bytes())
    return a, b


def test_folders_are_compared_clip_by_clip(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*folders, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["pairs"] == 2
    by_name = {clip["name"]: clip for clip in told["clips"]}
    assert by_name["two.mp4"]["both"]["psnr_db"] == 99.0
    assert 20 < by_name["one.mp4"]["both"]["psnr_db"] < 40
    psnr = told["metrics"]["psnr_db"]
    assert psnr["low"] <= psnr["value"] <= psnr["high"]
    assert set(told["metrics"]["motion_score"]) == {"better", "a", "b", "difference"}
    assert set(told["unavailable"]) == {"lpips", "clip_sim", "fvd"}
    rows = list(csv.DictReader((tmp_path / "out" / "clips.csv").open()))
    assert [row["clip"] for row in rows] == ["one.mp4", "two.mp4"]
    assert float(rows[1]["ssim"]) == 1.0
    assert "lpips" not in rows[0]


def test_what_cannot_be_compared_is_named_with_the_reason(folders: tuple[Path, Path]) -> None:
    left_out = run(*folders, "--json").stderr
    assert "alone.mp4: has no partner in" in left_out
    assert "wide.mp4: has another size in each folder, 48x40 and 48x48" in left_out
    assert "long.mp4: has another length in each folder, 4 frames and 3 frames" in left_out
    assert "torn.mp4: cannot be read as video" in left_out


def test_people_get_a_table_and_the_reason_for_what_is_missing(folders: tuple[Path, Path]) -> None:
    shown = run(*folders).stdout
    assert "2 pairs; means with 95% bootstrap intervals; B is the reference" in shown
    assert "PSNR, dB" in shown
    assert "LPIPS: unavailable, needs --lpips-weights" in shown


def test_another_frame_rate_is_not_compared(tmp_path: Path) -> None:
    result = run(*(write_folder(tmp_path / name, {"one.mp4": CLIP}, fps) for name, fps in (("a", 8.0), ("b", 12.0))))
    assert result.exit_code == 2
    assert "one.mp4: has another frame rate in each folder, 8 and 12; make them alike" in result.stderr


def test_folders_without_a_common_name_and_missing_ones_are_refused(tmp_path: Path) -> None:
    a, b = write_folder(tmp_path / "a", {"one.mp4": CLIP}), write_folder(tmp_path / "b", {"two.mp4": CLIP})
    result = run(a, b)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "have no video of the same name (1 and 1 videos)" in result.stderr
    missing = run(a, tmp_path / "none")
    assert missing.exit_code == 2
    assert "is not a folder that can be read" in missing.stderr


def test_weights_that_are_not_there_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*folders, "--lpips-weights", tmp_path / "none.safetensors")
    assert result.exit_code == 2
    assert "evaluate: lpips-weights: " in result.stderr
