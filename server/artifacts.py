"""The files that jobs leave behind, kept under `jobs/<job_id>/<name>` on any filesystem that fsspec can reach.

Every call but `stream` blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cinecat.plugins.durable import sync

CHUNK_BYTES = 256 * 1024

_JOB_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ArtifactError(RuntimeError):
    """An artifact could not be written, read or deleted; the message says which and why."""


class ArtifactNotFoundError(ArtifactError):
    """The job has no artifact of that name."""


class ArtifactFormat(enum.StrEnum):
    MP4_H264 = "mp4_h264"
    FRAMES_F32 = "frames_f32"

    @property
    def file_name(self) -> str:
        return {ArtifactFormat.MP4_H264: "clip.mp4", ArtifactFormat.FRAMES_F32: "frames.safetensors"}[self]

    @property
    def mime_type(self) -> str:
        return {ArtifactFormat.MP4_H264: "video/mp4", ArtifactFormat.FRAMES_F32: "application/octet-stream"}[self]


@dataclass(frozen=True, slots=True)
class WrittenArtifact:
    """A finished file in the scratch folder, not yet visible to anybody."""

    path: Path
    format: ArtifactFormat


@dataclass(frozen=True, slots=True)
class ArtifactInfo:
    """A published artifact. `sha256` is of the whole file, in hexadecimal."""

    name: str
    format: ArtifactFormat
    mime_type: str
    size_bytes: int
    sha256: str


class ArtifactStore:
    """Keeps artifacts under an fsspec URL such as `/srv/cinecat`, `s3://bucket/clips` or `memory://clips`.

    An artifact is either absent or complete: files grow in a local scratch folder and appear under their name in one
    rename. One store belongs to one server, because `clear_scratch` takes every unpublished file for a leftover.
    """

    def __init__(self, url: str) -> None:
        """Raises ArtifactError when the URL's filesystem is unknown or the scratch folder cannot be made."""
        with _explained(f"open the artifact store {url!r}"):
            try:
                fs, root = fsspec.core.url_to_fs(url)
            except (ValueError, ImportError) as error:
                raise ArtifactError(f"cannot open the artifact store {url!r}: {error}") from error
            self._fs: Any = fs
            self._root = str(root).rstrip("/")
            self._local = isinstance(fs, LocalFileSystem)
            self._readers: Counter[str] = Counter()
            if self._local:
                # Beside the jobs, so that publishing is a rename within one filesystem.
                self._scratch = Path(self._root) / ".scratch"
                self._scratch.mkdir(parents=True, exist_ok=True)
            else:
                self._scratch = Path(tempfile.mkdtemp(prefix="cinecat-artifacts-"))

    def scratch_path(self, job_id: str, format: ArtifactFormat) -> Path:
        """Returns a fresh local path for a file that `publish` can take. Nothing is created."""
        _check_job_id(job_id)
        return self._scratch / f"{job_id}.{secrets.token_hex(4)}.{format.file_name}"

    def clear_scratch(self) -> None:
        """Removes the unpublished files of a server that died. Call it before any job runs."""
        with _explained("clear the scratch folder"):
            for path in self._scratch.iterdir():
                path.unlink(missing_ok=True)

    def publish(self, job_id: str, written: WrittenArtifact) -> ArtifactInfo:
        """Moves a finished scratch file into the store, replacing an artifact of the same name.

        Raises ArtifactError; then neither the scratch file nor anything under the job is left behind.
        """
        name = written.format.file_name
        target = self._path(job_id, name)
        try:
            with _explained(f"store {name} of job {job_id}"):
                sha256, size = _digest(written.path)
                if self._local:
                    _rename_durably(written.path, Path(target))
                else:
                    self._upload(written.path, target)
        finally:
            with contextlib.suppress(OSError):
                written.path.unlink(missing_ok=True)
        return ArtifactInfo(name, written.format, written.format.mime_type, size, sha256)

    def size(self, job_id: str, name: str) -> int:
        """Returns the artifact's size in bytes. Raises ArtifactNotFoundError, ArtifactError."""
        path = self._path(job_id, name)
        with _explained(f"read {name} of job {job_id}"):
            return int(self._fs.size(path))

    def open_range(self, job_id: str, name: str, offset: int = 0) -> Iterator[bytes]:
        """Opens an artifact and returns its bytes from `offset` on, in chunks of at most 256 KiB.

        Raises ArtifactNotFoundError or ArtifactError, and ValueError when offset is not within 0 to the size.
        """
        size = self.size(job_id, name)
        if not 0 <= offset <= size:
            raise ValueError(f"offset {offset} is outside the artifact, which has {size} bytes")
        with _explained(f"read {name} of job {job_id}"):
            file = self._fs.open(self._path(job_id, name), "rb")
        return self._read_on(file, offset, f"read {name} of job {job_id}")

    async def stream(self, job_id: str, name: str, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """As `open_range`, read in threads; the job is not removed meanwhile."""
        with self.being_read(job_id):
            chunks = await asyncio.to_thread(self.open_range, job_id, name, offset)
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk

    def open_file(self, job_id: str, name: str) -> Any:
        """Opens an artifact as a binary file that can be sought in. Raises ArtifactNotFoundError, ArtifactError."""
        with _explained(f"read {name} of job {job_id}"):
            return self._fs.open(self._path(job_id, name), "rb")

    def delete_job(self, job_id: str) -> None:
        """Removes everything that a job left behind; a job without artifacts is no error."""
        folder = self._folder(job_id)
        with _explained(f"delete the artifacts of job {job_id}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm(folder, recursive=True)

    @contextlib.contextmanager
    def being_read(self, job_id: str) -> Iterator[None]:
        """Keeps `is_being_read` true for a job. Both are for one thread."""
        self._readers[job_id] += 1
        try:
            yield
        finally:
            self._readers[job_id] -= 1
            if not self._readers[job_id]:
                del self._readers[job_id]

    def is_being_read(self, job_id: str) -> bool:
        return job_id in self._readers

    def job_ids(self) -> list[str]:
        """The jobs that left something behind, from one listing. Raises ArtifactError."""
        try:
            with _explained("list the artifacts"):
                paths = self._fs.ls(f"{self._root}/jobs", detail=False)
        except ArtifactNotFoundError:
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in paths)
        return sorted({name for name in names if _JOB_ID.fullmatch(name)})

    def owner(self) -> str:
        """The identity of the job database whose artifacts these are; empty when none has claimed them."""
        try:
            with _explained("read the owner of the artifacts"):
                return bytes(self._fs.cat_file(f"{self._root}/owner")).decode(errors="replace").strip()
        except ArtifactNotFoundError:
            return ""

    def claim(self, identity: str) -> None:
        """Writes down whose artifacts these are. Raises ArtifactError."""
        with _explained("write the owner of the artifacts"):
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/owner", identity.encode())

    def close(self) -> None:
        """Removes the scratch folder of a store whose files live elsewhere."""
        if not self._local:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _folder(self, job_id: str) -> str:
        _check_job_id(job_id)
        return f"{self._root}/jobs/{job_id}"

    def _path(self, job_id: str, name: str) -> str:
        folder = self._folder(job_id)
        if not _NAME.fullmatch(name):
            raise ArtifactNotFoundError(f"{name!r} is not the name of an artifact")
        return f"{folder}/{name}"

    @staticmethod
    def _read_on(file: Any, offset: int, action: str) -> Iterator[bytes]:
        with file, _explained(action):
            file.seek(offset)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def _upload(self, source: Path, target: str) -> None:
        # Not every filesystem shows an upload only once it is whole; a rename is the one thing that all of them
        # do as a whole (or as a copy on the server, on object stores).
        folder, name = target.rsplit("/", 1)
        partial = f"{folder}/.{name}.{secrets.token_hex(4)}.part"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            self._fs.put_file(str(source), partial)
            if self._fs.exists(target):
                self._fs.rm_file(target)
            self._fs.mv(partial, target)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(partial)
            raise


def _check_job_id(job_id: str) -> None:
    if not _JOB_ID.fullmatch(job_id):
        raise ArtifactNotFoundError(f"{job_id!r} is not a job id, which is 32 hexadecimal digits")


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return sha256, file.tell()


def _rename_durably(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    sync(source)
    source.replace(target)
    sync(target.parent)


@contextlib.contextmanager
def _explained(action: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactNotFoundError(f"cannot {action}: there is no such file") from error
    except OSError as error:
        raise ArtifactError(f"cannot {action}: {error.strerror or error}") from error
    except ArtifactError:
        raise
    except Exception as error:  # filesystems of other people raise what they like
        raise ArtifactError(f"cannot {action}: {type(error).__name__}: {error}") from error
