"""A fleet that is staffed with scripted cores, for the tests of what settings make of a running server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cinecat.engines.errors import ModelError
from cinecat.plugins.registry import BUNDLED, StyleRegistry
from cinecat.server.artifacts import ArtifactStore
from cinecat.server.cards import Seat
from cinecat.server.circuit import Circuit
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.fleet import Fleet
from cinecat.server.live_job import LiveJob
from cinecat.server.loading import Loaded, Loader
from cinecat.server.models import describe_model
from cinecat.server.patience import Patience
from cinecat.server.replica import Replica
from cinecat.server.settings import Settings
from cinecat.server.staffing import Staffing
from cinecat.server.style_activity import StyleActivity
from tests.server.samples import Front, front, model_info, new_job
from tests.server.scripted_core import ScriptedCore


@dataclass(frozen=True)
class ScriptedLoader(Loader):
    """Loads scripted cores; a checkpoint is called what its folder is called.

    Attributes:
        room: for so many more; then a load waits.
        unloading: replicas are unloaded when it is set.
        loaded: path of the model, device and core of each, in the order of loading.
    """

    loaded: list[tuple[str, str, ScriptedCore]] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(100))
    unloading: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.unloading.set()

    async def unload(self, replica: Replica) -> None:
        await self.unloading.wait()
        await super().unload(replica)

    async def load(self, name: str, settings: Settings, seat: Seat) -> Loaded:
        if settings.model in self.broken:
            raise ModelError(f"model: {settings.model} is broken")
        await self.room.acquire()
        core: Any = ScriptedCore()
        core.gate.clear()
        self.loaded.append((settings.model, seat.device, core))
        info = replace(model_info(), name=name or Path(settings.model).parts[0])
        replica = Replica(core, CoreGauges(self.metrics), self.activity, seat)
        self.fleet.cores.add(core)
        return Loaded(replica, info, describe_model(info, settings))


class House:
    """A fleet, and who staffs it."""

    def __init__(self, f: Front, folder: Path) -> None:
        self.front = f
        patience, circuit = Patience(), Circuit()
        self.fleet = Fleet(f.jobs, patience, circuit, 10, f.metrics)
        self.loader = ScriptedLoader(
            self.fleet,
            f.jobs,
            f.inputs,
            ArtifactStore(str(folder / "artifacts")),
            f.checkpoints,
            StyleRegistry([BUNDLED]),
            StyleActivity(),
            f.metrics,
            patience,
            circuit,
            None,
            self._on_change,
        )
        self.staffing = Staffing(self.fleet, self.loader)

    async def _on_change(self) -> None:
        pass

    @property
    def cores(self) -> list[ScriptedCore]:
        return [core for _, _, core in self.loader.loaded]

    @property
    def models(self) -> list[str]:
        return [model.name for model in self.fleet.models]

    def replicas(self, model: str, state: str = "ready") -> float | None:
        return self.front.registry.get_sample_value("cinecat_replicas", {"model": model, "state": state})

    async def enqueue(self, name: str, model: str = "wan-tiny", steps: int = 2) -> LiveJob:
        job = new_job(name)
        job.clip.model, job.clip.steps = model, steps
        live = await self.front.accept(job)
        self.fleet.enqueue(live)
        return live

    def release(self) -> None:
        for core in self.cores:
            core.gate.set()


def with_house(folder: Path, scenario: Callable[[House], Any], **settings: Any) -> None:
    async def run() -> None:
        async with house(folder) as running:
            await running.staffing.start(Settings.model_validate(settings))
            await asyncio.wait_for(scenario(running), 60)

    asyncio.run(run())


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    async with front(folder) as f:
        running = House(f, folder)
        yield running
        running.release()
        await running.staffing.close()
        await running.fleet.drain(60, asyncio.Event())
        await running.fleet.stop()
        assert not running.fleet.broken.done()
