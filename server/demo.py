"""`python -m cinecat.server.demo`: a few clips from a real server, and a sheet to look at them side by side."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Column, Table

from cinecat import CinecatError, Client
from cinecat.server.images import decode_image, fit_image
from cinecat.server.local_server import ServerFailed, running_server

SEED = 7


@dataclass(frozen=True)
class Take:
    """What one clip of the demo is asked for.

    Attributes:
        image: a file of server/examples.
    """

    image: str
    prompt: str


TAKES = {
    "right": Take("star.png", "a red star moves right quickly"),
    "up": Take("star.png", "a red star moves up quickly"),
    "cat": Take("chelsea.png", "nothing moves"),
}

_GAP, _LABEL = 4, 16


def contact_sheet(
    images: Mapping[str, NDArray[np.uint8]], clips: Mapping[str, NDArray[np.uint8]], columns: int = 6
) -> Image.Image:
    """Returns one row per clip: its input image, then `columns` frames evenly spaced from the first to the last.

    images, clips: by label, uint8 [height, width, 3] and [frames, height, width, 3], all of one size.
    """
    height, width = next(iter(images.values())).shape[:2]
    row_height = _LABEL + height + _GAP
    sheet = Image.new("RGB", (_GAP + (columns + 1) * (width + _GAP), _GAP + len(clips) * row_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, (label, frames) in enumerate(clips.items()):
        top = _GAP + row * row_height
        shown = np.linspace(0, len(frames) - 1, columns).round().astype(int)
        captions = ["input", *(f"{label}, frame {index}" for index in shown)]
        for column, (caption, pixels) in enumerate(zip(captions, [images[label], *frames[shown]], strict=True)):
            left = _GAP + column * (width + _GAP)
            draw.text((left, top), caption, fill="black", font=font)
            sheet.paste(Image.fromarray(pixels), (left, top + _LABEL))
    return sheet


def read_frames(path: Path) -> NDArray[np.uint8]:
    """Returns the frames of a video file, uint8 [frames, height, width, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def timings_table(timings: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns a table of seconds, one row per stage and one column per clip."""
    table = Table("stage", *(Column(name, justify="right") for name in timings))
    stages = list(dict.fromkeys(stage for clip in timings.values() for stage in clip))
    for stage in stages:
        table.add_row(stage, *(f"{clip[stage]:.3f} s" if stage in clip else "" for clip in timings.values()))
    table.add_row("total", *(f"{sum(clip.values()):.3f} s" for clip in timings.values()), style="bold")
    return table


def make_clips(out: Path, console: Console) -> None:
    """Generates the clips of TAKES into `out`, with contact-sheet.png. Raises ServerFailed and CinecatError."""
    out.mkdir(parents=True, exist_ok=True)
    examples = resources.files("cinecat.server").joinpath("examples")
    images = {name: examples.joinpath(take.image).read_bytes() for name, take in TAKES.items()}
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="cinecat-demo-") as folder:
        console.print("starting cinecat serve ...")
        with running_server(Path(folder)) as server, Client(server.address) as client:
            for name, take in TAKES.items():
                console.print(f"{name}: {take.prompt} ...")
                clip = client.generate(
                    image=images[name], prompt=take.prompt, seed=SEED, output=out / f"{name}.mp4"
                ).result()
                console.print(f"{name}: {out / name}.mp4, {clip.width}x{clip.height}, {clip.frames} frames")
                made[name] = clip
    frames = {name: read_frames(out / f"{name}.mp4") for name in made}
    height, width = next(iter(frames.values())).shape[1:3]
    inputs = {
        name: fit_image(decode_image(image, max_bytes=len(image), max_pixels=1_000_000), width, height).pixels
        for name, image in images.items()
    }
    contact_sheet(inputs, frames).save(out / "contact-sheet.png")
    console.print(timings_table({name: clip.timings for name, clip in made.items()}))
    console.print(f"compare them in {out / 'contact-sheet.png'}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cinecat.server.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the clips and the contact sheet")
    console = Console(markup=False)
    try:
        make_clips(parser.parse_args().out, console)
    except (ServerFailed, CinecatError) as error:
        console.print(str(error), style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
