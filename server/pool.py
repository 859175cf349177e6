"""The replicas of one model and the queue that they share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog

from cinecat.server.backlog import Backlog
from cinecat.server.circuit import Circuit
from cinecat.server.live_job import LiveJob
from cinecat.server.metrics import REPLICA_STATES
from cinecat.server.policy import Policy
from cinecat.server.render import Renderer
from cinecat.server.replica import Replica, State
from cinecat.server.scheduler import Scheduler
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import models_pb2

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Member:
    replica: Replica
    scheduler: Scheduler
    worker: asyncio.Task[None]


class Pool:
    """A model that is served.

    Attributes:
        backlog: its jobs.
        broken: done with the error where a replica's task ended by one; jobs would wait for ever.
    """

    def __init__(
        self,
        renderer: Renderer,
        backlog: Backlog,
        policy: Policy,
        circuit: Circuit,
        broken: asyncio.Future[None],
        on_change: Callable[[], Awaitable[None]],
    ) -> None:
        """`on_change` hears when a replica has begun or ceased to work."""
        self.backlog = backlog
        self._renderer = renderer
        self._policy = policy
        self._circuit = circuit
        self._broken = broken
        self._on_change = on_change
        self._members: list[_Member] = []
        self._loading = 0
        self._counted = dict.fromkeys(REPLICA_STATES, 0)
        renderer.metrics.loaded(self.model)

    @property
    def model(self) -> models_pb2.Model:
        return self._renderer.model

    @property
    def catalogue(self) -> StyleCatalogue:
        return self._renderer.catalogue

    @property
    def replicas(self) -> list[Replica]:
        """Those that are part of it, in the order in which they joined."""
        return [member.replica for member in self._members]

    @property
    def works(self) -> bool:
        """Whether some replica takes jobs."""
        return any(replica.state == "ready" for replica in self.replicas)

    def enqueue(self, live: LiveJob) -> None:
        """Takes on an accepted job."""
        self.backlog.add(self._renderer.take(live))

    async def join(self, replica: Replica) -> None:
        """Lets a replica whose model is loaded take work."""

        async def on_works(alive: bool) -> None:
            if replica.state != "draining":
                await self._move(replica, "ready" if alive else "restarting")

        r = self._renderer
        scheduler = Scheduler(
            r.jobs, r, replica, self.backlog, self._policy, r.metrics, r.patience, self._circuit, on_works
        )
        replica.state = "ready"
        worker = asyncio.create_task(scheduler.run())
        worker.add_done_callback(self._ended)
        self._members.append(_Member(replica, scheduler, worker))
        await self._move(replica, "ready")

    async def retire(self, replica: Replica, seconds: float) -> None:
        """Lets a replica take no more work, gives its jobs this long, then puts them back into the queue with what was
        saved of them, and lets it go; its core runs on.
        """
        member = next(each for each in self._members if each.replica is replica)
        log.info("replica drains", model=self.model.name, device=replica.seat.device)
        await self._move(replica, "draining")
        member.scheduler.retire()
        await asyncio.wait([member.worker], timeout=seconds)
        member.scheduler.send_out()
        await asyncio.wait([member.worker])
        await member.scheduler.finished()
        self._members.remove(member)
        self._count()
        log.info("replica has left", model=self.model.name, device=replica.seat.device)

    @property
    def workers(self) -> list[asyncio.Task[None]]:
        """Each is done when its replica has nothing more to do."""
        return [member.worker for member in self._members]

    def kill_busy(self) -> None:
        """Ends the cores that are still at work: a forward cannot be interrupted, a process can."""
        for member in self._members:
            if not member.worker.done():
                member.replica.core.kill()

    async def finished(self) -> None:
        """Until the files of jobs that have left their cores are complete."""
        for member in list(self._members):
            await member.scheduler.finished()

    @property
    def loading(self) -> int:
        """How many replicas are about to join."""
        return self._loading

    @loading.setter
    def loading(self, replicas: int) -> None:
        self._loading = replicas
        self._count()

    def renew(self, model: models_pb2.Model, catalogue: StyleCatalogue, most_together: int) -> None:
        """Takes requests for the model as it is from now on; jobs that were accepted before keep what they have."""
        self._renderer.metrics.unloaded(self.model)
        self._renderer = replace(self._renderer, model=model, catalogue=catalogue)
        self._renderer.metrics.loaded(model)
        self.backlog.most_together = most_together

    def unload(self) -> None:
        """Says that the model is served no more, once its replicas have left."""
        self._renderer.metrics.unloaded(self.model)

    async def _move(self, replica: Replica, state: State) -> None:
        replica.state = state
        self._count()
        await self._on_change()

    def _count(self) -> None:
        states = [*(f"{replica.state}" for replica in self.replicas), *(["loading"] * self._loading)]
        for state in REPLICA_STATES:
            count = states.count(state)
            # Another pool may have the name, while this one leaves.
            self._renderer.metrics.replicas.labels(self.model.name, state).inc(count - self._counted[state])
            self._counted[state] = count

    def _ended(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled() and (error := worker.exception()) is not None and not self._broken.done():
            self._broken.set_exception(error)
