"""A folder of captioned clips, read as the model wants them: its size, its frame rate, uint8."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

METADATA_NAME = "metadata.jsonl"
SEED_SUFFIX = ".seed"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
_CAPTION_KEYS = ("text", "caption", "prompt")
_FILE_KEYS = ("file_name", "video", "path")
_MOST_SEED = 2**63 - 1
_MOST_PIXELS = 64_000_000
"""Of one frame; more is refused before anything is decoded."""


class ClipError(Exception):
    """A clip that cannot be trained on; the message is one sentence with its file name, the reason and the fix."""


@dataclass(frozen=True)
class ClipShape:
    """What every clip is brought to: pixels, frames (4k + 1), and frames a second."""

    width: int
    height: int
    frames: int
    fps: float


@dataclass(frozen=True)
class CaptionedClip:
    """A video file and what it shows.

    Attributes:
        image: the picture that a request for such a clip would send; None for the clip's own first frame.
        seed: of the noise that the model made it from; None for a clip that comes from elsewhere.
    """

    path: Path
    caption: str
    image: Path | None = None
    seed: int | None = None


def find_clips(folder: Path, shape: ClipShape) -> tuple[list[CaptionedClip], list[str]]:
    """The clips of a folder that can be trained on, and one sentence on each of the others.

    Captions are in metadata.jsonl, {"file_name": "a.mp4", "text": "..."} a line, or in a .txt beside each clip. A
    picture of the same name is what the clip is to be made from, and a number in a .seed file is that of the noise that
    the model made it from. Every clip is decoded as far as it will be needed, so that what is broken is known before
    anything is trained.

    Raises:
        ClipError: the folder or its metadata.jsonl cannot be read.
    """
    if not folder.is_dir():
        raise ClipError(f"{folder} is not a folder; name one that holds video files")
    found: list[CaptionedClip] = []
    problems: list[str] = []
    for path, caption in _captioned(folder, problems):
        if not caption:
            problems.append(f"{path.name}: has no caption; write one into {path.stem}.txt or {METADATA_NAME}")
            continue
        image = next((each for suffix in IMAGE_SUFFIXES if (each := path.with_suffix(suffix)).is_file()), None)
        try:
            read_clip(path, shape)
            if image is not None:
                read_image(image, shape)
            seed = _seed(path.with_suffix(SEED_SUFFIX))
        except ClipError as error:
            problems.append(str(error))
            continue
        found.append(CaptionedClip(path, caption, image, seed))
    return found, problems


def first_frame(clip: CaptionedClip, shape: ClipShape) -> NDArray[np.uint8]:
    """What a clip is conditioned on, uint8 [height, width, 3]. Raises as `read_clip` and `read_image` do."""
    if clip.image is not None:
        return read_image(clip.image, shape)
    frame: NDArray[np.uint8] = read_clip(clip.path, replace(shape, frames=1))[0]
    return frame


def read_image(path: Path, shape: ClipShape) -> NDArray[np.uint8]:
    """A picture cropped about its middle to the shape's size, uint8 [height, width, 3].

    Raises:
        ClipError: it cannot be read, or is too large.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ClipError(f"{path.name}: has {image.width}x{image.height} pixels; scale it down")
            return _fitted(np.asarray(image.convert("RGB")), shape)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError(f"{path.name}: cannot be read as a picture ({error})") from error


def read_clip(path: Path, shape: ClipShape) -> NDArray[np.uint8]:
    """The first frames of a video at the shape's rate, its middle cropped to the shape's aspect.

    Returns:
        uint8 [frames, height, width, 3].

    Raises:
        ClipError: it cannot be read, or is too short.
    """
    frames: list[NDArray[np.uint8]] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ClipError(f"{path.name}: holds no video")
            for seconds, frame in decoded(container, path):
                picture = None
                while len(frames) < shape.frames and seconds >= len(frames) / shape.fps - 1e-3:
                    picture = _fitted(upright(frame), shape) if picture is None else picture
                    frames.append(picture)
                if len(frames) == shape.frames:
                    break
    except (OSError, ValueError, av.FFmpegError) as error:
        raise ClipError(f"{path.name}: cannot be read as video ({error})") from error
    if len(frames) < shape.frames:
        raise ClipError(
            f"{path.name}: is too short: {len(frames)} frames at {shape.fps:g} a second, {shape.frames} are needed; "
            "leave it out, or train on fewer frames"
        )
    return np.stack(frames)


def decoded(container: Any, path: Path) -> Iterator[tuple[float, Any]]:
    """PyAV's frames of an open video, with their seconds since the first one. Raises ClipError for too large ones."""
    stream = container.streams.video[0]
    if stream.width * stream.height > _MOST_PIXELS:
        raise ClipError(f"{path.name}: its frames have {stream.width}x{stream.height} pixels; scale it down")
    rate = float(stream.average_rate or stream.base_rate or 0)
    start: float | None = None
    for index, frame in enumerate(container.decode(stream)):
        seconds = frame.time if frame.time is not None else (index / rate if rate else float(index))
        start = seconds if start is None else start
        yield seconds - start, frame


def upright(frame: Any) -> NDArray[np.uint8]:
    """A frame turned as its file says, uint8 [height, width, 3]."""
    pixels: NDArray[np.uint8] = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    return pixels


def _fitted(pixels: NDArray[np.uint8], shape: ClipShape) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    scale = min(width / shape.width, height / shape.height)
    # The largest part of the middle with the aspect that is wanted.
    across, down = shape.width * scale / 2, shape.height * scale / 2
    box = (width / 2 - across, height / 2 - down, width / 2 + across, height / 2 + down)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize((shape.width, shape.height), Image.Resampling.LANCZOS, box=box))


def _captioned(folder: Path, problems: list[str]) -> list[tuple[Path, str]]:
    metadata = folder / METADATA_NAME
    told = _metadata(metadata, problems) if metadata.exists() else {}
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    problems.extend(
        f"{name}: is named in {METADATA_NAME}, and there is no such video in the folder"
        for name in sorted(told.keys() - {path.name for path in files})
    )
    return [(path, told.get(path.name, "") or _beside(path, problems)) for path in files]


def _beside(path: Path, problems: list[str]) -> str:
    try:
        return " ".join(path.with_suffix(".txt").read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.stem}.txt: cannot be read as UTF-8 text ({error})")
        return ""


def _seed(path: Path) -> int | None:
    """The number in a file; None where there is no such file. Raises ClipError for anything else."""
    try:
        seed = int(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ClipError(f"{path.name}: does not hold the seed of a request, a whole number") from error
    if not 0 <= seed <= _MOST_SEED:
        raise ClipError(f"{path.name}: {seed} is not the seed of a request, 0 to 2^63 - 1")
    return seed


def _metadata(path: Path, problems: list[str]) -> dict[str, str]:
    """Captions by file name."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ClipError(f"{METADATA_NAME}: cannot be read as UTF-8 text ({error})") from error
    captions = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = next(str(row[key]) for key in _FILE_KEYS if key in row)
            caption = next(str(row[key]) for key in _CAPTION_KEYS if key in row)
        except (ValueError, TypeError, StopIteration, RecursionError):
            problems.append(f'{METADATA_NAME}: line {number} is not {{"file_name": "...", "text": "..."}}')
            continue
        captions[name] = " ".join(caption.split())
    return captions
