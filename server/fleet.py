"""The models that a server serves: which of them a request is for, whether it is taken, and when all is done."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import grpc

from cinecat.server.circuit import Circuit
from cinecat.server.core import Core
from cinecat.server.errors import RequestError, ShuttingDown
from cinecat.server.jobs import Jobs
from cinecat.server.live_job import LiveJob
from cinecat.server.metrics import Metrics
from cinecat.server.models import fitting_model
from cinecat.server.patience import Patience
from cinecat.server.pool import Pool
from cinecat.server.replica import Replica
from cinecat.server.styles import StyleCatalogue
from cinecat.server.validation import AcceptableClip, check_clip
from cinecat.v1 import clip_pb2, models_pb2


class Fleet:
    """All pools of a server.

    Attributes:
        pools: those that requests may be for; the first is that of the default model.
        leaving: those that only work off what they have.
        cores: all that were made and have not left.
        broken: done with the error where a replica's task ended by one; jobs would wait for ever.
    """

    def __init__(self, jobs: Jobs, patience: Patience, circuit: Circuit, max_queue: int, metrics: Metrics) -> None:
        """`max_queue` is how many jobs may wait, of all models."""
        self.pools: list[Pool] = []
        self.leaving: list[Pool] = []
        self.cores: set[Core] = set()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._patience = patience
        self._circuit = circuit
        self._max_queue = max_queue
        metrics.queue_limit.set(max_queue)
        jobs.on_dequeued = self._tell_positions

    @property
    def models(self) -> list[models_pb2.Model]:
        """What is offered, the default first."""
        return [pool.model for pool in self.pools]

    @property
    def works(self) -> bool:
        """Whether some replica takes jobs."""
        return any(pool.works for pool in self._all)

    def pool(self, name: str) -> Pool | None:
        """Of a model that is offered or leaving."""
        return next((pool for pool in self._all if pool.model.name == name), None)

    def replicas(self, models: Collection[str]) -> list[Replica]:
        """All of some models that are not about to leave."""
        pools = [pool for pool in self.pools if pool.model.name in models]
        return [each for pool in pools for each in pool.replicas if each.state != "draining"]

    def catalogues(self) -> list[StyleCatalogue]:
        """Of the models that are offered."""
        return [pool.catalogue for pool in self.pools]

    def admit(self, request_hash: str = "") -> None:
        """Says whether one more job may be accepted.

        Raises:
            ShuttingDown, RequestError: it may not.
        """
        if self._patience.drain.is_set():
            raise ShuttingDown("the server is shutting down; try again in a moment")
        waiting = sum(pool.backlog.waiting for pool in self._all)
        if waiting >= self._max_queue:
            message = f"{waiting} jobs are waiting, which is all that may; try again later"
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._circuit.check(request_hash)

    def check(self, clip: clip_pb2.ClipSpec) -> AcceptableClip:
        """Resolves a request for the model that it names, or else for the one that its size fits. Takes as long as
        decoding its image: run it in a thread.

        Raises:
            RequestError: with every violation found.
        """
        pools = list(self.pools)
        names = [pool.model.name for pool in pools]
        if clip.model in names:
            pool = pools[names.index(clip.model)]
        else:
            pool = pools[fitting_model([pool.model for pool in pools], clip)]
        return check_clip(clip, pool.model, pool.catalogue, names)

    def enqueue(self, live: LiveJob) -> None:
        """Takes on an accepted job. One of a model that is not there fails when it begins, and says so."""
        (self.pool(live.job.clip.model) or self.pools[0]).enqueue(live)

    async def drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Lets no further job in, gives those in the cores this long or until `hurry`, then puts them back into the
        queue, where they wait for the next start with what was saved of them.

        A job whose files are still being finished at the end of it is found unfinished by the next start.
        """
        self._patience.drain.set()
        for pool in self._all:
            pool.backlog.wake()
        hurrying = asyncio.create_task(hurry.wait())
        workers = [worker for pool in self._all for worker in pool.workers]
        working = asyncio.create_task(_all_of(workers))
        await asyncio.wait([working, hurrying], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for pool in self._all:
            pool.kill_busy()
        await working
        finishing = asyncio.create_task(self._finished())
        await asyncio.wait([finishing, hurrying], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finishing.cancel()
        hurrying.cancel()

    async def stop(self) -> None:
        """Stops every core."""
        await asyncio.gather(*(core.stop() for core in self.cores))

    @property
    def _all(self) -> list[Pool]:
        return [*self.pools, *self.leaving]

    async def _finished(self) -> None:
        for pool in self._all:
            await pool.finished()

    def _tell_positions(self) -> None:
        for pool in self._all:
            pool.backlog.tell_positions()


async def _all_of(workers: list[asyncio.Task[None]]) -> None:
    if workers:
        await asyncio.wait(workers)
