"""What accepted jobs are made from, on disk from acceptance to the end of the job: first frames and styles' weights.

Weights are kept under their fingerprint, once for all jobs that wear them, as a second link to the style's own file (a
copy, where that lies on another filesystem). So a job finishes on the weights it was accepted with, after a restart
too, whoever replaces or removes the style meanwhile. A link cannot keep a file that is written in place; the engine
core compares the fingerprint when it reads the weights and refuses what has changed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cinecat.plugins.durable import sync
from cinecat.plugins.registry import UnknownStyle

NO_WEIGHTS: Mapping[str, Path] = MappingProxyType({})


class JobInputs:
    """Frames as PNG files named by job id, and weights. Every method blocks and may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._weights = folder / "styles"
        folder.mkdir(parents=True, exist_ok=True)
        # Jobs by the fingerprint of the weights that they wear.
        self._wearers: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def save(self, job_id: str, frame: NDArray[np.uint8], weights: Mapping[str, Path] = NO_WEIGHTS) -> None:
        """Keeps uint8 [height, width, 3], exactly, and LoRA files by their fingerprint. All of it, or nothing.

        Raises:
            UnknownStyle: a LoRA file is gone.
        """
        staging = self._path(job_id).with_suffix(".tmp")
        try:
            for fingerprint, path in weights.items():
                self._keep(job_id, fingerprint, path)
            with staging.open("wb") as file:
                Image.fromarray(frame).save(file, format="PNG", compress_level=1)
                file.flush()
                os.fsync(file.fileno())  # the database says that it is there
            staging.rename(self._path(job_id))
            sync(self._folder)
        except BaseException:
            staging.unlink(missing_ok=True)
            self.delete(job_id)
            raise

    def load(self, job_id: str) -> NDArray[np.uint8]:
        with Image.open(self._path(job_id)) as image:
            return np.asarray(image)

    def weights(self, fingerprint: str) -> Path | None:
        """The LoRA file that some job keeps under a fingerprint."""
        return _only_file(self._weights / fingerprint) if fingerprint else None

    def wearers(self, fingerprint: str) -> int:
        """Jobs that keep the weights of a fingerprint."""
        with self._lock:
            return len(self._wearers.get(fingerprint, ()))

    def delete(self, job_id: str) -> None:
        """Forgets a job; weights go with the last job that keeps them."""
        self._path(job_id).unlink(missing_ok=True)
        unused = []
        with self._lock:
            for fingerprint in [name for name, jobs in self._wearers.items() if job_id in jobs]:
                self._wearers[fingerprint].discard(job_id)
                if not self._wearers[fingerprint]:
                    del self._wearers[fingerprint]
                    unused.append(self._weights / f".{secrets.token_hex(4)}")
                    with contextlib.suppress(FileNotFoundError):
                        (self._weights / fingerprint).rename(unused[-1])
        for folder in unused:
            shutil.rmtree(folder, ignore_errors=True)

    def keep_only(self, jobs: Mapping[str, Iterable[str]]) -> None:
        """Removes what former servers left for jobs that were never accepted or have ended.

        Args:
            jobs: the fingerprints of the weights that each unfinished job wears.
        """
        wanted = {self._path(job_id) for job_id in jobs} | {self._weights}
        for path in self._folder.iterdir():
            if path not in wanted:
                path.unlink(missing_ok=True)
        with self._lock:
            self._wearers = {}
            for job_id, fingerprints in jobs.items():
                for fingerprint in filter(None, fingerprints):
                    self._wearers.setdefault(fingerprint, set()).add(job_id)
            for folder in self._weights.iterdir() if self._weights.exists() else ():
                if folder.name not in self._wearers:
                    shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, job_id: str, fingerprint: str, source: Path) -> None:
        with self._lock:
            # From here on nobody else's end removes the folder.
            self._wearers.setdefault(fingerprint, set()).add(job_id)
        folder = self._weights / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        if _only_file(folder) is not None:
            return
        staging = folder / f".{secrets.token_hex(4)}"
        try:
            _link_or_copy(source, staging)
        except FileNotFoundError as error:
            raise UnknownStyle(f"styles: {source.name} was removed just now; ask again") from error
        staging.rename(folder / source.name)
        sync(folder)
        sync(self._weights)

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.png"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another filesystem, or one without links
        shutil.copyfile(source, target)
        sync(target)


def _only_file(folder: Path) -> Path | None:
    try:
        return next((path for path in folder.iterdir() if not path.name.startswith(".")), None)
    except FileNotFoundError:
        return None
