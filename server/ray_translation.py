"""Calls of the front in the words of a node: files of one machine become files of the other.

Nothing needs a file system that machines share: styles and checkpoints travel by content, what Save and the profiler
write comes back, and so do frames.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from cinecat.engines.messages import (
    Answer,
    Call,
    Condition,
    Decode,
    Decoded,
    Failure,
    Notice,
    Save,
    Saved,
    Step,
    StyleUse,
    Warm,
)
from cinecat.plugins.durable import sync

log = logging.getLogger(__name__)

_PIECE_BYTES = 16 * 2**20
_STYLES_BYTES = 8 * 2**30

_CHECKPOINT, _SAVED, _PROFILE = "checkpoint.safetensors", "saved.safetensors", "profile.json.gz"


class Translation:
    """Has calls answered by a `CoreHost` elsewhere."""

    def __init__(
        self,
        host: Callable[..., Any],
        folder: Path,
        *,
        styles_bytes: int = _STYLES_BYTES,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        """
        Args:
            host: runs a method of the CoreHost, given by name with its arguments.
            folder: the host's.
            styles_bytes: of the styles that stay there at most, beside those of the call.
            piece_bytes: that travel at once.
        """
        self._host = host
        self._folder = folder
        self._styles_bytes = styles_bytes
        self._piece_bytes = piece_bytes
        self._styles: OrderedDict[str, int] = OrderedDict()  # bytes by name there, least recently used first

    def answer(self, call: Call) -> Answer | Notice:
        """What the core says to a call of the front. Raises what `host` raises, but for OSError."""
        try:
            return self._translated(call)
        except OSError as error:  # of this machine or, wrapped, of the node
            return Failure("request", in_words(error))

    def _translated(self, call: Call) -> Answer | Notice:
        started = time.perf_counter()
        match call:
            case Condition(shot, checkpoint):
                worn = replace(shot, styles=tuple(self._sent(shot.styles)))
                if not (checkpoint and self._send(Path(checkpoint), _CHECKPOINT)):
                    return self._ask(Condition(worn))
                said = self._ask(Condition(worn, self._path(_CHECKPOINT)))
                self._host("discard", _CHECKPOINT)
                return said
            case Warm(style):
                return self._ask(Warm(*self._sent([style])))
            case Save(job_id, path):
                said = self._ask(Save(job_id, self._path(_SAVED)))
                if isinstance(said, Saved):
                    self._fetch(_SAVED, Path(path), durable=True)
                    said = replace(said, seconds=time.perf_counter() - started)
                return said
            case Step(profile=path) if path:
                said = self._ask(replace(call, profile=self._path(_PROFILE)))
                try:
                    self._fetch(_PROFILE, Path(path))
                except OSError as error:
                    log.error("profile_dir: %s cannot be written: %s", path, in_words(error))
                return said
            case Decode(_, buffer):
                return self._decoded(call, buffer, started)
            case _:
                return self._ask(call)

    def _sent(self, styles: Sequence[StyleUse]) -> Iterator[StyleUse]:
        """The same styles with paths on the node, where they are from now on."""
        names = [f"{style.fingerprint}{Path(style.path).suffix}" for style in styles]
        for style, name in zip(styles, names, strict=True):
            if name not in self._styles:
                size = Path(style.path).stat().st_size
                self._make_room(size, keep=names)
                self._send(Path(style.path), name)
                self._styles[name] = size
            self._styles.move_to_end(name)
            yield replace(style, path=self._path(name))

    def _make_room(self, size: int, keep: Sequence[str]) -> None:
        for name in [name for name in self._styles if name not in keep]:
            if sum(self._styles.values()) + size <= self._styles_bytes:
                return
            del self._styles[name]
            self._host("discard", name)

    def _decoded(self, call: Decode, buffer: str, started: float) -> Answer | Notice:
        memory = SharedMemory(buffer)
        assert memory.buf is not None
        try:
            said = self._ask(replace(call, buffer=self._host("frame_buffer", memory.size)))
            if isinstance(said, Decoded):
                for offset in range(0, memory.size, self._piece_bytes):
                    piece = self._host("read_frames", offset, min(self._piece_bytes, memory.size - offset))
                    memory.buf[offset : offset + len(piece)] = piece
                said = replace(said, seconds=time.perf_counter() - started)
            return said
        finally:
            memory.close()

    def _send(self, source: Path, name: str) -> bool:
        """Copies a file to the node; False where there is none. Raises OSError."""
        try:
            file = source.open("rb")
        except FileNotFoundError:
            return False
        with file:
            offset = 0
            while piece := file.read(self._piece_bytes):
                self._host("write", name, piece, offset)
                offset += len(piece)
        return True

    def _fetch(self, name: str, target: Path, *, durable: bool = False) -> None:
        """Moves a file from the node here, whole or not at all, where there is one. Raises OSError."""
        part = target.with_name(f"{target.name}.part")
        piece = self._host("read", name, 0, self._piece_bytes)
        if not piece:
            return
        try:
            with part.open("wb") as file:
                while piece:
                    file.write(piece)
                    piece = self._host("read", name, file.tell(), self._piece_bytes)
            if durable:
                sync(part)
            part.replace(target)
            if durable:
                sync(target.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self._host("discard", name)

    def _ask(self, call: Call) -> Answer | Notice:
        said: Answer | Notice = self._host("ask", call)
        return said

    def _path(self, name: str) -> str:
        """Of a file on the node."""
        return str(self._folder / name)


def in_words(error: BaseException) -> str:
    """An error on one line; one that Ray brings from a node without the traceback around it."""
    return " ".join(f"{getattr(error, 'cause', None) or error or type(error).__name__}".split())
