"""Frames to files: an H.264 mp4, or the decoded frames as a safetensors file. Every call blocks."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import av
import numpy as np
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)
from numpy.typing import NDArray

from cinecat.server.artifacts import ArtifactError, ArtifactFormat, WrittenArtifact

Frames = NDArray[np.uint8] | NDArray[np.floating[Any]]

_NTSC_RATES = (24, 30, 48, 60, 120)


@dataclass(frozen=True, slots=True)
class ClipShape:
    """Pixels, frame count and frames per second of a clip."""

    width: int
    height: int
    frames: int
    rate: Fraction


class ClipWriter(Protocol):
    """Writes one clip to one local file.

    Frames are uint8, or floating point in [0, 1], as [n, height, width, 3]; a clip may come in any number of chunks.
    A call that raises ArtifactError has removed the file. Calls may come from different threads, one at a time.
    """

    def write(self, frames: Frames) -> None:
        """Appends frames. Raises ValueError for another shape or dtype, ArtifactError."""
        ...

    def finish(self) -> WrittenArtifact:
        """Completes the file. Raises ArtifactError, also when frames are missing."""
        ...

    def abort(self) -> None:
        """Gives up and removes the file. Does not raise, and may be called at any time."""
        ...


def open_writer(format: ArtifactFormat, path: Path, shape: ClipShape, metadata: Mapping[str, str]) -> ClipWriter:
    """Starts a file at `path`. Raises ArtifactError."""
    if format is ArtifactFormat.MP4_H264:
        return Mp4Writer(path, shape, metadata)
    return FramesF32Writer(path, shape, metadata)


def exact_rate(fps: float) -> Fraction:
    """Returns the rate that is meant by `fps`: 23.976 is 24000/1001, 12.5 is 25/2. Raises ValueError below 1/1001."""
    if not math.isfinite(fps):
        raise ValueError(f"fps must be finite, not {fps}")
    for whole in _NTSC_RATES:
        rate = Fraction(whole * 1000, 1001)
        if abs(fps - rate) < 0.005:
            return rate
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise ValueError(f"fps must be at least 1/1001, not {fps}")
    return rate


def clip_metadata(prompt: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata of a clip's files: `title`, the prompt, and `comment`, the settings as one JSON object."""
    # A NUL would end the string for FFmpeg.
    return {"title": prompt.replace("\0", " "), "comment": json.dumps(settings, allow_nan=False)}


class Mp4Writer:
    """H.264 in an mp4 with the index in front: 4:2:0, 8 bit, BT.709 in limited range."""

    def __init__(self, path: Path, shape: ClipShape, metadata: Mapping[str, str]) -> None:
        """Raises ArtifactError when width or height is odd, or the file cannot be made."""
        if shape.width % 2 or shape.height % 2:
            raise ArtifactError(f"an mp4 in 4:2:0 needs an even width and height, not {shape.width}x{shape.height}")
        self._path = path
        self._shape = shape
        self._written = 0
        self._reformatter = VideoReformatter()
        with _removing_on_failure(self, path):
            self._container = av.open(str(path.absolute()), "w", format="mp4", options={"movflags": "+faststart"})
            self._container.metadata.update(metadata)
            # Measured on a panned photograph at 832x480: preset "medium" takes 1.8 times as long and gains one decibel.
            stream: Any = self._container.add_stream(
                "libx264", rate=shape.rate, options={"preset": "veryfast", "crf": "16"}
            )
            stream.width, stream.height, stream.pix_fmt = shape.width, shape.height, "yuv420p"
            codec = stream.codec_context
            codec.color_range = ColorRange.MPEG
            codec.colorspace = Colorspace.ITU709
            codec.color_primaries = ColorPrimaries.BT709
            codec.color_trc = ColorTrc.BT709
            self._stream = stream
            # Opens the file, which would otherwise wait for the first packet.
            self._container.start_encoding()

    def write(self, frames: Frames) -> None:
        _check_frames(frames, self._shape, self._written)
        with _removing_on_failure(self, self._path):
            for frame in frames:
                self._container.mux(self._stream.encode(self._picture(_as_uint8(frame))))
                self._written += 1

    def finish(self) -> WrittenArtifact:
        with _removing_on_failure(self, self._path):
            _check_complete(self._path, self._written, self._shape)
            self._container.mux(self._stream.encode(None))
            self._container.close()
        return WrittenArtifact(self._path, ArtifactFormat.MP4_H264)

    def abort(self) -> None:
        container = getattr(self, "_container", None)
        if container is not None:
            with contextlib.suppress(OSError, av.FFmpegError):
                container.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _picture(self, frame: NDArray[np.uint8]) -> av.VideoFrame:
        picture = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
        )
        picture.pts = self._written
        picture.time_base = 1 / self._shape.rate
        return picture


class FramesF32Writer:
    """A safetensors file with one tensor "frames", float32 [frames, height, width, 3] in [0, 1].

    The frames go to disk as they come, so that memory holds one chunk and not the clip.
    """

    def __init__(self, path: Path, shape: ClipShape, metadata: Mapping[str, str]) -> None:
        """Raises ArtifactError when the file cannot be made."""
        self._path = path
        self._shape = shape
        self._written = 0
        self._file: BinaryIO | None = None
        with _removing_on_failure(self, path):
            self._file = path.open("wb")
            self._file.write(_safetensors_header(shape, metadata))

    def write(self, frames: Frames) -> None:
        _check_frames(frames, self._shape, self._written)
        with _removing_on_failure(self, self._path):
            for frame in frames:
                self._open_file().write(np.ascontiguousarray(_as_float32(frame), dtype="<f4").data)
                self._written += 1

    def finish(self) -> WrittenArtifact:
        with _removing_on_failure(self, self._path):
            _check_complete(self._path, self._written, self._shape)
            self._open_file().close()
        return WrittenArtifact(self._path, ArtifactFormat.FRAMES_F32)

    def abort(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _open_file(self) -> BinaryIO:
        if self._file is None or self._file.closed:
            raise ArtifactError(f"cannot write {self._path.name}: the file is closed")
        return self._file


def _safetensors_header(shape: ClipShape, metadata: Mapping[str, str]) -> bytes:
    size = shape.frames * shape.height * shape.width * 3 * 4
    header = json.dumps(
        {
            "__metadata__": dict(metadata),
            "frames": {
                "dtype": "F32",
                "shape": [shape.frames, shape.height, shape.width, 3],
                "data_offsets": [0, size],
            },
        }
    ).encode()
    # Readers map the file, and want the data aligned.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _as_uint8(frame: NDArray[Any]) -> NDArray[np.uint8]:
    if frame.dtype == np.uint8:
        return frame
    return np.rint(np.clip(frame.astype(np.float32, copy=False), 0, 1) * 255).astype(np.uint8)


def _as_float32(frame: NDArray[Any]) -> NDArray[np.float32]:
    if frame.dtype == np.uint8:
        return frame.astype(np.float32) / np.float32(255)
    return frame.astype(np.float32, copy=False)


def _check_frames(frames: Frames, shape: ClipShape, written: int) -> None:
    wanted = (shape.height, shape.width, 3)
    if frames.ndim != 4 or frames.shape[1:] != wanted:
        raise ValueError(f"frames must have the shape [n, {shape.height}, {shape.width}, 3], not {list(frames.shape)}")
    if frames.dtype != np.uint8 and not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames must be uint8 or floating point, not {frames.dtype}")
    if written + len(frames) > shape.frames:
        raise ValueError(f"the clip has {shape.frames} frames; {written + len(frames)} were given")


def _check_complete(path: Path, written: int, shape: ClipShape) -> None:
    if written != shape.frames:
        raise ArtifactError(f"cannot write {path.name}: {written} of {shape.frames} frames were given")


@contextlib.contextmanager
def _removing_on_failure(writer: ClipWriter, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        writer.abort()
        raise ArtifactError(f"cannot write {path.name}: {getattr(error, 'strerror', None) or error}") from error
    except BaseException:
        writer.abort()
        raise
