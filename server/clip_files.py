"""The files of one clip, from the first decoded frames to their publication. Methods block."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from numpy.typing import NDArray

from cinecat.engines.messages import FrameDtype
from cinecat.server.artifacts import ArtifactError, ArtifactFormat, ArtifactInfo, ArtifactStore
from cinecat.server.mux import ClipShape, ClipWriter, clip_metadata, exact_rate, open_writer
from cinecat.v1 import clip_pb2

_FORMATS = {
    clip_pb2.ARTIFACT_FORMAT_MP4_H264: ArtifactFormat.MP4_H264,
    clip_pb2.ARTIFACT_FORMAT_FRAMES_F32: ArtifactFormat.FRAMES_F32,
}


class ClipFiles:
    """Writes every format that a clip asks for.

    Attributes:
        seconds: spent on writing and publishing.
    """

    def __init__(self, artifacts: ArtifactStore, job_id: str, clip: clip_pb2.ClipSpec, engine: str) -> None:
        """Begins all files. Raises ArtifactError.

        Args:
            engine: that made the clip, for the files' metadata.
        """
        self._artifacts, self._job_id, self._clip = artifacts, job_id, clip
        self._writers: list[ClipWriter] = []
        self.seconds = 0.0
        shape = ClipShape(clip.width, clip.height, clip.frames, exact_rate(clip.fps))
        metadata = clip_metadata(clip.prompt, {"job_id": job_id, "engine": engine, **as_dict(clip)})
        for value in clip.artifact_formats:
            path = artifacts.scratch_path(job_id, _FORMATS[value])
            self._writers.append(open_writer(_FORMATS[value], path, shape, metadata))

    def write(self, frames: NDArray[Any]) -> None:
        """Appends frames, uint8 or float32 [n, height, width, 3]. Raises ArtifactError."""
        started = time.perf_counter()
        for writer in self._writers:
            writer.write(frames)
        self.seconds += time.perf_counter() - started

    def publish(self) -> list[ArtifactInfo]:
        """Completes all files, then publishes them, in the order of the clip's formats. Raises ArtifactError."""
        started = time.perf_counter()
        finished = [writer.finish() for writer in self._writers]
        published = [self._artifacts.publish(self._job_id, written) for written in finished]
        self.seconds += time.perf_counter() - started
        return published

    def remove(self) -> None:
        """Leaves nothing behind, published or not. Does not raise."""
        for writer in self._writers:
            writer.abort()
        with contextlib.suppress(ArtifactError):
            self._artifacts.delete_job(self._job_id)


def frame_dtype(clip: clip_pb2.ClipSpec) -> FrameDtype:
    """What a clip's formats need its frames as."""
    return "float32" if clip_pb2.ARTIFACT_FORMAT_FRAMES_F32 in clip.artifact_formats else "uint8"


def as_dict(message: Message) -> dict[str, Any]:
    """A message as plain JSON values, by its proto field names."""
    return dict(MessageToDict(message, preserving_proto_field_name=True))
