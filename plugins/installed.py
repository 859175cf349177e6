"""The folder that a server installs styles into: every style in it is whole, and never changes.

    <root>/<name>@<version>/style.toml and its files    a published style, a source like any other folder
    <root>/.incoming-<random>/                          one that is being uploaded
    <root>/.removed-<random>/                           one that is being removed

A style is published and removed by one rename of its folder, so that whoever looks finds all of it or nothing. What is
published is never written again: other content is another version. Jobs keep the weights they were accepted with on
their own (`server/inputs.py`), so that a removal need not wait for them. The root belongs to one server; what a killed
one left behind in folders with a dot is removed by `clear_leftovers`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from cinecat.plugins.durable import sync
from cinecat.plugins.errors import LoraError, StyleError, quoted
from cinecat.plugins.finite import check_finite
from cinecat.plugins.lora import LoraHeader, inspect_lora
from cinecat.plugins.manifest import MANIFEST_NAME, MAX_PREVIEW_BYTES, StyleManifest, write_manifest
from cinecat.plugins.safetensors_header import MAX_HEADER_BYTES
from cinecat.plugins.sources import FolderSource, Origin

_INCOMING = ".incoming-"
_REMOVED = ".removed-"

# Where and how previews begin.
_MAGIC: dict[str, tuple[int, bytes]] = {
    ".png": (0, b"\x89PNG\r\n\x1a\n"),
    ".jpg": (0, b"\xff\xd8\xff"),
    ".jpeg": (0, b"\xff\xd8\xff"),
    ".webp": (8, b"WEBP"),
    ".mp4": (4, b"ftyp"),
    ".webm": (0, b"\x1a\x45\xdf\xa3"),
}


class UploadError(StyleError):
    """Bytes that are not the style that was announced.

    Attributes:
        part: "weights", "preview" or "sha256".
        problem: what is wrong with it, and what to do.
    """

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(part, problem)
        self.part = part
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.part}: {self.problem}"


class VersionTaken(StyleError):
    """There is a style of that name and version."""


class InstalledStyles:
    """Styles that come and go by upload and removal. Every method blocks and may raise OSError."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    @property
    def source(self) -> FolderSource:
        return FolderSource(self._root, Origin.INSTALLED)

    def clear_leftovers(self) -> None:
        """Removes what a former server began and did not finish."""
        for folder in self._root.iterdir():
            if folder.name.startswith((_INCOMING, _REMOVED)):
                shutil.rmtree(folder, ignore_errors=True)

    def begin(self, max_bytes: int) -> StagedStyle:
        """A place for the files of a style of at most `max_bytes`; use it as a context manager."""
        folder = self._root / f"{_INCOMING}{secrets.token_hex(8)}"
        folder.mkdir(parents=True)
        return StagedStyle(self._root, folder, max_bytes)

    def folder(self, name: str, version: str) -> Path | None:
        """Where a style was published, whether or not it can still be offered."""
        label = f"{name}@{version}"
        folders = self._root.iterdir() if self._root.is_dir() else ()
        return next((folder for folder in folders if folder.name == label), None)

    def remove(self, folder: Path) -> None:
        """Takes a published style away.

        Raises:
            FileNotFoundError: it is not there any more.
        """
        removed = self._root / f"{_REMOVED}{secrets.token_hex(8)}"
        folder.rename(removed)
        sync(self._root)
        shutil.rmtree(removed, ignore_errors=True)


class StagedStyle:
    """A style that arrives: its files are written here, checked, and published whole. Leaving the block without
    `publish` leaves nothing behind.

    Attributes:
        sha256: of the weights that have arrived, in hexadecimal.
        size_bytes: of the weights that have arrived.
        preview: the bytes of it that have arrived.
    """

    def __init__(self, root: Path, folder: Path, max_bytes: int) -> None:
        self._root = root
        self._folder = folder
        self._max_bytes = max_bytes
        self._weights: BinaryIO = (folder / "weights").open("wb")
        self.preview = b""
        self._start = b""
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def __enter__(self) -> StagedStyle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer
            self._weights.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write_weights(self, data: bytes) -> None:
        """Takes in the next bytes of the LoRA file.

        Raises:
            UploadError: the file is too large, or begins unlike a safetensors file.
        """
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise UploadError("weights", f"has more than {self._max_bytes} bytes, which is all that may be sent")
        if len(self._start) < 9:
            self._start = (self._start + data)[:9]
            if len(self._start) == 9:
                _check_start(self._start)
        self._digest.update(data)
        self._weights.write(data)

    def write_preview(self, data: bytes) -> None:
        """Takes in the next bytes of the preview file.

        Raises:
            UploadError: the file is too large.
        """
        self.preview += data
        if len(self.preview) > MAX_PREVIEW_BYTES:
            raise UploadError("preview", f"has more than {MAX_PREVIEW_BYTES} bytes; make it smaller")

    def check(self, manifest: StyleManifest) -> LoraHeader:
        """Reads the file that has arrived: its checksum, its header and every number in it.

        Raises:
            UploadError: naming what is wrong.
        """
        self._weights.flush()
        if manifest.sha256 and manifest.sha256.lower() != self.sha256:
            raise UploadError(
                "sha256",
                f"is {manifest.sha256[:12]}..., but the file that arrived has {self.sha256[:12]}...; send it again",
            )
        if bool(manifest.preview) != bool(self.preview):
            missing = "was announced and did not arrive" if manifest.preview else "arrived and was not announced"
            raise UploadError("preview", missing)
        if manifest.preview and not _is_preview(Path(manifest.preview).suffix, self.preview):
            raise UploadError("preview", f"is not what its name {quoted(manifest.preview)} says; name it by its format")
        # Messages name the file as the manifest does.
        path = self._folder / manifest.weights
        Path(self._weights.name).replace(path)
        try:
            header = inspect_lora(path)
            check_finite(path)
        except LoraError as error:
            raise UploadError("weights", f"{error}") from error
        return header

    def publish(self, manifest: StyleManifest) -> Path:
        """Makes a checked style appear; returns its folder.

        Raises:
            VersionTaken: there is one in its place.
        """
        os.fsync(self._weights.fileno())
        if manifest.preview:
            _write(self._folder / manifest.preview, self.preview)
        described = replace(manifest, sha256=self.sha256)
        _write(self._folder / MANIFEST_NAME, write_manifest(described).encode())
        sync(self._folder)
        target = self._root / f"{manifest.name}@{manifest.version}"
        try:
            self._folder.rename(target)
        except OSError as error:
            if target.exists():
                taken = f"{manifest.name} {manifest.version} is installed; give it a new version"
                raise VersionTaken(taken) from error
            raise
        try:
            sync(self._root)
        except OSError:
            target.rename(self._folder)  # what is reported as failed must not appear
            raise
        return target


def _is_preview(suffix: str, data: bytes) -> bool:
    """Whether a file begins as files of that suffix do."""
    offset, magic = _MAGIC[suffix]
    return data[offset : offset + len(magic)] == magic


def _check_start(start: bytes) -> None:
    """Refuses what cannot become a safetensors file by its first 9 bytes, before the rest is sent."""
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise UploadError(
            "weights",
            f"is not a safetensors file: its header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed",
        )
    if start[8:] != b"{":
        raise UploadError("weights", "is not a safetensors file; convert it to safetensors")


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
