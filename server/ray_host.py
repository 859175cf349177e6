"""The engine core's end on a node of a Ray cluster: what the actor there does. Free of Ray itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from filelock import FileLock, Timeout

from cinecat.engines.messages import Answer, Call, CoreConfig, Failure, Notice

_LEAVE_SECONDS = 1.0

_LOG_BYTES = 2**16

_LOCK = "lock"


@dataclass(frozen=True)
class Hosted:
    """A core on a node.

    Attributes:
        node: its host name.
        pid: of the core there.
        folder: on the node, for files that calls name.
        version: of cinecat there.
    """

    node: str
    pid: int
    folder: str
    version: str


class CoreHost:
    """Spawns the engine core on this node and passes calls on. Files come and go in pieces, by name; they are in a
    folder of its own that ends with it, or at the latest when the next host starts on the node.

    `ask` and `receive` are for one caller, one at a time; `watch` and `log` wait beside them in threads of their own.
    """

    def __init__(self, body: Callable[..., None], config: CoreConfig) -> None:
        """
        Args:
            body: of the core's process, as `engines.process.run_core`.
        """
        self._folder, self._lock = _new_folder()
        self._frames: SharedMemory | None = None
        self._waiting = threading.Lock()
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._log, stderr = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_with_stderr, args=(stderr, body, theirs, config), name="cinecat-core", daemon=True
        )
        self._process.start()
        theirs.close()
        stderr.close()

    def hosted(self) -> Hosted:
        assert self._process.pid is not None
        return Hosted(socket.gethostname(), self._process.pid, str(self._folder), version("cinecat"))

    def receive(self) -> Answer | Notice:
        """What the core says next, which is a Failure of kind "died" where it says nothing any more."""
        try:
            said: Answer | Notice = self._connection.recv()
        except (EOFError, OSError):
            return self._death()
        return said

    def ask(self, call: Call) -> Answer | Notice:
        """The answer to a call whose paths are of this node."""
        with contextlib.suppress(OSError):  # where it is gone, `receive` says so
            self._connection.send(call)
        return self.receive()

    def watch(self) -> Failure:
        """Returns when the core has ended."""
        wait([self._process.sentinel])
        return self._death()

    def log(self) -> bytes:
        """What the core wrote to stderr since the last call, at least a byte; empty once it has ended."""
        return os.read(self._log.fileno(), _LOG_BYTES)

    def _death(self) -> Failure:
        with self._waiting:  # of two that wait for one process, the second would not learn its exit code
            self._process.join(5)
        message = f"the engine core (pid {self._process.pid}) died with exit code {self._process.exitcode}"
        return Failure("died", message, fatal=True)

    def write(self, name: str, piece: bytes, offset: int) -> None:
        """Puts a piece of a file where it belongs; one at 0 begins the file anew. Raises OSError."""
        with (self._folder / name).open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(piece)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A piece of a file, shorter at its end; empty beyond it and where there is no file. Raises OSError."""
        try:
            with (self._folder / name).open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except FileNotFoundError:
            return b""

    def discard(self, *names: str) -> None:
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def frame_buffer(self, size: int) -> str:
        """Name of shared memory of so many bytes, for one Decode after the other."""
        if self._frames is None or self._frames.size < size:
            self._close_frames()
            self._frames = SharedMemory(_memory_name(self._folder), create=True, size=size)
        return self._frames.name

    def read_frames(self, offset: int, size: int) -> bytes:
        assert self._frames is not None
        assert self._frames.buf is not None
        return bytes(self._frames.buf[offset : offset + size])

    def _close_frames(self) -> None:
        if self._frames is not None:
            self._frames.close()
            self._frames.unlink()
            self._frames = None

    def close(self) -> None:
        """Ends the core, and removes everything of this host from the node."""
        self._connection.close()
        self._process.join(_LEAVE_SECONDS)
        self._process.kill()
        self._close_frames()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()


def _with_stderr(stderr: Connection, body: Callable[..., None], *arguments: object) -> None:
    os.dup2(stderr.fileno(), 2)
    body(*arguments)


def _new_folder() -> tuple[Path, FileLock]:
    """A folder of one's own and the lock that tells others so, once those of hosts that were killed are removed."""
    base = Path(tempfile.gettempdir()) / f"cinecat-ray-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise PermissionError(f"{base} belongs to another user; remove it")
    with FileLock(base / _LOCK):
        for other in base.iterdir():
            if other.is_dir():
                _remove_abandoned(other)
        folder = base / uuid.uuid4().hex
        folder.mkdir()
        lock = FileLock(folder / _LOCK)
        lock.acquire()
    return folder, lock


def _remove_abandoned(folder: Path) -> None:
    try:
        with FileLock(folder / _LOCK, timeout=0):
            with contextlib.suppress(FileNotFoundError):
                memory = SharedMemory(_memory_name(folder))
                memory.close()
                memory.unlink()
            shutil.rmtree(folder, ignore_errors=True)
    except (Timeout, OSError):  # it is in use, or another host was quicker
        return


def _memory_name(folder: Path) -> str:
    return f"cinecat-{folder.name}"
