"""Jobs from acceptance to their end: the only code that changes a job's state.

Transitions are written to the store before anyone sees them. Steps and previews in between live in memory: of progress
and of estimates the latest is kept, of decoded frames all until the job ends. All watchers read the same events, at
their own pace; so a slow one skips progress but never a transition or a frame, and costs no memory. Progress that comes
in quick succession is one event to all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from cinecat.server.checkpoints import Checkpoints
from cinecat.server.errors import RequestError, ShuttingDown, unknown_job
from cinecat.server.inputs import NO_WEIGHTS, JobInputs
from cinecat.server.lifecycle import FINAL_STATES, check_transition, state_name
from cinecat.server.live_job import LiveJob
from cinecat.server.metrics import Metrics
from cinecat.server.store import JobFilter, JobStore, StoredJob
from cinecat.v1 import job_pb2 as pb

if TYPE_CHECKING:
    from cinecat.server.lifecycle import State

T = TypeVar("T")


# More than the progress events that fit between two transitions, so that numbers keep growing after a restart that
# lost the count of those that were never stored.
_SEQUENCE_GAP = 1 << 20

# From the acceptance of a job until its own caller watches it, which takes a moment even where no grace is given.
_ATTACH_SECONDS = 5.0

# Progress alone waits so long for more: what watchers cost grows with the events that they are sent.
_GATHER_S = 0.05


class Jobs:
    """All jobs of a server.

    Attributes:
        on_dequeued: called when a job has left the queue, in whatever way.
    """

    def __init__(
        self,
        store: JobStore,
        inputs: JobInputs,
        checkpoints: Checkpoints,
        grace_seconds: float,
        metrics: Metrics,
        on_ended: Callable[[LiveJob], None] = lambda live: None,
    ) -> None:
        """`on_ended` is told of jobs whose end is stored."""
        self._store = store
        self._inputs = inputs
        self._checkpoints = checkpoints
        self._grace_seconds = grace_seconds
        self._metrics = metrics
        self._on_ended = on_ended
        self._live: dict[str, LiveJob] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._closing = False
        self.on_dequeued: Callable[[], None] = lambda: None
        self._abandoned: set[asyncio.Task[pb.Job]] = set()
        self._writing: set[asyncio.Task[Any]] = set()

    async def restore(self) -> list[LiveJob]:
        """Brings back the jobs that a former server left unfinished, oldest first, all of them queued."""
        restored = []
        unfinished = await self._in_store(self._store.unfinished)
        worn = {stored.job.job_id: [ref.fingerprint for ref in stored.job.clip.styles] for stored in unfinished}
        await self._in_store(partial(self._inputs.keep_only, worn))
        await self._in_store(partial(self._checkpoints.keep_only, worn.keys()))
        for stored in unfinished:
            transitions = await self._in_store(partial(self._store.events, stored.job.job_id))
            # It was the server that stopped, not the job that failed.
            running = stored.job.state != pb.JOB_STATE_QUEUED
            attempts = max(0, stored.attempts - running)
            live = LiveJob(stored.job, stored.request_hash, stored.tenant, attempts, transitions=transitions)
            live.sequence = transitions[-1].sequence + _SEQUENCE_GAP
            self._live[live.job_id] = live
            self._metrics.job_entered(live.job.state)
            await self.requeue(live)
            self._left_alone(live, at_least=_ATTACH_SECONDS)
            restored.append(live)
        return restored

    async def accept(
        self,
        job: pb.Job,
        frame: NDArray[np.uint8],
        request_hash: str,
        weights: Mapping[str, Path] = NO_WEIGHTS,
        tenant: str = "",
    ) -> tuple[LiveJob | None, StoredJob | None]:
        """Persists a new job and what it is made from; also when its caller is cancelled meanwhile.

        Args:
            frame: the first one, uint8 [height, width, 3].
            weights: LoRA files of its styles, by fingerprint.

        Returns:
            The live job, or the tenant's stored one that already has its request id.
        """
        return await self._to_the_end(self._accept(job, frame, request_hash, weights, tenant))

    async def _accept(
        self, job: pb.Job, frame: NDArray[np.uint8], request_hash: str, weights: Mapping[str, Path], tenant: str
    ) -> tuple[LiveJob | None, StoredJob | None]:
        live = LiveJob(job, request_hash, tenant)
        job.create_time.GetCurrentTime()
        job.state = pb.JOB_STATE_QUEUED
        first = self._event(live)
        existing = await self._persist(StoredJob(job, request_hash, 0, tenant=tenant), first, frame, weights)
        if existing is not None:
            return None, existing
        live.transitions.append(first)
        self._live[live.job_id] = live
        self._metrics.job_accepted(job)
        self._metrics.job_entered(job.state)
        live.log.info("job accepted", traceparent=job.traceparent)
        self._left_alone(live, at_least=_ATTACH_SECONDS)
        return live, None

    def live(self, job_id: str) -> LiveJob | None:
        return self._live.get(job_id)

    @property
    def unfinished(self) -> list[LiveJob]:
        """All that have not ended, in the order in which they were accepted or brought back."""
        return list(self._live.values())

    async def get(self, job_id: str, tenant: str | None = None) -> pb.Job:
        """Raises RequestError for an unknown id; with a `tenant`, that of another's job is as unknown as any."""
        live = self._live.get(job_id)
        if live is not None and tenant in (None, live.tenant):
            return live.known
        stored = None if live is not None else await self._in_store(lambda: self._store.get(job_id))
        if stored is None or tenant not in (None, stored.tenant):
            raise unknown_job(job_id)
        return stored.job

    async def by_request_id(self, tenant: str, request_id: str) -> StoredJob | None:
        return await self._in_store(lambda: self._store.by_request_id(tenant, request_id))

    async def page(self, size: int, before: tuple[int, str] | None, wanted: JobFilter) -> list[pb.Job]:
        """Newest first, with the progress of those that run."""
        stored = await self._in_store(lambda: self._store.page(size, before, wanted))
        return [live.known if (live := self._live.get(job.job_id)) else job for job in stored]

    async def transition(self, live: LiveJob, state: State, change: Callable[[pb.Job], object] | None = None) -> None:
        """Moves a job on, stores that, then tells its watchers; also when its caller is cancelled meanwhile.

        Args:
            change: writes what comes with the new state into the job; undone when it cannot be stored.

        Raises:
            ValueError: the state machine has no such transition.
        """
        await live.turn.acquire()  # at once, but where another transition is being stored
        try:
            event, before, attempts = self._prepare(live, state, change)
        except BaseException:
            live.turn.release()
            raise
        await self._to_the_end(self._make_known(live, event, before, attempts))

    def _prepare(
        self, live: LiveJob, state: State, change: Callable[[pb.Job], object] | None
    ) -> tuple[pb.JobEvent, pb.Job, int]:
        """The event of a transition, and what to go back to where it cannot be stored."""
        before, attempts = live.job, live.attempts
        check_transition(before.state, state)
        job = pb.Job()
        job.CopyFrom(before)
        job.state = state
        if state == pb.JOB_STATE_CONDITIONING:
            if not job.HasField("start_time"):
                job.start_time.GetCurrentTime()
            job.progress.queue_position = 0
            job.progress.ClearField("wait_reason")
            live.attempts += 1
        if state in FINAL_STATES:
            job.end_time.GetCurrentTime()
            job.progress.ClearField("eta")
        if change is not None:
            change(job)
        # Set before the write, so that nobody else decides from the old state meanwhile.
        live.job = job
        return self._event(live), before, attempts

    async def _make_known(self, live: LiveJob, event: pb.JobEvent, before: pb.Job, attempts: int) -> None:
        """Stores a transition and makes it known, or puts the job back to `before` and `attempts`."""
        live.storing.append(event.sequence)
        try:
            await self._in_store(partial(self._store_transition, event, live.attempts))
        except BaseException:
            live.job, live.attempts = before, attempts
            raise
        finally:
            live.storing.remove(event.sequence)
            live.turn.release()
            live.wake()
        live.transitions.append(event)
        self._metrics.job_moved(before, live.job)
        live.log.info("job", state=state_name(live.job.state))
        if live.ended:
            self._live.pop(live.job_id, None)
            if live.grace is not None:
                live.grace.cancel()
            self._on_ended(live)
        live.wake()
        if before.state == pb.JOB_STATE_QUEUED:
            self.on_dequeued()

    async def requeue(self, live: LiveJob, wait_reason: str = "") -> None:
        """Puts a running job back into the queue, and says what it waits for if not for the jobs ahead of it."""

        def change(job: pb.Job) -> None:
            job.progress.frames_decoded = 0
            job.progress.wait_reason = wait_reason

        await self.transition(live, pb.JOB_STATE_QUEUED, change)

    async def fail(self, live: LiveJob, code: int, message: str) -> None:
        """Ends a job with an error; `code` is a google.rpc.Code."""
        await self.transition(
            live, pb.JOB_STATE_FAILED, lambda job: job.error.MergeFrom(pb.JobError(code=code, message=message))
        )

    async def got_on(self, live: LiveJob) -> None:
        """Notes that a job's work up to now will not be lost: what failed before counts no more."""
        if live.attempts:
            live.attempts = 0
            try:
                await self._in_store(partial(self._store.set_attempts, live.job_id, 0))
            except (OSError, SQLAlchemyError) as error:
                # Its next transition stores it.
                live.log.warning("attempts could not be stored", error=f"{error}")

    def progress(self, live: LiveJob, preview: pb.Preview | None = None) -> None:
        """Tells watchers about progress that the caller has written into `live.job`, and shows them a preview.

        A preview of decoded frames, which have no step, is kept; all else may be superseded by what follows.
        """
        event = self._event(live)
        if preview is None:
            live.latest = event
            if live.waking is None:
                live.waking = asyncio.get_running_loop().call_later(_GATHER_S, live.wake)
            return
        event.preview.CopyFrom(preview)
        if preview.step:
            live.shown = event
        else:
            live.frames.append(event)
        live.wake()

    async def cancel(self, job_id: str) -> pb.Job:
        """Asks a job to stop: at once while it is queued, else before its next step.

        Raises:
            RequestError: the id is unknown.
        """
        live = self._live.get(job_id)
        if live is None:
            return await self.get(job_id)
        live.stop_requested = True
        if live.job.state == pb.JOB_STATE_QUEUED:
            await self.transition(live, pb.JOB_STATE_CANCELLED)
        elif live.ended and live.known.state not in FINAL_STATES:
            await live.changed.wait()  # its end is being stored
        return live.known

    async def watch(self, job_id: str, after_sequence: int) -> AsyncGenerator[pb.JobEvent, None]:
        """The events of a job past `after_sequence`, until its end.

        Raises:
            RequestError: the id is unknown.
            ShuttingDown: the server stops before the job does; the job is kept.
        """
        live = self._live.get(job_id)
        if live is None:
            await self.get(job_id)
            for event in await self._in_store(lambda: self._store.events(job_id, after_sequence)):
                yield event
            return
        live.watchers += 1
        if live.grace is not None:
            live.grace.cancel()
            live.grace = None
        try:
            while True:
                changed = live.changed
                for event in live.events_after(after_sequence):
                    after_sequence = event.sequence
                    yield event
                # The job's own state is ahead of its stored transitions while one is being written.
                last = live.transitions[-1]
                if last.job.state in FINAL_STATES and last.sequence <= after_sequence:
                    return
                if self._closing:
                    raise ShuttingDown("the server is shutting down; the job is kept: Watch it after the restart")
                await changed.wait()
        finally:
            live.watchers -= 1
            self._left_alone(live)

    def stop_watching(self) -> None:
        """Ends all streams with ShuttingDown, and all grace periods: a restart cancels no job."""
        self._closing = True
        for live in self._live.values():
            if live.grace is not None:
                live.grace.cancel()
            live.wake()

    async def close(self) -> None:
        """Closes the store. Unfinished jobs stay in it."""
        await self._in_store(self._store.close)
        self._writer.shutdown()

    def _event(self, live: LiveJob) -> pb.JobEvent:
        live.sequence += 1
        event = pb.JobEvent(sequence=live.sequence, job=live.job)
        event.time.GetCurrentTime()
        return event

    def _left_alone(self, live: LiveJob, at_least: float = 0.0) -> None:
        """Starts the grace period of an attached job that nobody watches."""
        if live.job.detached or live.watchers or live.ended or live.grace is not None or self._closing:
            return
        live.grace = asyncio.get_running_loop().call_later(max(self._grace_seconds, at_least), self._abandon, live)

    def _abandon(self, live: LiveJob) -> None:
        live.grace = None
        if not live.watchers and not live.ended:
            live.log.info("job abandoned", grace_seconds=self._grace_seconds)
            task = asyncio.ensure_future(self.cancel(live.job_id))
            self._abandoned.add(task)
            task.add_done_callback(partial(self._after_abandonment, live))

    def _after_abandonment(self, live: LiveJob, task: asyncio.Task[pb.Job]) -> None:
        self._abandoned.discard(task)
        if (error := task.exception()) is not None:
            live.log.error("an abandoned job could not be cancelled", exc_info=error)
            self._left_alone(live)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """A client that vanishes while its call is being stored must not part what is stored from what is known."""
        task = asyncio.ensure_future(work)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return await asyncio.shield(task)

    async def _persist(
        self, stored: StoredJob, first: pb.JobEvent, frame: NDArray[np.uint8], weights: Mapping[str, Path]
    ) -> StoredJob | None:
        """The inputs before the job: what is accepted can be carried out. They take no time of the one thread that
        stores every job's transitions.
        """
        job_id = stored.job.job_id
        existing: StoredJob | None = stored
        try:
            await asyncio.to_thread(self._inputs.save, job_id, frame, weights)
            existing = await self._in_store(partial(self._store.insert, stored, first))
        except (OSError, SQLAlchemyError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            if await self._is_stored(job_id):  # and only the answer was lost
                existing = None
                return None
            raise RequestError(grpc.StatusCode.UNAVAILABLE, f"the job cannot be stored now: {cause}") from error
        finally:
            if existing is not None:
                await asyncio.to_thread(self._inputs.delete, job_id)
        return existing

    async def _is_stored(self, job_id: str) -> bool:
        try:
            return await self._in_store(partial(self._store.get, job_id)) is not None
        except (OSError, SQLAlchemyError):
            return False

    def _store_transition(self, event: pb.JobEvent, attempts: int) -> None:
        self._store.record(event, attempts)
        if event.job.state in FINAL_STATES:
            # The transition is stored by now; the next start removes a frame that is left.
            with contextlib.suppress(OSError):
                self._inputs.delete(event.job.job_id)
            self._checkpoints.delete(event.job.job_id)

    async def ask_store(self, work: Callable[[JobStore], T]) -> T:
        """Runs what is no transition on the one thread that uses the store."""
        return await self._in_store(partial(work, self._store))

    async def _in_store(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)
