"""Which job the engine core works on: first come, first served, one step at a time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Awaitable, Callable

import grpc
import structlog

from cinecat.engines.errors import CoreDied, EngineError, EngineFault, ModelError, OutOfMemory
from cinecat.plugins.registry import UnknownStyle
from cinecat.server.artifacts import ArtifactError
from cinecat.server.core_process import CoreProcess
from cinecat.server.costs import Costs
from cinecat.server.errors import RequestError, ShuttingDown
from cinecat.server.jobs import Jobs, LiveJob
from cinecat.server.metrics import Metrics
from cinecat.server.models import token_count
from cinecat.server.render import Rendered, Renderer, Stopped
from cinecat.v1 import job_pb2 as pb
from cinecat.v1 import models_pb2

# A job that was running when the core died is tried once more; one that kills it twice would do so for ever.
MAX_ATTEMPTS = 2

_RESTART_PAUSES_S = (0.0, 1.0, 5.0, 15.0, 60.0)

_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (UnknownStyle, grpc.StatusCode.NOT_FOUND),
    (OutOfMemory, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (EngineFault, grpc.StatusCode.INTERNAL),
    (EngineError, grpc.StatusCode.FAILED_PRECONDITION),
    (ArtifactError, grpc.StatusCode.UNAVAILABLE),
)

log = structlog.get_logger(__name__)


class Scheduler:
    """The queue, and the task that works it off."""

    def __init__(
        self,
        jobs: Jobs,
        renderer: Renderer,
        core: CoreProcess,
        model: models_pb2.Model,
        max_queue: int,
        metrics: Metrics,
        costs: Costs,
        on_core_state: Callable[[bool], Awaitable[None]],
    ) -> None:
        """`on_core_state` hears whether there is an engine core to work with."""
        self._jobs = jobs
        self._renderer = renderer
        self._core = core
        self._model = model
        self._max_queue = max_queue
        self._metrics = metrics
        self._costs = costs
        self._on_core_state = on_core_state
        self._queue: deque[LiveJob] = deque()
        self._arrival = asyncio.Event()
        self._running: LiveJob | None = None
        self._finishing: set[asyncio.Task[None]] = set()
        self._drain = asyncio.Event()
        jobs.on_dequeued = self._tell_positions

    def admit(self) -> None:
        """Says whether one more job may be accepted.

        Raises:
            ShuttingDown, RequestError: it may not.
        """
        if self._drain.is_set():
            raise ShuttingDown("the server is shutting down; try again in a moment")
        if len(self._waiting()) >= self._max_queue:
            message = f"{self._max_queue} jobs are waiting, which is all that may; try again later"
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)

    def enqueue(self, live: LiveJob) -> None:
        self._queue.append(live)
        self._arrival.set()
        self._tell_positions()

    async def run(self) -> None:
        """Works until `drain`."""
        while not self._drain.is_set():
            live = self._next()
            if live is None:
                await self._idle()
                continue
            self._running = live
            try:
                rendered = await self._guarded(live, self._renderer.render(live))
            finally:
                self._running = None
            if rendered is not None:
                finishing = asyncio.create_task(self._complete(live, rendered))
                self._finishing.add(finishing)
                finishing.add_done_callback(self._finishing.discard)

    async def drain(self, worker: asyncio.Task[None], seconds: float, hurry: asyncio.Event) -> None:
        """Starts no further job, gives the running one this long or until `hurry`, then puts it back into the queue."""
        self._drain.set()
        self._arrival.set()
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait([worker, hurrying], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not worker.done():
            # A forward cannot be interrupted, a process can.
            self._core.kill()
            await asyncio.wait([worker])
        if self._finishing:
            await asyncio.wait(self._finishing)

    async def _idle(self) -> None:
        """Waits for a job, and replaces a core that dies with none."""
        self._arrival.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self._arrival, self._core.died)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._core.died.is_set() and not self._drain.is_set():
            log.error("engine core died while idle")
            await self._restart_core()

    async def _complete(self, live: LiveJob, rendered: Rendered) -> None:
        await self._guarded(live, rendered.finish())

    async def _guarded(self, live: LiveJob, work: Awaitable[Rendered | None]) -> Rendered | None:
        """Carries out a part of a job; whatever happens, the job ends up in a state that is true."""
        result: Rendered | None = None
        try:
            result = await work
        except Stopped:
            await self._stored(live, self._jobs.transition(live, pb.JOB_STATE_CANCELLED))
        except CoreDied as error:
            await self._after_death(live, error)
        except Exception as error:
            code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
            if code is grpc.StatusCode.INTERNAL:
                log.error("job failed", job_id=live.job_id, exc_info=error)
            await self._fail(live, code, f"{error}" or type(error).__name__)
        return result

    async def _fail(self, live: LiveJob, code: grpc.StatusCode, message: str) -> None:
        await self._stored(live, self._jobs.fail(live, code.value[0], message))

    async def _stored(self, live: LiveJob, transition: Awaitable[None]) -> bool:
        try:
            await transition
        except Exception as error:
            # Without its database the server can keep no promise about this job; the next restart finds it unfinished.
            log.error("a transition could not be stored", job_id=live.job_id, exc_info=error)
            return False
        return True

    async def _after_death(self, live: LiveJob, error: CoreDied) -> None:
        log.error("engine core died", job_id=live.job_id, attempt=live.attempts, error=f"{error}")
        if live.stop_requested:
            await self._stored(live, self._jobs.transition(live, pb.JOB_STATE_CANCELLED))
        elif self._drain.is_set():
            live.attempts -= 1  # it was the server that stopped
            await self._stored(live, self._jobs.requeue(live))
        elif live.attempts < MAX_ATTEMPTS:
            if await self._stored(live, self._jobs.requeue(live)):
                self._queue.appendleft(live)
        else:
            await self._fail(live, grpc.StatusCode.UNAVAILABLE, f"{error}, for the second time on this job")
        await self._restart_core()

    async def _restart_core(self) -> None:
        await self._on_core_state(False)
        for attempt in itertools.count():
            pause = _RESTART_PAUSES_S[min(attempt, len(_RESTART_PAUSES_S) - 1)]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drain.wait(), pause)
            if self._drain.is_set():
                return
            try:
                await self._core.restart()
            except (CoreDied, ModelError) as error:
                log.error("engine core does not start", attempt=attempt, error=f"{error}")
                continue
            await self._on_core_state(True)
            return

    def _next(self) -> LiveJob | None:
        while self._queue:
            live = self._queue.popleft()
            if not live.ended:
                return live
        return None

    def _waiting(self) -> list[LiveJob]:
        return [live for live in self._queue if not live.ended]

    def _tell_positions(self) -> None:
        """Writes position and ETA into every waiting job, and to those who watch one."""
        waiting = self._waiting()
        self._metrics.queue_depth.set(len(waiting))
        running = [self._running] if self._running else []
        ahead = 0.0
        for position, live in enumerate([*running, *waiting]):
            clip = live.job.clip
            seconds = self._costs.remaining(live.job, token_count(self._model, clip.width, clip.height, clip.frames))
            ahead = float("nan") if seconds is None else ahead + seconds
            if live is self._running:
                continue
            live.job.progress.queue_position = position
            if ahead == ahead:
                live.job.progress.eta.FromNanoseconds(int(ahead * 1e9))
            if live.watchers:
                self._jobs.progress(live)
