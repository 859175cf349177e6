"""What becomes of jobs that have ended: their files and then their rows go, for their age or for the room they take.

Files go before the row that tells of them, so that a removal which was cut short is finished by the next round. A job
whose file is being downloaded at that moment is kept until the download has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import structlog

from cinecat.server.artifacts import ArtifactError, ArtifactStore
from cinecat.server.jobs import Jobs
from cinecat.server.metrics import Metrics
from cinecat.server.store import EndedJob, JobStore
from cinecat.v1 import job_pb2 as pb

_ROUND_S = 60.0

# Jobs looked at in one round.
_AT_ONCE = 1000

# A clip stays this long for its caller to fetch it, also where there is too little room.
_FETCH_S = 600.0

log = structlog.get_logger(__name__)


class Retention:
    """Removes ended jobs. Never one that has not ended."""

    def __init__(
        self,
        jobs: Jobs,
        artifacts: ArtifactStore,
        keep_days: float,
        keep_gib: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives seconds since 1970. 0 days keep jobs for ever, 0 GiB are no limit."""
        self._jobs = jobs
        self._artifacts = artifacts
        self._keep_s = keep_days * 86_400
        self._keep_bytes = round(keep_gib * 2**30)
        self._metrics = metrics
        self._clock = clock

    async def run(self) -> None:
        """Removes orphans once, then works round by round until it is cancelled. What fails is tried again."""
        orphans_left = True
        while True:
            try:
                if orphans_left:
                    await self.remove_orphans()
                    orphans_left = False
                await self.round()
            except Exception as error:
                log.error("retention failed; it is tried again", exc_info=error)
            await asyncio.sleep(_ROUND_S)

    async def round(self) -> None:
        """Removes what is too old, then the oldest while the files of all jobs take too much room.

        Raises:
            OSError, SQLAlchemyError: the database cannot be asked, or written.
        """
        if self._keep_s:
            too_old = partial(JobStore.ended, before_us=self._ago_us(self._keep_s), limit=_AT_ONCE)
            for job in await self._jobs.ask_store(too_old):
                await self._remove(job, "age")
        if self._keep_bytes:
            excess = await self._jobs.ask_store(JobStore.artifact_bytes) - self._keep_bytes
            if excess <= 0:
                return
            oldest = partial(JobStore.ended, before_us=self._ago_us(_FETCH_S), limit=_AT_ONCE, with_artifacts=True)
            for job in await self._jobs.ask_store(oldest):
                if excess <= 0:
                    return
                if await self._remove(job, "size"):
                    excess -= job.artifact_bytes

    async def remove_orphans(self) -> None:
        """Removes the files of jobs that failed, were cancelled, or that the database does not know.

        The last only where the files are this database's own: they are claimed when nothing but its own jobs is there.

        Raises:
            ArtifactError, OSError, SQLAlchemyError: they cannot be listed or asked for.
        """
        # Listed before the database is asked: a job is stored before it leaves any file.
        listed = await asyncio.to_thread(self._artifacts.job_ids)
        states = await self._jobs.ask_store(lambda store: store.states(listed))
        unknown = [job_id for job_id in listed if job_id not in states]
        if not await self._owns_artifacts(unknown) and unknown:
            log.warning("artifact_url holds clips of jobs that this database does not know; kept", jobs=len(unknown))
            unknown = []
        # An unfinished one may have written its file a moment ago.
        ended = [job_id for job_id, state in states.items() if state in (pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)]
        for job_id in [*unknown, *ended]:
            await asyncio.to_thread(self._artifacts.delete_job, job_id)
            self._metrics.jobs_removed.labels("orphan").inc()
            log.info("orphaned artifacts removed", job_id=job_id)

    async def _owns_artifacts(self, unknown: list[str]) -> bool:
        identity = await self._jobs.ask_store(lambda store: store.identity)
        owner = await asyncio.to_thread(self._artifacts.owner)
        if not owner and not unknown:
            await asyncio.to_thread(self._artifacts.claim, identity)
            return True
        return owner == identity

    async def _remove(self, job: EndedJob, reason: str) -> bool:
        if self._artifacts.is_being_read(job.job_id):
            return False
        try:
            await asyncio.to_thread(self._artifacts.delete_job, job.job_id)
        except ArtifactError as error:
            log.error("artifacts cannot be removed; tried again", job_id=job.job_id, error=f"{error}")
            return False
        await self._jobs.ask_store(lambda store: store.delete(job.job_id))
        self._metrics.jobs_removed.labels(reason).inc()
        log.info("job removed", job_id=job.job_id, reason=reason)
        return True

    def _ago_us(self, seconds: float) -> int:
        return round((self._clock() - seconds) * 1e6)
