"""Works off the queue, one quantum of the engine core after the other, as the policy says; and what happens when a
quantum fails or the core dies.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

import grpc
import structlog

from cinecat.engines.errors import CoreDied, EngineError, NoFreeSlot
from cinecat.engines.messages import RequestStepped
from cinecat.server.backlog import Backlog
from cinecat.server.circuit import Circuit
from cinecat.server.core_process import CoreProcess, succeeded
from cinecat.server.errors import RequestError, ShuttingDown, explain, status_of
from cinecat.server.jobs import Jobs
from cinecat.server.live_job import LiveJob
from cinecat.server.metrics import Metrics
from cinecat.server.patience import NotStored, Patience
from cinecat.server.policy import Advance, Begin, Decision, DecodeChunk, Evict, Policy
from cinecat.server.render import Renderer, Rendering, Stopped
from cinecat.v1 import job_pb2 as pb

MAX_ATTEMPTS = 3
"""A job that was alone in the core each time when it died, and got no further between, is given up after so many."""

_SLOT_RETRY_S = 1.0

_QUANTA: dict[type[Decision], str] = {Begin: "begin", Advance: "step", DecodeChunk: "decode", Evict: "evict"}

log = structlog.get_logger(__name__)


class Scheduler:
    """The task that works off the backlog."""

    def __init__(
        self,
        jobs: Jobs,
        renderer: Renderer,
        core: CoreProcess,
        backlog: Backlog,
        policy: Policy,
        metrics: Metrics,
        patience: Patience,
        on_core_state: Callable[[bool], Awaitable[None]],
    ) -> None:
        """`on_core_state` hears whether there is an engine core to work with."""
        self._jobs = jobs
        self._renderer = renderer
        self._core = core
        self._backlog = backlog
        self._policy = policy
        self._metrics = metrics
        self._on_core_state = on_core_state
        self._arrival = asyncio.Event()
        self._circuit = Circuit()
        self._finishing: set[asyncio.Task[None]] = set()
        self._patience = patience
        self._drain = patience.drain
        jobs.on_dequeued = backlog.tell_positions

    def admit(self, request_hash: str = "") -> None:
        """Says whether one more job may be accepted.

        Raises:
            ShuttingDown, RequestError: it may not.
        """
        if self._drain.is_set():
            raise ShuttingDown("the server is shutting down; try again in a moment")
        if self._backlog.is_full:
            message = f"{self._backlog.waiting} jobs are waiting, which is all that may; try again later"
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._circuit.check(request_hash)

    def enqueue(self, live: LiveJob) -> None:
        """Takes on an accepted job."""
        self._backlog.add(self._renderer.take(live))
        self._arrival.set()

    async def run(self) -> None:
        """Works until `drain`, and then until the jobs that are in the core have left it."""
        while self._backlog.in_core or not self._drain.is_set():
            if self._core.died.is_set():
                await self._lost([], CoreDied("the engine core died between two calls"))
                await self._restart_core()
                continue
            await self._stop_cancelled()
            decision = self._policy(self._backlog.snapshot(resident_only=self._drain.is_set()))
            if decision is None:
                if not self._drain.is_set():
                    await self._idle()
                continue
            await self._do(decision)

    async def drain(self, worker: asyncio.Task[None], seconds: float, hurry: asyncio.Event) -> None:
        """Lets no further job in, gives those in the core this long or until `hurry`, then puts them back into the
        queue, where they wait for the next start with what was saved of them.

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
        retry_seconds = _SLOT_RETRY_S if self._backlog.slots_full else None
        done, _ = await asyncio.wait(waits, timeout=retry_seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not done:
            self._backlog.slots_full = False

    async def _stop_cancelled(self) -> None:
        for rendering in self._backlog.unfinished:
            if rendering.live.stop_requested and not rendering.live.ended:
                await self._give_up(rendering, Stopped())

    async def _do(self, decision: Decision) -> None:
        """One quantum. Whatever goes wrong in it is dealt with here."""
        ids = decision.job_ids if isinstance(decision, Advance) else (decision.job_id,)
        renderings = [self._backlog[job_id] for job_id in ids]
        try:
            with self._backlog.charged(_QUANTA[type(decision)], renderings):
                match decision:
                    case Begin():
                        await self._begin(renderings[0])
                    case Advance():
                        await self._advance(renderings)
                    case DecodeChunk():
                        await self._decode(renderings[0])
                    case Evict():
                        await self._evict(renderings[0])
        except CoreDied as error:
            await self._lost(renderings, error)
        except Exception as error:
            await self._failed(renderings, error)

    async def _begin(self, rendering: Rendering) -> None:
        self._circuit.check(rendering.live.request_hash)
        await rendering.begin()

    async def _advance(self, renderings: Sequence[Rendering]) -> None:
        stepped = await self._renderer.step(renderings)
        # First all of them as the core has them now; then what may fail, each on its own.
        failures: list[tuple[Rendering, EngineError]] = []
        for rendering, done in zip(renderings, stepped.requests, strict=True):
            try:
                rendering.stepped(succeeded(done), stepped.seconds)
            except EngineError as error:
                failures.append((rendering, error))
        for rendering, failure in failures:
            await self._give_up(rendering, failure)
        for rendering, done in zip(renderings, stepped.requests, strict=True):
            if rendering.in_core and isinstance(done, RequestStepped):
                self._backlog.report(rendering)
                await self._on_its_own(rendering, rendering.show(done))
                await self._on_its_own(rendering, rendering.save_if_due())

    async def _on_its_own(self, rendering: Rendering, work: Awaitable[None]) -> None:
        """What goes wrong with one of several jobs is that one's. Raises CoreDied, which is everybody's."""
        try:
            await work
        except CoreDied:
            raise
        except Exception as error:
            await self._give_up(rendering, error)

    async def _decode(self, rendering: Rendering) -> None:
        """When all frames are there, the files are completed while the core does something else."""
        await rendering.decode()
        self._backlog.report(rendering)
        if rendering.decoded:
            await rendering.leave_core()
            self._backlog.remove(rendering)
            finishing = asyncio.create_task(self._finish(rendering))
            self._finishing.add(finishing)
            finishing.add_done_callback(self._finishing.discard)

    async def _evict(self, rendering: Rendering) -> None:
        if not await rendering.suspend():
            return
        self._metrics.preemptions.inc()
        live = rendering.live
        live.excuse()
        live.log.info("job sent out", step=live.job.progress.step)
        self._backlog.slots_full = False
        reason = f"a more urgent clip needs the room; goes on from step {live.job.progress.step}"
        await self._store(rendering, lambda: self._jobs.requeue(live, reason))
        self._backlog.tell_positions()

    async def _finish(self, rendering: Rendering) -> None:
        try:
            await rendering.finish()
        except Exception as error:
            await self._give_up(rendering, error)

    async def _failed(self, renderings: Sequence[Rendering], error: Exception) -> None:
        """A quantum failed. Where jobs shared it, none has changed, and each is asked alone from now on."""
        if len(renderings) > 1:
            jobs = [rendering.live.job_id for rendering in renderings]
            log.warning("jobs failed together; each goes on alone", job_ids=jobs, error=f"{error}")
            for rendering in renderings:
                rendering.alone = True
        else:
            await self._give_up(renderings[0], error)

    async def _give_up(self, rendering: Rendering, error: Exception) -> None:
        """Whatever happened, the job ends up in a state that is true, and nothing of it is left in core or files."""
        live = rendering.live
        await rendering.abandon()
        stopped = isinstance(error, Stopped) or (isinstance(error, NoFreeSlot) and live.stop_requested)
        if isinstance(error, NoFreeSlot) and not stopped:
            await self._await_slot(rendering, error)
            return
        self._backlog.remove(rendering)
        if isinstance(error, NotStored):
            return  # and the next start finds it unfinished
        if stopped:
            await self._store(rendering, lambda: self._jobs.transition(live, pb.JOB_STATE_CANCELLED))
        else:
            code = status_of(error)
            if code is grpc.StatusCode.INTERNAL:
                live.log.error("job failed", exc_info=error)
            await self._store(rendering, lambda: self._jobs.fail(live, code.value[0], explain(error)))

    async def _await_slot(self, rendering: Rendering, error: NoFreeSlot) -> None:
        """Puts a job back. Later jobs that wear a style do not overtake it, others do."""
        live = rendering.live
        live.log.info("job waits for a style slot", reason=f"{error}")
        live.excuse()
        self._backlog.found_no_slot(rendering)
        await self._store(rendering, lambda: self._jobs.requeue(live, f"{error}"))
        self._backlog.tell_positions()

    async def _lost(self, involved: Sequence[Rendering], error: CoreDied) -> None:
        """The core died in a quantum of these jobs, and everything that it held is gone. One that was alone in it may
        be what killed it; of several, each is tried alone before any is blamed. The others only begin anew.
        """
        for rendering in self._backlog.in_core:
            if rendering not in involved:
                await self._put_back(rendering, error, blamed=False)
        for rendering in involved:
            rendering.alone = True
            await self._put_back(rendering, error, blamed=len(involved) == 1)
        self._backlog.slots_full = False
        self._backlog.tell_positions()  # those that were put back wait for a new core, which may take minutes

    async def _put_back(self, rendering: Rendering, error: CoreDied, *, blamed: bool) -> None:
        live = rendering.live
        await rendering.abandon()
        if live.ended:
            return
        live.log.error("engine core died", attempt=live.attempts, blamed=blamed, error=f"{error}")
        if live.stop_requested:
            self._backlog.remove(rendering)
            await self._store(rendering, lambda: self._jobs.transition(live, pb.JOB_STATE_CANCELLED))
        elif blamed and live.attempts >= MAX_ATTEMPTS and not self._drain.is_set():
            self._backlog.remove(rendering)
            self._circuit.open(live.request_hash, live.job_id)
            code, message = status_of(error).value[0], f"{error}; the job was tried {live.attempts} times"
            await self._store(rendering, lambda: self._jobs.fail(live, code, message))
        elif live.job.state != pb.JOB_STATE_QUEUED:
            if not blamed or self._drain.is_set():
                live.excuse()
            await self._store(rendering, lambda: self._jobs.requeue(live))

    async def _store(self, rendering: Rendering, transition: Callable[[], Awaitable[None]]) -> None:
        """Stores what became of a job, however long that takes. Does not raise."""
        try:
            await self._patience.until_stored(rendering.live.job_id, transition)
        except NotStored:
            rendering.live.log.warning("left for the next start")
        except ValueError as error:
            # It was cancelled, or has ended, meanwhile.
            rendering.live.log.warning("too late for a transition", error=f"{error}")

    async def _restart_core(self) -> None:
        """Tries until there is a core again, or the drain begins."""
        log.error("engine core is gone; starting another")
        await self._on_core_state(False)
        for attempt in itertools.count():
            if await self._patience.drained_while_waiting(attempt):
                return
            try:
                await self._core.restart()
            except (EngineError, OSError) as error:
                log.error("engine core does not start", attempt=attempt, error=f"{error}")
                continue
            await self._on_core_state(True)
            return
