"""First frames of accepted jobs, on disk from acceptance to the end of the job."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class JobInputs:
    """Frames as PNG files named by job id. Every method blocks and may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, job_id: str, frame: NDArray[np.uint8]) -> None:
        """Keeps uint8 [height, width, 3], exactly."""
        staging = self._path(job_id).with_suffix(".tmp")
        try:
            with staging.open("wb") as file:
                Image.fromarray(frame).save(file, format="PNG", compress_level=1)
                file.flush()
                os.fsync(file.fileno())  # the database says that it is there
            staging.rename(self._path(job_id))
        except BaseException:
            staging.unlink(missing_ok=True)
            raise

    def load(self, job_id: str) -> NDArray[np.uint8]:
        with Image.open(self._path(job_id)) as image:
            return np.asarray(image)

    def delete(self, job_id: str) -> None:
        self._path(job_id).unlink(missing_ok=True)

    def keep_only(self, job_ids: Iterable[str]) -> None:
        """Removes what former servers left for jobs that were never accepted or have ended."""
        wanted = {self._path(job_id) for job_id in job_ids}
        for path in self._folder.iterdir():
            if path not in wanted:
                path.unlink(missing_ok=True)

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.png"
