"""The engine core's process: spawned, never forked, and gone when its parent is.

This module is imported by the front to spawn from, so it brings in torch only inside the child.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from structlog.contextvars import bound_contextvars

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.errors import EngineError, ModelError, NoFreeSlot, OutOfMemory, RanksLost
from cinecat.engines.logs import configure_logging
from cinecat.engines.messages import (
    Answer,
    Call,
    Condition,
    CoreConfig,
    Decode,
    Failure,
    Notice,
    Ready,
    Release,
    Released,
    Save,
    Step,
    Warm,
)
from cinecat.engines.variants import find_variant

if TYPE_CHECKING:
    from torch import Tensor

    from cinecat.engines.core import EngineCore

log = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 2.0


def run_core(connection: Connection, config: CoreConfig) -> None:
    """Body of the process: loads the model, says Ready after any notices, then answers calls until the pipe closes."""
    # The parent decides when to stop; a Ctrl-C in the terminal, or its end, must not tear a step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    configure_logging(config.log_format, config.log_level)
    die_with_parent()
    # transformers warns that there is no torchvision, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    pipe = _Pipe(connection)
    try:
        # Before torch is loaded, so that a wrong folder or file is refused at once.
        variant = find_variant(config.model_variant)
        checkpoint = find_checkpoint(config.model)
        from cinecat.engines.core import EngineCore

        core = EngineCore(checkpoint, config, variant, pipe.send, pipe.last_words)
    except Exception as error:
        pipe.send(_failure(error))
        return
    pipe.send(Ready(core.model_info))
    try:
        _serve(core, connection, pipe)
    finally:
        core.close()


def _serve(core: EngineCore, connection: Connection, pipe: _Pipe) -> None:
    while True:
        try:
            call: Call = connection.recv()
        except (EOFError, OSError):
            return
        with bound_contextvars(process="core", **_jobs_of(call)):
            try:
                answer = _answer(core, call)
            except RanksLost as error:
                log.error("ranks are out of step: %s", error)
                # A rank that failed may have said why, which another thread tells. Else the pipe's end is the answer.
                time.sleep(_LAST_WORDS_SECONDS)
                if isinstance(error.__cause__, Exception):
                    pipe.last_words(_failure(error.__cause__))
                return
            except Exception as error:
                answer = _failure(error)
        pipe.send(answer)
        if isinstance(answer, Failure) and answer.fatal:
            # After a device error every later result is in doubt: a new process is the only clean state.
            return


class _Pipe:
    """What is said to the front, by one thread at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, answer: Answer | Notice) -> None:
        with self._lock:
            self._connection.send(answer)

    def last_words(self, words: Failure | None) -> None:
        """Ends the process, whatever its main thread does, since a rank is gone."""
        with self._lock, contextlib.suppress(OSError):
            if words is not None and words.kind == "memory":
                self._connection.send(replace(words, fatal=True))
        os._exit(1)


def _jobs_of(call: Call) -> dict[str, str | tuple[str, ...]]:
    """Whom a call is about, for the logs."""
    match call:
        case Condition(shot):
            return {"job_id": shot.job_id}
        case Step(job_ids):
            return {"job_id": job_ids[0]} if len(job_ids) == 1 else {"job_ids": job_ids}
        case Save() | Decode() | Release():
            return {"job_id": call.job_id}
        case Warm():
            return {}


def die_with_parent() -> None:
    """Ends this process, from now on, as soon as its parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _answer(core: EngineCore, call: Call) -> Answer:
    match call:
        case Condition(shot, checkpoint):
            return core.condition(shot, Path(checkpoint) if checkpoint else None)
        case Step(job_ids, previews, path):
            from cinecat.engines.profiling import recorded

            with recorded(path):
                return core.step(job_ids, previews)
        case Save(job_id, path):
            return core.save(job_id, Path(path))
        case Decode(job_id, buffer, dtype):
            return core.decode(job_id, lambda frames: _write_frames(frames, buffer, dtype))
        case Release(job_id):
            core.release(job_id)
            return Released()
        case Warm(style):
            return core.warm(style)


def _write_frames(frames: Tensor, buffer: str, dtype: str) -> None:
    values = frames.cpu().numpy()
    if dtype == "uint8":
        values = (values * 255.0).round().astype(np.uint8)
    memory = SharedMemory(name=buffer)
    try:
        target: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
        target = np.ndarray(values.shape, dtype=values.dtype, buffer=memory.buf)
        target[:] = values
        del target
    finally:
        memory.close()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had none left. On a CPU, torch's allocator raises a plain RuntimeError."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _failure(error: Exception) -> Failure:
    message = f"{error}" or type(error).__name__
    if isinstance(error, ModelError):
        return Failure("model", message)
    import torch

    if is_out_of_memory(error):
        error.__traceback__ = None  # its frames hold the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Failure("memory", f"out of memory: {message.splitlines()[0]}")
    if isinstance(error, OutOfMemory):
        return Failure("memory", message)
    if isinstance(error, NoFreeSlot):
        return Failure("slots", message)
    if isinstance(error, EngineError) or type(error).__module__.startswith("cinecat.plugins"):
        return Failure("request", message)
    log.exception("engine core failed", exc_info=error)
    fatal = isinstance(error, torch.AcceleratorError) or "CUDA error" in message
    return Failure("internal", f"{type(error).__name__}: {message}", fatal=fatal)
