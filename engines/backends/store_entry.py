"""One stored engine on disk, read without trusting anything in it.

    <store>/<digest>/manifest.json    what it is, with the size and SHA-256 of every file
    <store>/<digest>/engine/          the files themselves, as the backend wrote them
    <store>/<digest>/used             touched whenever it is used; processes that use it hold a shared lock on it
    <store>/<digest>/checked.json     the checksums that were computed already, by the files' stat

Checksums find decay, not malice: whoever may write to the folder may write a manifest that fits. Nothing here runs or
unpickles what it reads; a backend that loads an engine does run it, so the folder belongs to those who run the server.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cinecat.engines.backends.store_key import EngineKey

MANIFEST = "manifest.json"
FILES = "engine"
USED = "used"
CHECKED = "checked.json"
VERSION = 1

_MAX_MANIFEST_BYTES = 64 * 2**20
# The year 9892: what comes after it has no date on some calendars.
_FAR_FUTURE = 250_000_000_000
_CHUNK = 4 * 2**20

# What the disk or a stranger did to an entry. Any other error (too many open files, no permission) says nothing about
# it, and must not cost anybody an engine that took minutes to build.
BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO, errno.EBADMSG)

Stamp = tuple[int, int, int, int, str]
"""Size in bytes, mtime and ctime in nanoseconds, inode, and the SHA-256 of the content at that time."""


class BrokenEntry(Exception):
    """A part of an entry that is not what it should be; the message says which and why."""


@dataclass(frozen=True)
class StoredFile:
    """What the manifest says of a file; `sha256` in hexadecimal."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an entry is.

    Attributes:
        key: its folder is named by the key's digest.
        created: Unix time in seconds.
        build_seconds: what it took to build.
        files: by their paths below `engine/`, with slashes.
    """

    key: EngineKey
    created: float
    build_seconds: float
    files: Mapping[str, StoredFile]

    def to_json(self) -> str:
        value = {
            "version": VERSION,
            "key": self.key.fields,
            "created": self.created,
            "build_seconds": self.build_seconds,
            "files": {name: vars(file) for name, file in sorted(self.files.items())},
        }
        return json.dumps(value, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Raises BrokenEntry: it is not what `to_json` writes."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BrokenEntry("manifest.json is not JSON") from error
        if not isinstance(value, dict) or value.get("version") != VERSION or value["version"] is True:
            version = value.get("version") if isinstance(value, dict) else None
            raise BrokenEntry(f"manifest.json has version {version!r:.40}; this Cinecat reads version {VERSION}")
        files = value.get("files")
        if not isinstance(files, dict) or not files:
            raise BrokenEntry("manifest.json lists no files")
        try:
            return cls(
                EngineKey.from_json(value.get("key")),
                _number(value.get("created")),
                _number(value.get("build_seconds")),
                {_inner_path(name): _stored_file(name, file) for name, file in files.items()},
            )
        except (ValueError, RecursionError) as error:
            raise BrokenEntry(f"manifest.json: {error}") from error


@dataclass(frozen=True)
class EngineEntry:
    """What is in the place of an engine.

    Attributes:
        folder: its folder in the store.
        manifest: None where it cannot be read.
        size_bytes: of the files that are there.
        last_used: Unix time in seconds.
        problems: why it cannot be used, by all that is known without reading its files; empty when it can.
    """

    folder: Path
    manifest: Manifest | None
    size_bytes: int
    last_used: float
    problems: tuple[str, ...]

    @property
    def digest(self) -> str:
        return self.folder.name

    @property
    def files(self) -> Path:
        """Where the backend's files are."""
        return self.folder / FILES


def inspect_entry(folder: Path) -> EngineEntry:
    """Looks at everything but the content of the files.

    Raises:
        OSError: it could not be looked at, which says nothing about the entry.
    """
    problems: list[str] = []
    manifest: Manifest | None = None
    found: dict[str, os.stat_result] = {}
    last_used = 0.0
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return EngineEntry(folder, None, 0, 0.0, (f"{folder.name} is not a folder",))
        found, problems = _walk(folder / FILES)
        last_used = min(max(0.0, _regular(folder / USED).st_mtime), _FAR_FUTURE)
        manifest = _read_manifest(folder)
        problems += _differences(manifest, found) or _known_damage(manifest, found, folder)
    except BrokenEntry as error:
        problems.append(str(error))
    except OSError as error:
        if error.errno not in BROKEN:
            raise
        problems.append(_reason(error, folder))
    return EngineEntry(folder, manifest, sum(file.st_size for file in found.values()), last_used, tuple(problems))


def compare_checksums(
    entry: EngineEntry, advance: Callable[[int], None] = lambda size: None, *, every: bool = True
) -> list[str]:
    """Compares the files of an entry without problems with its manifest, and notes down their checksums.

    Args:
        advance: is told the bytes that were read, as they are.
        every: read all files; otherwise those only that have changed since their checksums were noted down.

    Returns:
        what is wrong, in words.

    Raises:
        OSError: a file could not be read, which says nothing about the entry.
    """
    if entry.manifest is None:
        return list(entry.problems)
    before = _read_checked(entry.folder)
    checked: dict[str, Stamp] = {}
    problems = []
    for name, file in entry.manifest.files.items():
        path = entry.files / name
        try:
            status = _regular(path)
            sha256 = None if every else _known(before, name, status)
            checked[name] = _stamp(status, sha256 or checksum(path, advance))
        except BrokenEntry as error:
            problems.append(str(error))
        except OSError as error:
            if error.errno not in BROKEN:
                raise
            problems.append(_reason(error, entry.folder))
        else:
            if checked[name][4] != file.sha256:
                problems.append(_damaged(name))
    if checked != before:
        # Where the folder cannot be written they are computed again next time.
        with contextlib.suppress(OSError):
            write_checked(entry.folder, checked)
    return problems


def describe_files(root: Path) -> tuple[dict[str, StoredFile], dict[str, Stamp]]:
    """Reads the files of a new engine, for its manifest and for `write_checked`.

    Raises:
        BrokenEntry: there is none, or something that is neither file nor folder.
        OSError: a file cannot be read.
    """
    found, problems = _walk(root)
    if problems or not found:
        raise BrokenEntry("; ".join(problems) or "the build wrote no file")
    files = {name: StoredFile(found[name].st_size, checksum(root / name)) for name in sorted(found)}
    return files, {name: _stamp((root / name).lstat(), file.sha256) for name, file in files.items()}


def checksum(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file that is no link, in hexadecimal; `advance` is told the bytes that were read. Raises OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            advance(size)
    return digest.hexdigest()


def write_checked(folder: Path, stamps: Mapping[str, Stamp]) -> None:
    """Notes down the checksums of an entry's files. Raises OSError."""
    staging = folder / f"{CHECKED}.{secrets.token_hex(8)}"
    try:
        staging.write_text(json.dumps(stamps))
        staging.replace(folder / CHECKED)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


def _read_checked(folder: Path) -> dict[str, Stamp]:
    try:
        value = json.loads(_read(folder / CHECKED))
    except (OSError, ValueError, RecursionError, BrokenEntry):
        return {}
    if not isinstance(value, dict):
        return {}
    return {
        name: (stamp[0], stamp[1], stamp[2], stamp[3], stamp[4])
        for name, stamp in value.items()
        if isinstance(stamp, list) and len(stamp) == 5
    }


def _read_manifest(folder: Path) -> Manifest:
    manifest = Manifest.from_json(_read(folder / MANIFEST))
    if manifest.key.digest != folder.name:
        raise BrokenEntry("manifest.json is of another engine: its key has another digest")
    return manifest


def _read(path: Path) -> bytes:
    if (size := _regular(path).st_size) > _MAX_MANIFEST_BYTES:
        raise BrokenEntry(f"{path.name} has {size} bytes; at most {_MAX_MANIFEST_BYTES} are read")
    return path.read_bytes()


def _regular(path: Path) -> os.stat_result:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BrokenEntry(f"{path.name} is not a file")
    return status


def _walk(root: Path) -> tuple[dict[str, os.stat_result], list[str]]:
    """The files below a folder by their paths, and what is there and should not be. Follows no link."""
    found: dict[str, os.stat_result] = {}
    problems: list[str] = []
    if not stat.S_ISDIR(root.lstat().st_mode):
        return found, [f"{root.name} is not a folder"]
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(f"{name}/")
                elif stat.S_ISREG(status.st_mode):
                    found[name] = status
                else:
                    problems.append(f"{name} is a link or a device; only files and folders are allowed")
    return found, problems


def _differences(manifest: Manifest, found: Mapping[str, os.stat_result]) -> list[str]:
    listed = manifest.files
    sizes = [
        f"{name} has {found[name].st_size} bytes, the manifest says {file.size_bytes}"
        for name, file in listed.items()
        if name in found and found[name].st_size != file.size_bytes
    ]
    missing = [f"{name} is missing" for name in listed if name not in found]
    extra = [f"{name} is not in the manifest" for name in sorted(found) if name not in listed]
    return sizes + missing + extra


def _known_damage(manifest: Manifest, found: Mapping[str, os.stat_result], folder: Path) -> list[str]:
    checked = _read_checked(folder)
    return [
        _damaged(name)
        for name, file in manifest.files.items()
        if _known(checked, name, found[name]) not in (None, file.sha256)
    ]


def _known(checked: Mapping[str, Stamp], name: str, status: os.stat_result) -> str | None:
    """The SHA-256 of a file, where it was computed since the file last changed."""
    stamp = checked.get(name)
    return stamp[4] if stamp is not None and stamp == _stamp(status, stamp[4]) else None


def _damaged(name: str) -> str:
    return f"{name} is damaged: its SHA-256 is not the one that it was stored with"


def _inner_path(name: str) -> str:
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r:.80} is not a path inside the entry")
    return name


def _stored_file(name: str, value: Any) -> StoredFile:
    size, sha256 = (value.get("size_bytes"), value.get("sha256")) if isinstance(value, dict) else (None, None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or not isinstance(sha256, str):
        raise ValueError(f"{name!r:.80} has no size and checksum")
    return StoredFile(size, sha256)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _FAR_FUTURE:
        raise ValueError("created and build_seconds are seconds")
    return float(value)


def _stamp(status: os.stat_result, sha256: str) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sha256


def _reason(error: OSError, folder: Path) -> str:
    path = Path(str(error.filename or folder))
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    return f"{name} is missing" if error.errno == errno.ENOENT else f"{name} cannot be read: {error.strerror}"
