"""An engine core on this machine: a process of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from cinecat.engines.errors import CoreDied, EngineError, EngineFault, ModelError, NoFreeSlot, OutOfMemory
from cinecat.engines.messages import (
    Answer,
    Call,
    CoreConfig,
    Decoded,
    Failure,
    FrameDtype,
    ModelInfo,
    Notice,
    Ready,
    RequestStepped,
)
from cinecat.engines.process import run_core
from cinecat.server.core_gauges import CoreGauges

A = TypeVar("A", bound=Answer)

log = structlog.get_logger(__name__)

_STOP_SECONDS = 3.0

_SHARED_MEMORY = Path("/dev/shm")

_FAILURES = {
    "model": ModelError,
    "memory": OutOfMemory,
    "slots": NoFreeSlot,
    "request": EngineError,
    "internal": EngineFault,
    "died": CoreDied,
}


class CoreProcess:
    """A `Core`: spawns the process and talks to it over a pipe.

    Attributes:
        died: set when the process that `start` began has ended; a new event for each process.
    """

    def __init__(self, config: CoreConfig, gauges: CoreGauges) -> None:
        self._config = config
        self._gauges = gauges
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._sentinel: int | None = None  # of the process that is watched
        self._fingerprint = ""  # of the model that was loaded first
        self.died = asyncio.Event()
        # A single thread: calls queue up behind the one that blocks in it.
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="core")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> ModelInfo:
        """Starts the process and waits until its model is loaded.

        Raises:
            ModelError: the model cannot be served here.
            CoreDied: the process ended while loading.
        """
        loop = asyncio.get_running_loop()
        self.died = died = asyncio.Event()

        def watch(sentinel: int) -> None:
            self._sentinel = sentinel
            loop.add_reader(sentinel, self._unwatch, died)

        def begin() -> ModelInfo:
            # All of it at once, so that no call takes an answer that belongs to the start.
            process = self._spawn()
            loop.call_soon_threadsafe(watch, process.sentinel)
            return self._loaded()

        model: ModelInfo = await self._in_thread(begin)
        log.info("engine core ready", pid=self.pid, model=model.name, device=model.device)
        return model

    async def restart(self) -> None:
        """Replaces a core that died.

        Raises:
            ModelError: the model's files are no longer those that the server started with.
            CoreDied: the process ended while loading.
        """
        # Before its descriptor is closed and given to the next process.
        self._unwatch(self.died)
        await self._in_thread(self._kill)
        self._gauges.restarting()
        await self.start()

    def _unwatch(self, died: asyncio.Event) -> None:
        if self._sentinel is not None:
            asyncio.get_running_loop().remove_reader(self._sentinel)
            self._sentinel = None
        died.set()

    async def call(self, call: Call, answer: type[A]) -> A:
        """Sends one call and waits for its answer.

        Raises:
            EngineError: the engine refused or failed; OutOfMemory, NoFreeSlot and EngineFault tell it apart.
            CoreDied: there is no engine any more.
        """
        died = self.died
        try:
            reply = await self._in_thread(lambda: self._roundtrip(call))
        except CoreDied:
            died.set()
            raise
        lost = not isinstance(reply, (Failure, answer))  # calls and answers are out of step
        if lost or (isinstance(reply, Failure) and reply.fatal):
            # It is leaving; nobody else may be sent to it meanwhile.
            self.kill()
            died.set()
        return _expect(reply, answer)

    def kill(self) -> None:
        """Ends the process at once; a call that waits for it comes back with CoreDied."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """Lets the process end by itself, or kills it when it is busy."""
        try:
            await asyncio.wait_for(self._in_thread(self._close), _STOP_SECONDS)
        except TimeoutError:
            self.kill()
            await self._in_thread(self._kill)

    def _loaded(self) -> ModelInfo:
        """Waits until the model is there, and is the one that it was before."""
        self._gauges.loading()
        answer = self._receive()
        while isinstance(answer, Notice):
            self._gauges.tell(answer)
            answer = self._receive()
        model = _expect(answer, Ready).model
        if self._fingerprint not in ("", model.fingerprint):
            self.kill()
            raise ModelError(f"model: the files of {model.name} have changed under the server; start it again")
        self._fingerprint = model.fingerprint
        return model

    def _spawn(self) -> BaseProcess:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        body, arguments = self._body()
        process = context.Process(target=body, args=(theirs, *arguments), name="cinecat-core", daemon=True)
        process.start()
        theirs.close()
        self._process, self._connection = process, ours
        return process

    def _body(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        """What the process runs, and on what besides its end of the pipe."""
        return run_core, (self._config,)

    def _roundtrip(self, call: Call) -> Answer | Notice:
        try:
            if self._connection is None:
                raise CoreDied("the engine core is not running")
            self._connection.send(call)
        except OSError as error:
            raise CoreDied(self._death()) from error
        return self._receive()

    def _receive(self) -> Answer | Notice:
        assert self._connection is not None
        try:
            answer: Answer | Notice = self._connection.recv()
        except (EOFError, OSError) as error:
            raise CoreDied(self._death()) from error
        return answer

    def _death(self) -> str:
        if self._process is None:
            return "the engine core was stopped"
        self._process.join(5)
        return f"the engine core (pid {self._process.pid}) died with exit code {self._process.exitcode}"

    def _close(self) -> None:
        """A core that finds its pipe closed leaves, and cleans up behind itself."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.join(_STOP_SECONDS / 2)
            self._process.kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    async def _in_thread(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._caller, work)


def succeeded(done: RequestStepped | Failure) -> RequestStepped:
    """One request's part of a step. Raises EngineError where that failed."""
    if isinstance(done, Failure):
        raise _error(done)
    return done


def _error(failure: Failure) -> EngineError:
    return _FAILURES[failure.kind](failure.message)


def _expect(answer: Answer | Notice, kind: type[A]) -> A:
    if isinstance(answer, Failure):
        raise _error(answer)
    if not isinstance(answer, kind):
        raise EngineFault(f"the engine core answered {type(answer).__name__} where {kind.__name__} was due")
    return answer


class FrameBuffer:
    """Shared memory for the frames of one Decode: the core writes, the front copies out.

    The front owns it, so that a core that is killed leaves nothing behind.
    """

    def __init__(self, height: int, width: int, max_frames: int, dtype: FrameDtype) -> None:
        """Raises OutOfMemory when the shared memory is too small, which would otherwise be the core's death."""
        self._shape = (height, width, 3)
        self.dtype: FrameDtype = dtype
        size = max_frames * height * width * 3 * np.dtype(dtype).itemsize
        if _SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(_SHARED_MEMORY).free) < size:
            raise OutOfMemory(
                f"a chunk of frames takes {size} bytes of {_SHARED_MEMORY}, {free} are free; "
                "in a container, raise --shm-size"
            )
        self._memory = SharedMemory(create=True, size=size)

    @property
    def name(self) -> str:
        return self._memory.name

    def frames(self, decoded: Decoded) -> NDArray[Any]:
        """A copy of what was decoded, [count, height, width, 3]."""
        view: NDArray[Any] = np.ndarray((decoded.count, *self._shape), dtype=self.dtype, buffer=self._memory.buf)
        return view.copy()

    def close(self) -> None:
        self._memory.close()
        self._memory.unlink()
