"""A fleet of one model over scripted cores, for the tests of what works off its queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cinecat.server.artifacts import ArtifactStore
from cinecat.server.backlog import Backlog
from cinecat.server.circuit import Circuit
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.costs import Costs
from cinecat.server.fleet import Fleet
from cinecat.server.live_job import LiveJob
from cinecat.server.patience import Patience
from cinecat.server.policy import by_step
from cinecat.server.pool import Pool
from cinecat.server.render import CheckpointRule, Renderer
from cinecat.server.replica import Replica
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import NEVER_S, Front, catalogue, front, model, new_job, until
from tests.server.scripted_core import ScriptedCore

ENDED = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)


class Line:
    """A fleet of one model over scripted cores, and all that it works with.

    Attributes:
        core: of the first replica.
        core_states: whether there is a core to work with, whenever that changed.
    """

    def __init__(self, f: Front, folder: Path, max_queue: int, most_together: int, state_bytes: int) -> None:
        self.front = f
        self.state_bytes = state_bytes
        self.cores: list[ScriptedCore] = []
        self.replicas: list[Replica] = []
        self.core_states: list[bool] = []
        self.costs = Costs()
        self.artifacts = ArtifactStore(str(folder / "artifacts"))
        self.renderer = renderer = Renderer(
            model(),
            f.jobs,
            catalogue(),
            f.inputs,
            self.artifacts,
            f.checkpoints,
            CheckpointRule(steps=2, seconds=NEVER_S),
            f.metrics,
            self.costs,
            patience := Patience(),
        )
        self.backlog = Backlog(f.jobs, self.costs, most_together, f.metrics)
        circuit = Circuit()
        self.fleet = Fleet(f.jobs, patience, circuit, max_queue, f.metrics)
        self.pool = Pool(renderer, self.backlog, by_step, circuit, self.fleet.broken, self._on_change)
        self.fleet.pools.append(self.pool)

    async def join(self) -> ScriptedCore:
        core = ScriptedCore()
        scripted: Any = core
        replica = Replica(scripted, CoreGauges(self.front.metrics), self.renderer.catalogue.activity)
        replica.state_bytes = self.state_bytes
        self.cores.append(core)
        self.replicas.append(replica)
        await self.pool.join(replica)
        return core

    @property
    def core(self) -> ScriptedCore:
        return self.cores[0]

    @property
    def begun(self) -> list[list[str]]:
        """Jobs that each core began."""
        return [core.begun for core in self.cores]

    async def _on_change(self) -> None:
        if self.fleet.works != (self.core_states[-1] if self.core_states else True):
            self.core_states.append(self.fleet.works)

    async def add(self, job: pb.Job, tenant: str = "") -> LiveJob:
        job.clip.model = "wan-tiny"
        live = await self.front.accept(job, tenant)
        self.fleet.enqueue(live)
        return live

    def jobs(self, *names: str, style: str = "", fingerprint: str = "", **changes: Any) -> list[pb.Job]:
        made = [new_job(name) for name in names]
        for job in made:
            if style:
                job.clip.styles.add(name=style, strength=1.0, fingerprint=fingerprint)
            job.MergeFrom(pb.Job(**changes))
        return made

    async def enqueue(self, *names: str, **changes: Any) -> list[LiveJob]:
        return [await self.add(job) for job in self.jobs(*names, **changes)]

    async def drain(self, seconds: float = NEVER_S, hurry: asyncio.Event | None = None) -> None:
        await self.fleet.drain(seconds, hurry or asyncio.Event())


def with_line(
    folder: Path,
    scenario: Callable[[Line], Any],
    *,
    max_queue: int = 10,
    most_together: int = 8,
    state_bytes: int = 0,
    replicas: int = 1,
    core_refuses: tuple[Exception, ...] = (),
) -> None:
    async def run() -> None:
        async with line(folder, max_queue, most_together, state_bytes, replicas) as running:
            running.core.refusals += core_refuses
            await asyncio.wait_for(scenario(running), 60)

    asyncio.run(run())


@asynccontextmanager
async def line(
    folder: Path, max_queue: int = 10, most_together: int = 8, state_bytes: int = 0, replicas: int = 1
) -> AsyncIterator[Line]:
    async with front(folder) as f:
        running = Line(f, folder, max_queue, most_together, state_bytes)
        for _ in range(replicas):
            await running.join()
        yield running
        for core in running.cores:
            core.gate.set()
        await running.drain()
        assert not running.fleet.broken.done()
        assert not any(core.states for core in running.cores)


async def ended(*jobs: LiveJob) -> None:
    await until(lambda: all(live.transitions[-1].job.state in ENDED for live in jobs))
