"""The first frames of finished clips."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from cinecat.server.artifacts import ArtifactStore
from cinecat.server.previews import webp
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb

_KEPT = 128


class Posters:
    """Decodes them when they are asked for, and keeps the last ones. For one thread at a time per job; what two of them
    do twice does no harm.
    """

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def poster(self, job: pb.Job) -> bytes | None:
        """A WebP file; None for a job without a video.

        Raises:
            ArtifactError: its file cannot be read.
        """
        if (known := self._kept.get(job.job_id)) is not None:
            return known
        videos = [each.name for each in job.result.artifacts if each.format == clip_pb2.ARTIFACT_FORMAT_MP4_H264]
        if not videos:
            return None
        with self._artifacts.open_file(job.job_id, videos[0]) as file:
            poster = webp(_first_frame(file))
        self._kept[job.job_id] = poster
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return poster


def _first_frame(file: Any) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]."""
    with av.open(file) as container:
        frame: NDArray[np.uint8] = next(container.decode(video=0)).to_ndarray(format="rgb24")
    return frame
