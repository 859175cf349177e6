"""`cinecat plan`, as a person and a script meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from cinecat.server.commands import plan

app = typer.Typer()
app.command()(plan)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_an_image_becomes_a_picture_and_figures(photograph: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = run(photograph, "-o", picture, "--size", "64x64", "--frames", 9, "--keep-ratio", 0.5, "--json")
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert (told["tokens"], told["tokens_uniform"], told["keep_ratio"]) == (24, 48, 0.5)
    assert sum(int(size) * count for size, count in told["histogram"].items()) == 48
    assert Image.open(picture).size == (2 * 128 + 8, 128)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "64"], "size: '64' is not WIDTHxHEIGHT"),
        (["--size", "64x60"], "size: 64x60 is not of multiples of 16"),
        (["--frames", "8"], "frames: 8 is not 4k + 1"),
        (["--keep-ratio", "0.01"], "keep_ratio: 0.01 is not between"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_planned_is_named_and_nothing_is_written(
    photograph: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    done = run(photograph, "-o", tmp_path / "plan.png", *options)
    assert done.exit_code == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"a cat")
    done = run(tmp_path / "cat.png", "-o", tmp_path / "plan.png")
    assert done.exit_code == 2
    assert "IMAGE: " in done.stderr
