"""Where the engine core saves what running jobs have come to. Losing a file costs steps, never a job."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path


class Checkpoints:
    """One file for each job, in a folder of their own. Methods block and may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, job_id: str) -> Path:
        """Of a job's file, whether or not it is there."""
        return self._folder / f"{job_id}.safetensors"

    def delete(self, job_id: str) -> None:
        """Forgets a job that has ended. Does not raise: the next start removes what is left."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob(f"{job_id}.*"):  # and the part of one whose core was killed in it
                path.unlink(missing_ok=True)

    def keep_only(self, job_ids: Collection[str]) -> None:
        """Removes the files of all other jobs, and halves of files."""
        wanted = {self.path(job_id) for job_id in job_ids}
        for path in self._folder.iterdir():
            if path not in wanted:
                path.unlink(missing_ok=True)
