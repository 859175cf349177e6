"""Compiled engines on disk, shared by every process that uses the folder.

    <folder>/<digest>/                      an engine, whole; see `store_entry.py`
    <folder>/.building-<digest>-<random>/   one that is being built
    <folder>/.removed-<digest>-<random>/    one that is being removed
    <folder>/.locks/<digest>.lock           held while one is built or removed; never unlinked, or two could hold it

An engine appears and goes by one rename, under its key's lock, which the kernel drops with the process. What a killed
process left behind has a name of its own, is never taken for an engine, and is removed by the next build or prune that
gets its lock. Nothing else in the folder is touched. An engine that a process took is under a shared lock until
`release`, so that pruning leaves it where it is; only what is found damaged is removed from under anybody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cinecat.engines.backends.store_entry import (
    CHECKED,
    FILES,
    MANIFEST,
    USED,
    BrokenEntry,
    EngineEntry,
    Manifest,
    compare_checksums,
    describe_files,
    inspect_entry,
    write_checked,
)
from cinecat.engines.backends.store_events import Outcome, StoreEvent, log_event
from cinecat.engines.backends.store_folder import explained, is_full, tell_full
from cinecat.engines.backends.store_key import EngineKey
from cinecat.engines.backends.store_lease import Lease
from cinecat.engines.errors import EngineCacheError
from cinecat.plugins.durable import sync

_ENGINE = re.compile(r"[0-9a-f]{64}")
_LEFTOVER = re.compile(r"\.(building|removed)-([0-9a-f]{64})-[0-9a-f]{16}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What `prune` did.

    Attributes:
        removed: engines that were removed.
        kept_bytes: of those that stay.
        in_use: engines that would have gone, and are used or built by a process.
    """

    removed: tuple[EngineEntry, ...]
    kept_bytes: int
    in_use: tuple[EngineEntry, ...]


class EngineStore:
    """Engines by their keys. Threads may share one; processes share the folder.

    Every method blocks, and raises EngineCacheError when the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int | None, announce: Callable[[StoreEvent], None] = log_event) -> None:
        """The folder is made by the first build.

        Args:
            max_bytes: what a build leaves in the folder at most, together with what is in use; None is no limit.
            announce: is told what happens, in the thread in which it does.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._announce = announce
        self._leases: dict[str, Lease] = {}
        self._guard = threading.Lock()

    def get(self, key: EngineKey) -> Path | None:
        """The folder of an engine's files, and None when there is none that can be used. The files must not be
        written to; they stay until `release`.

        Sizes and names are always checked, checksums where they were not computed since the file last changed. What is
        damaged is removed.
        """
        with explained(self._folder):
            files, problems = self._take(key)
            if problems:
                files = self._look_again(key, problems)
        self._tell(Outcome.HIT if files else Outcome.MISS, key)
        return files

    def build(self, key: EngineKey, make: Callable[[Path], None]) -> Path:
        """The folder of an engine's files. Where there are none, `make` writes them into the empty folder that it is
        given. Of several callers, in any process, one does and the others wait for it.

        Raises:
            EngineCacheError: also when `make` fails because the disk is full.
            Exception: what `make` raises; the next caller tries again.
        """
        if files := self.get(key):
            return files
        with self._lock(key):
            with explained(self._folder):
                if files := self._take_or_discard(key):
                    self._tell(Outcome.HIT, key)
                    return files
                self._sweep(key.digest)
            staging = self._folder / f".building-{key.digest}-{secrets.token_hex(8)}"
            try:
                seconds = self._run(make, staging)
                with explained(self._folder):
                    size = self._publish(key, staging, seconds)
            finally:
                _delete(staging)
            self._announce(StoreEvent(Outcome.BUILT, key.digest, key.describe(), seconds, size))
            with explained(self._folder):
                files, problems = self._take(key)
        if files is None:
            raise EngineCacheError(f"{self._folder}: a new engine cannot be read back: {'; '.join(problems)}")
        try:
            # Without the lock: others may take the new engine while old ones go.
            self.prune(self._max_bytes)
        except EngineCacheError as error:
            log.warning("engines were not pruned: %s", error)
        return files

    def release(self, key: EngineKey) -> None:
        """Lets an engine go that this store gave out, so that it may be pruned."""
        with self._guard:
            lease = self._leases.pop(key.digest, None)
        if lease is not None:
            lease.close()

    def close(self) -> None:
        """Lets all engines go."""
        with self._guard:
            leases, self._leases = self._leases, {}
        for lease in leases.values():
            lease.close()

    def entries(self) -> list[EngineEntry]:
        """All that is in the place of an engine, the longest unused first."""
        with explained(self._folder):
            folders = [path for path in self._names() if _ENGINE.fullmatch(path.name)]
            # One that went while it was looked at is no broken one.
            found = [
                entry for entry in map(inspect_entry, folders) if not entry.problems or os.path.lexists(entry.folder)
            ]
        return sorted(found, key=lambda entry: (entry.last_used, entry.digest))

    def verify(self, entry: EngineEntry, advance: Callable[[int], None] = lambda size: None) -> list[str]:
        """What is wrong with an entry, all checksums included; what is damaged will be built anew when it is asked for.

        Args:
            advance: is told the bytes that were read, as they are.
        """
        with explained(self._folder):
            return list(entry.problems) or compare_checksums(entry, advance)

    def remove(self, entry: EngineEntry) -> bool:
        """Removes an entry; False when a process uses or builds it."""
        with explained(self._folder), self._lock_if_free(entry.digest) as locked:
            if not locked:
                return False
            if entry.problems and not inspect_entry(entry.folder).problems:
                return False  # it was built anew
            with contextlib.ExitStack() as claim:
                with contextlib.suppress(BrokenEntry):  # then nobody can use it
                    if not claim.enter_context(Lease(entry.folder)).claim():
                        return False
                if os.path.lexists(entry.folder):
                    self._set_aside(entry.folder)
            return True

    def prune(self, max_bytes: int | None) -> Pruned:
        """Removes what killed processes left, what is damaged, and then the longest unused engines until the others
        have `max_bytes` at most; None has no limit."""
        with explained(self._folder):
            self._sweep(None)
        entries = self.entries()
        kept = sum(entry.size_bytes for entry in entries)
        removed: list[EngineEntry] = []
        in_use: list[EngineEntry] = []
        for entry in sorted(entries, key=lambda entry: not entry.problems):
            if not entry.problems and (max_bytes is None or kept <= max_bytes):
                continue
            if not self.remove(entry):
                in_use.append(entry)
                continue
            kept -= entry.size_bytes
            removed.append(entry)
            outcome = Outcome.DAMAGED if entry.problems else Outcome.EVICTED
            detail = "; ".join(entry.problems) or (entry.manifest.key.describe() if entry.manifest else "")
            self._announce(StoreEvent(outcome, entry.digest, detail, size_bytes=entry.size_bytes))
        return Pruned(tuple(removed), kept, tuple(in_use))

    def _take(self, key: EngineKey) -> tuple[Path | None, list[str]]:
        """The files, now in use by this process; or what is wrong with them; or neither, when there is no entry."""
        folder = self._folder / key.digest
        try:
            lease = Lease(folder)
        except BrokenEntry as error:
            return None, [str(error)] if os.path.lexists(folder) else []
        with contextlib.ExitStack() as unused:
            unused.callback(lease.close)
            if not lease.share():
                return None, []  # it is being removed, or was
            entry = inspect_entry(folder)
            problems = list(entry.problems) or compare_checksums(entry, self._checking(key, entry), every=False)
            if problems:
                return None, problems
            with contextlib.suppress(OSError):  # a folder that may not be written to is as good
                lease.touch()
            unused.pop_all()
        with self._guard:
            before = self._leases.pop(key.digest, None)
            self._leases[key.digest] = lease
        if before is not None:
            before.close()
        return entry.files, []

    def _look_again(self, key: EngineKey, problems: list[str]) -> Path | None:
        """Removes what was found damaged, unless it was built anew meanwhile."""
        try:
            with self._lock_if_free(key.digest) as locked:
                # Whoever holds the lock will look at it too.
                return self._take_or_discard(key) if locked else None
        except OSError:
            # It stays, for example on a read-only disk, and is not used.
            self._tell(Outcome.DAMAGED, key, "; ".join(problems))
            return None

    def _take_or_discard(self, key: EngineKey) -> Path | None:
        """Removes what is damaged. The caller holds the key's lock."""
        files, problems = self._take(key)
        if problems:
            self.release(key)
            self._set_aside(self._folder / key.digest)
            self._tell(Outcome.DAMAGED, key, "; ".join(problems))
        return files

    def _run(self, make: Callable[[Path], None], staging: Path) -> float:
        """Seconds that it took. An error that comes of a full disk is explained, whatever its type."""
        files = staging / FILES
        with explained(self._folder):
            files.mkdir(parents=True)
        began = time.perf_counter()
        try:
            make(files)
        except Exception as error:
            if is_full(self._folder, error):
                raise EngineCacheError(tell_full(self._folder, error)) from error
            raise
        return time.perf_counter() - began

    def _publish(self, key: EngineKey, staging: Path, seconds: float) -> int:
        """Makes a new engine appear; returns the bytes of its files."""
        _sync_all(staging)
        try:
            files, stamps = describe_files(staging / FILES)
        except BrokenEntry as error:
            raise EngineCacheError(f"engine {key.describe()} cannot be stored: {error}") from error
        (staging / MANIFEST).write_text(Manifest(key, time.time(), seconds, files).to_json())
        (staging / USED).touch()
        write_checked(staging, stamps)
        for name in (MANIFEST, USED, CHECKED, "."):
            sync(staging / name)
        target = self._folder / key.digest
        staging.rename(target)
        try:
            sync(self._folder)
        except OSError:
            target.rename(staging)  # what is reported as failed must not appear
            raise
        return sum(file.size_bytes for file in files.values())

    def _set_aside(self, folder: Path) -> None:
        """Removes an entry whole. The caller holds its lock."""
        removed = self._folder / f".removed-{folder.name}-{secrets.token_hex(8)}"
        folder.rename(removed)
        sync(self._folder)
        _delete(removed)

    def _sweep(self, locked: str | None) -> None:
        """Removes what killed processes left; `locked` is the digest whose lock the caller holds."""
        for path in self._names():
            leftover = _LEFTOVER.fullmatch(path.name)
            if leftover is None:
                continue
            if leftover[1] == "removed" or leftover[2] == locked:
                _delete(path)
                continue
            with self._lock_if_free(leftover[2]) as free:
                if free:
                    _delete(path)

    def _names(self) -> list[Path]:
        return list(self._folder.iterdir()) if self._folder.exists() else []

    @contextlib.contextmanager
    def _lock(self, key: EngineKey) -> Iterator[None]:
        with explained(self._folder):
            lock = self._new_lock(key.digest)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._tell(Outcome.WAITING, key)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _lock_if_free(self, digest: str) -> Iterator[bool]:
        lock = self._new_lock(digest)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _new_lock(self, digest: str) -> FileLock:
        locks = self._folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{digest}.lock")

    def _checking(self, key: EngineKey, entry: EngineEntry) -> Callable[[int], None]:
        told = False

        def advance(size: int) -> None:
            nonlocal told
            if not told:
                told = True
                self._announce(StoreEvent(Outcome.CHECKING, key.digest, key.describe(), size_bytes=entry.size_bytes))

        return advance

    def _tell(self, outcome: Outcome, key: EngineKey, detail: str = "") -> None:
        self._announce(StoreEvent(outcome, key.digest, detail or key.describe()))


def _sync_all(root: Path) -> None:
    """Files and folders; what is neither is refused later."""
    for folder, _, names in os.walk(root, topdown=False):
        for path in [Path(folder, name) for name in names]:
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(folder))


def _delete(path: Path) -> None:
    """As far as it goes; what stays has a name that the next sweep knows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
