"""Shared locks by which processes keep the engines that they use.

They are flock(2) on an entry's file `used`: the kernel drops them with the process, however it ends, and they work on
folders that may only be read. They belong to the open file, so that stores of one process heed each other too.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from types import TracebackType

from cinecat.engines.backends.store_entry import BROKEN, USED, BrokenEntry


class Lease:
    """An entry's file `used`, open, with or without a lock on it. Ends with `close`, or as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Raises BrokenEntry when it is missing or no file, and OSError."""
        self._path = folder / USED
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in BROKEN:
                raise
            raise BrokenEntry(f"{USED} cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BrokenEntry(f"{USED} is not a file")
        self._file = os.fdopen(descriptor, "rb", buffering=0)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def share(self) -> bool:
        """Keeps the entry from being pruned; False when it is gone or going."""
        return self._lock(fcntl.LOCK_SH) and self._is_in_place()

    def claim(self) -> bool:
        """Keeps others from using the entry; False when somebody does."""
        return self._lock(fcntl.LOCK_EX)

    def touch(self) -> None:
        """Says that the entry is used now. Raises OSError."""
        os.utime(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.lstat())
        except FileNotFoundError:
            return False
