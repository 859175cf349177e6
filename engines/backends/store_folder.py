"""Where engines are kept, and what is told when they cannot be."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cinecat.engines.errors import EngineCacheError

DEFAULT_MAX_GIB = 200.0
"""Some six engines of 14B in bfloat16."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL_BYTES = 2**20


def default_engine_folder() -> Path:
    """Where engines are kept when nobody says where."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cinecat" / "engines"


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what the file system says about the folder into an EngineCacheError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EngineCacheError(tell_full(folder, error)) from error
        if error.errno in _FORBIDDEN:
            problem = (
                "may not be used by this user; let it read and write there, or set engine_cache_dir to another one"
            )
        else:
            problem = "cannot be used; set engine_cache_dir to a folder on a local disk"
        raise EngineCacheError(f"engine_cache_dir: {folder} {problem} ({error})") from error


def tell_full(folder: Path, error: Exception) -> str:
    """What to do about a full disk."""
    return (
        f"engine_cache_dir: the disk of {folder} is full; free space on it, remove engines with: cinecat engines prune "
        f"--engine-cache-gib N, lower engine_cache_gib, or set engine_cache_dir to a folder on a larger disk ({error})"
    )


def is_full(folder: Path, error: Exception) -> bool:
    """Whether a full disk is behind an error. Libraries tell it in types of their own, so the disk is asked too."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return shutil.disk_usage(folder).free < _FULL_BYTES
