"""Works off the queue with one replica, one quantum of its engine core after the other, as the policy says; and what
happens when a quantum fails or the core dies.
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
from cinecat.server.core_process import succeeded
from cinecat.server.errors import explain, status_of
from cinecat.server.jobs import Jobs
from cinecat.server.metrics import Metrics
from cinecat.server.patience import NotStored, Patience
from cinecat.server.policy import Advance, Begin, Decision, DecodeChunk, Evict, Policy
from cinecat.server.render import Renderer, Rendering, Stopped
from cinecat.server.replica import Replica
from cinecat.v1 import job_pb2 as pb

MAX_ATTEMPTS = 3
"""A job that was alone in the core each time when it died, and got no further between, is given up after so many."""

_SLOT_RETRY_S = 1.0

_QUANTA: dict[type[Decision], str] = {Begin: "begin", Advance: "step", DecodeChunk: "decode", Evict: "evict"}

log = structlog.get_logger(__name__)


class Scheduler:
    """The task that works off a backlog with one replica."""

    def __init__(
        self,
        jobs: Jobs,
        renderer: Renderer,
        replica: Replica,
        backlog: Backlog,
        policy: Policy,
        metrics: Metrics,
        patience: Patience,
        circuit: Circuit,
        on_works: Callable[[bool], Awaitable[None]],
    ) -> None:
        """`on_works` hears when the replica has lost its engine core, and when it has another."""
        self._jobs = jobs
        self._renderer = renderer
        self._replica = replica
        self._backlog = backlog
        self._policy = policy
        self._metrics = metrics
        self._on_works = on_works
        self._arrival = backlog.replicas[replica] = asyncio.Event()
        self._circuit = circuit
        self._finishing: set[asyncio.Task[None]] = set()
        self._patience = patience
        self._drain = patience.drain
        self._retiring = self._sending_out = False

    async def run(self) -> None:
        """Works until the drain or `retire`, and then until the jobs that are in the core have left it."""
        while self._backlog.claimed_by(self._replica) or not self._closing:
            if self._replica.core.died.is_set():
                self._no_longer_idle()
                await self._lost([], CoreDied("the engine core died between two calls"))
                await self._restart_core()
                continue
            await self._stop_cancelled()
            decision = self._decide()
            if decision is not None:
                await self._do(decision)
            elif not self._closing:
                self._replica.idle = True
                await self._idle()
        del self._backlog.replicas[self._replica]
        self._no_longer_idle()

    def retire(self) -> None:
        """Lets no further job in: `run` ends when those in the core are done."""
        self._retiring = True
        self._arrival.set()

    def send_out(self) -> None:
        """Has a replica that retires save its jobs and give them back, each at the end of its step. One that cannot be
        saved goes on to its end.
        """
        self._sending_out = True

    async def finished(self) -> None:
        """Until the files of jobs that have left the core are complete."""
        if self._finishing:
            await asyncio.wait(self._finishing)

    @property
    def _closing(self) -> bool:
        return self._retiring or self._drain.is_set()

    def _decide(self) -> Decision | None:
        if self._sending_out:
            for rendering in self._backlog.claimed_by(self._replica):
                if rendering.can_be_saved:
                    return Evict(rendering.live.job_id)
        return self._policy(self._backlog.snapshot(self._replica, resident_only=self._closing))

    def _no_longer_idle(self) -> None:
        if self._replica.idle:
            self._replica.idle = False
            self._backlog.wake()

    async def _idle(self) -> None:
        """Waits for a job, and replaces a core that dies with none. With nothing in the core, nobody says that a style
        slot is free again, so jobs that wait for one are tried from time to time.
        """
        self._arrival.clear()
        waits = [asyncio.create_task(event.wait()) for event in (self._arrival, self._replica.core.died)]
        retry_seconds = _SLOT_RETRY_S if self._replica.slots_full else None
        done, _ = await asyncio.wait(waits, timeout=retry_seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not done:
            self._replica.slots_full = False

    async def _stop_cancelled(self) -> None:
        for rendering in self._backlog.unfinished:
            live, ours = rendering.live, rendering.replica in (None, self._replica)
            if live.stop_requested and not live.ended and ours:
                self._backlog.claim(rendering, self._replica)
                await self._give_up(rendering, Stopped())

    async def _do(self, decision: Decision) -> None:
        """One quantum. Whatever goes wrong in it is dealt with here."""
        ids = decision.job_ids if isinstance(decision, Advance) else (decision.job_id,)
        renderings = [self._backlog[job_id] for job_id in ids]
        if isinstance(decision, Begin):
            # Before anything is waited for: another replica may be about to decide.
            self._backlog.claim(renderings[0], self._replica)
        self._no_longer_idle()
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
            self._remove(rendering)
            finishing = asyncio.create_task(self._finish(rendering))
            self._finishing.add(finishing)
            finishing.add_done_callback(self._finishing.discard)

    async def _evict(self, rendering: Rendering) -> None:
        if not await rendering.suspend():
            return
        live, step = rendering.live, rendering.live.job.progress.step
        if self._sending_out:
            why = "its engine core is taken out of service"
        else:
            why = "a more urgent clip needs the room"
            self._metrics.preemptions.inc()
        live.excuse()
        live.log.info("job sent out", step=step)
        self._replica.slots_full = False
        await self._store(rendering, lambda: self._jobs.requeue(live, f"{why}; goes on from step {step}"))
        self._backlog.give_back(rendering)

    def _remove(self, rendering: Rendering) -> None:
        self._replica.slots_full = False
        self._backlog.remove(rendering)

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
        self._remove(rendering)
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
        self._replica.slots_full = True
        self._backlog.found_no_slot(rendering)
        await self._store(rendering, lambda: self._jobs.requeue(live, f"{error}"))
        self._backlog.give_back(rendering)

    async def _lost(self, involved: Sequence[Rendering], error: CoreDied) -> None:
        """The core died in a quantum of these jobs, and everything that it held is gone. One that was alone in it may
        be what killed it; of several, each is tried alone before any is blamed. The others only begin anew.
        """
        self._replica.lost()
        for rendering in self._backlog.claimed_by(self._replica):
            if rendering not in involved:
                await self._put_back(rendering, error, blamed=False)
        for rendering in involved:
            rendering.alone = True
            await self._put_back(rendering, error, blamed=len(involved) == 1)
        self._replica.slots_full = False
        self._backlog.tell_positions()  # those that were put back may wait for a new core, which may take minutes

    async def _put_back(self, rendering: Rendering, error: CoreDied, *, blamed: bool) -> None:
        live = rendering.live
        await rendering.abandon()
        if live.ended:
            self._backlog.give_back(rendering)  # it is, where its end cannot be stored
            return
        live.log.error("engine core died", attempt=live.attempts, blamed=blamed, error=f"{error}")
        if live.stop_requested:
            self._remove(rendering)
            await self._store(rendering, lambda: self._jobs.transition(live, pb.JOB_STATE_CANCELLED))
        elif blamed and live.attempts >= MAX_ATTEMPTS and not self._drain.is_set():
            self._remove(rendering)
            self._circuit.open(live.request_hash, live.job_id)
            code, message = status_of(error).value[0], f"{error}; the job was tried {live.attempts} times"
            await self._store(rendering, lambda: self._jobs.fail(live, code, message))
        else:
            if live.job.state != pb.JOB_STATE_QUEUED:
                if not blamed or self._drain.is_set():
                    live.excuse()
                await self._store(rendering, lambda: self._jobs.requeue(live))
            self._backlog.give_back(rendering)

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
        """Tries until there is a core again, or none is needed any more."""
        log.error("engine core is gone; starting another")
        await self._on_works(False)
        for attempt in itertools.count():
            if await self._patience.drained_while_waiting(attempt) or self._retiring:
                return
            try:
                await self._replica.core.restart()
            except (EngineError, OSError) as error:
                log.error("engine core does not start", attempt=attempt, error=f"{error}")
                continue
            await self._on_works(True)
            return
