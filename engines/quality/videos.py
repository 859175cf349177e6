"""Video files as they are, every frame at its own size and rate, and two folders of them paired by file name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from cinecat.engines.training.styles.clips import SUFFIXES, ClipError, decoded, upright

Frames = NDArray[np.uint8]

_MOST_BYTES = 4 * 2**30
"""Of one decoded video; a longer one is to be cut."""


class FolderError(Exception):
    """A folder of clips that cannot be compared; the message is one sentence with the fix."""


@dataclass(frozen=True)
class Video:
    """A decoded video.

    Attributes:
        frames: uint8 [frames, height, width, 3], sRGB.
        fps: frames a second.
    """

    frames: Frames
    fps: float


@dataclass(frozen=True)
class FilePair:
    """Two files of one name."""

    name: str
    a: Path
    b: Path


def read_video(path: Path) -> Video:
    """Decodes a whole video.

    Raises:
        ClipError: it cannot be read, tells no frame rate, or takes more than 4 GiB as frames.
    """
    frames: list[Frames] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ClipError(f"{path.name}: holds no video")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.base_rate or 0)
            for _, frame in decoded(container, path):
                frames.append(upright(frame))
                if len(frames) * frames[0].nbytes > _MOST_BYTES:
                    raise ClipError(f"{path.name}: takes more than 4 GiB as frames; cut it")
            if len({frame.shape for frame in frames}) > 1:
                raise ClipError(f"{path.name}: changes its size on the way; encode it again at one size")
    except (OSError, ValueError, av.FFmpegError) as error:
        raise ClipError(f"{path.name}: cannot be read as video ({error})") from error
    if not frames or rate <= 0:
        raise ClipError(f"{path.name}: holds no frames, or tells no frame rate; encode it again")
    return Video(np.stack(frames), rate)


def pair_files(a: Path, b: Path, suffixes: Sequence[str] = SUFFIXES) -> tuple[list[FilePair], list[str]]:
    """The videos of two folders by file name, and one sentence on each that has no partner.

    A link that leads out of its folder is left out: whatever shows these files shows nothing else.

    Raises:
        FolderError: a folder cannot be read, or no name is in both.
    """
    found, problems = [], []
    for folder in (a, b):
        files, strays = _videos(folder, suffixes)
        found.append(files)
        problems += strays
    first, second = found
    problems += [f"{path}: has no partner in {b}" for name, path in first.items() if name not in second]
    problems += [f"{path}: has no partner in {a}" for name, path in second.items() if name not in first]
    pairs = [FilePair(name, first[name], second[name]) for name in sorted(first.keys() & second.keys())]
    if not pairs:
        raise FolderError(
            f"{a} and {b} have no video of the same name ({len(first)} and {len(second)} videos); name them alike, "
            f"as one of {', '.join(suffixes)}"
        )
    return pairs, problems


def _videos(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    try:
        inside = folder.resolve(strict=True)
        paths = sorted(path for path in inside.iterdir() if path.suffix.lower() in suffixes and path.is_file())
    except OSError as error:
        raise FolderError(f"{folder} is not a folder that can be read; name one that holds videos") from error
    files, strays = {}, []
    for path in paths:
        if path.resolve().is_relative_to(inside):
            files[path.name] = path
        else:
            strays.append(f"{path}: leads out of its folder and is left out; put a copy there")
    return files, strays
