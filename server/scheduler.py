"""Which job the engine core works on: first come, first served, one step at a time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Awaitable, Callable

import grpc
import structlog

from cinecat.engines.errors import CoreDied, EngineError, NoFreeSlot
from cinecat.server.core_process import CoreProcess
from cinecat.server.costs import Costs
from cinecat.server.errors import RequestError, ShuttingDown, explain, status_of
from cinecat.server.jobs import Jobs, LiveJob
from cinecat.server.metrics import Metrics
from cinecat.server.models import token_grid, tokens_of_steps
from cinecat.server.render import Renderer, Rendering, Stopped
from cinecat.v1 import job_pb2 as pb
from cinecat.v1 import models_pb2

# A job that was running when the core died is tried once more; one that kills it twice would do so for ever.
MAX_ATTEMPTS = 2

_PAUSES_S = (0.0, 1.0, 5.0, 15.0, 60.0)
_SLOT_RETRY_S = 1.0

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
        self._rendering: Rendering | None = None
        # Since a job found no style slot free, until one leaves the core.
        self._slots_full = False
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
        """Works until `drain`, one quantum after the other: the running job's next, else the next job's first."""
        while self._rendering is not None or not self._drain.is_set():
            if self._rendering is None:
                if self._core.died.is_set():
                    await self._restart_core()
                    continue
                live = self._next()
                if live is None:
                    await self._idle()
                    continue
                self._rendering = self._renderer.begin(live)
            await self._advance(self._rendering)

    async def drain(self, worker: asyncio.Task[None], seconds: float, hurry: asyncio.Event) -> None:
        """Starts no further job, gives the running one this long or until `hurry`, then puts it back into the queue.

        A job whose files are still being finished at the end of it is found unfinished by the next start.
        """
        self._drain.set()
        self._arrival.set()
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait([worker, hurrying], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            # A forward cannot be interrupted, a process can.
            self._core.kill()
            await asyncio.wait([worker])
        if self._finishing:
            finishing = asyncio.create_task(asyncio.wait(self._finishing))
            await asyncio.wait({finishing, hurrying}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()

    async def _idle(self) -> None:
        """Waits for a job, and replaces a core that dies with none. With nothing in the core, nobody says that a style
        slot is free again, so jobs that wait for one are tried from time to time.
        """
        self._arrival.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self._arrival, self._core.died)]
        retry_seconds = _SLOT_RETRY_S if self._slots_full else None
        done, _ = await asyncio.wait(waits, timeout=retry_seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not done:
            self._slots_full = False

    async def _advance(self, rendering: Rendering) -> None:
        try:
            if not await rendering.advance():
                return
            await rendering.leave_core()
        except Exception as error:
            self._rendering = None
            await self._give_up(rendering, error)
            return
        self._rendering, self._slots_full = None, False
        finishing = asyncio.create_task(self._finish(rendering))
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finishing.discard)

    async def _finish(self, rendering: Rendering) -> None:
        try:
            await rendering.finish()
        except Exception as error:
            await self._give_up(rendering, error)

    async def _give_up(self, rendering: Rendering, error: Exception) -> None:
        """Whatever happened, the job ends up in a state that is true, and nothing of it is left in core or files."""
        live = rendering.live
        await rendering.abandon()
        self._slots_full = isinstance(error, NoFreeSlot)
        if isinstance(error, Stopped) or (isinstance(error, CoreDied | NoFreeSlot) and live.stop_requested):
            await self._until_stored(live, lambda: self._jobs.transition(live, pb.JOB_STATE_CANCELLED))
        elif isinstance(error, NoFreeSlot):
            await self._await_slot(live, error)
        elif isinstance(error, CoreDied):
            await self._after_death(live, error)
        else:
            code = status_of(error)
            if code is grpc.StatusCode.INTERNAL:
                log.error("job failed", job_id=live.job_id, exc_info=error)
            await self._until_stored(live, lambda: self._jobs.fail(live, code.value[0], explain(error)))

    async def _await_slot(self, live: LiveJob, error: NoFreeSlot) -> None:
        """Puts a job back in front. Later jobs that wear a style do not overtake it, others do."""
        log.info("job waits for a style slot", job_id=live.job_id, reason=f"{error}")
        live.attempts -= 1  # it never began
        if await self._until_stored(live, lambda: self._jobs.requeue(live, f"{error}")):
            self._queue.appendleft(live)
            self._tell_positions()

    async def _after_death(self, live: LiveJob, error: CoreDied) -> None:
        log.error("engine core died", job_id=live.job_id, attempt=live.attempts, error=f"{error}")
        if self._drain.is_set():
            live.attempts -= 1  # it was the server that stopped
            await self._until_stored(live, lambda: self._jobs.requeue(live))
        elif live.attempts < MAX_ATTEMPTS:
            if await self._until_stored(live, lambda: self._jobs.requeue(live)):
                self._queue.appendleft(live)
                self._tell_positions()
        else:
            code, message = status_of(error).value[0], f"{error}; the job was tried {live.attempts} times"
            await self._until_stored(live, lambda: self._jobs.fail(live, code, message))

    async def _until_stored(self, live: LiveJob, transition: Callable[[], Awaitable[None]]) -> bool:
        """Tries until the database takes it, so that no job hangs after a full disk; false when the drain came first,
        and the next start finds the job unfinished.
        """
        for attempt in itertools.count():
            try:
                await transition()
            except Exception as error:
                log.error("a transition could not be stored", job_id=live.job_id, attempt=attempt, exc_info=error)
            else:
                return True
            if await self._drained_within(_pause(attempt + 1)):
                return False
        raise AssertionError("unreachable")

    async def _drained_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drain.wait(), seconds)
        return self._drain.is_set()

    async def _restart_core(self) -> None:
        """Tries until there is a core again, or the drain begins."""
        log.error("engine core is gone; starting another")
        await self._on_core_state(False)
        for attempt in itertools.count():
            if await self._drained_within(_pause(attempt)):
                return
            try:
                await self._core.restart()
            except (EngineError, OSError) as error:
                log.error("engine core does not start", attempt=attempt, error=f"{error}")
                continue
            await self._on_core_state(True)
            return

    def _next(self) -> LiveJob | None:
        self._queue = deque(self._waiting())
        for live in self._queue:
            if not (self._slots_full and _wears_style(live)):
                self._queue.remove(live)
                return live
        return None

    def _waiting(self) -> list[LiveJob]:
        return [live for live in self._queue if not live.ended]

    def _tell_positions(self) -> None:
        """Tells every waiting job its position and ETA."""
        waiting = self._waiting()
        self._metrics.queue_depth.set(len(waiting))
        running = self._rendering.live if self._rendering is not None else None
        ahead = 0.0
        for position, live in enumerate([running, *waiting] if running is not None else waiting):
            clip = live.job.clip
            step_tokens = tokens_of_steps(token_grid(self._model, clip), clip)
            seconds = self._costs.remaining(live.job, step_tokens)
            ahead = float("nan") if seconds is None else ahead + seconds
            if live is running:
                continue
            live.job.progress.queue_position = position
            if ahead == ahead:
                live.job.progress.eta.FromNanoseconds(int(ahead * 1e9))
            self._jobs.progress(live)


def _wears_style(live: LiveJob) -> bool:
    return any(style.strength for style in live.job.clip.styles)


def _pause(attempt: int) -> float:
    return _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)]
