"""From settings to what works: cores started and warmed up, and the pools that they join."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cinecat.engines.errors import ModelError
from cinecat.engines.messages import ModelInfo
from cinecat.plugins.registry import StyleRegistry
from cinecat.server.artifacts import ArtifactStore
from cinecat.server.backlog import Backlog
from cinecat.server.cards import Seat
from cinecat.server.checkpoints import Checkpoints
from cinecat.server.circuit import Circuit
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.costs import Costs
from cinecat.server.executors import new_core
from cinecat.server.fleet import Fleet
from cinecat.server.inputs import JobInputs
from cinecat.server.jobs import Jobs
from cinecat.server.metrics import Metrics
from cinecat.server.models import describe_model
from cinecat.server.patience import Patience
from cinecat.server.policy import POLICIES
from cinecat.server.pool import Pool
from cinecat.server.render import CheckpointRule, Renderer
from cinecat.server.replica import Replica
from cinecat.server.settings import Settings
from cinecat.server.style_activity import StyleActivity
from cinecat.server.styles import StyleCatalogue
from cinecat.server.warmup import warm_up
from cinecat.v1 import models_pb2


@dataclass(frozen=True)
class Loaded:
    """A replica that is warm, and the model that it has."""

    replica: Replica
    info: ModelInfo
    model: models_pb2.Model


@dataclass(frozen=True)
class Loader:
    """What replicas and pools are made with."""

    fleet: Fleet
    jobs: Jobs
    inputs: JobInputs
    artifacts: ArtifactStore
    checkpoints: Checkpoints
    registry: StyleRegistry
    activity: StyleActivity
    metrics: Metrics
    patience: Patience
    circuit: Circuit
    profile_dir: Path | None
    on_change: Callable[[], Awaitable[None]]

    async def load(self, name: str, settings: Settings, seat: Seat) -> Loaded:
        """Starts a core and warms it up.

        Args:
            name: of the model; empty is the checkpoint's own.
            settings: the model's.
            seat: one that `cards.next_seat` gave.

        Raises:
            ModelError, CoreDied: the model cannot be served there.
        """
        gauges = CoreGauges(self.metrics)
        core = new_core(settings, seat, gauges)
        self.fleet.cores.add(core)
        replica = Replica(core, gauges, self.activity, seat)
        try:
            info = await core.start()
            info = replace(info, name=name or info.name)
            model = describe_model(info, settings)
            replica.resident = await warm_up(core, info, model)
        except BaseException as error:
            await self.unload(replica)
            if name and isinstance(error, ModelError):
                raise ModelError(f"models.{name}: {error}") from error
            raise
        replica.state_bytes = info.state_bytes
        gauges.slots(len(replica.resident))
        return Loaded(replica, info, model)

    async def unload(self, replica: Replica) -> None:
        """Stops a core that no pool has, or has any more."""
        await replica.core.stop()
        replica.leave()
        self.fleet.cores.discard(replica.core)

    def catalogue(self, loaded: Loaded) -> StyleCatalogue:
        """The styles, as a model can wear them."""
        return StyleCatalogue(self.registry, loaded.info, self.activity)

    def pool(self, loaded: Loaded, settings: Settings) -> Pool:
        """A pool for a model, without a replica yet."""
        costs = Costs()
        renderer = Renderer(
            loaded.model,
            self.jobs,
            self.catalogue(loaded),
            self.inputs,
            self.artifacts,
            self.checkpoints,
            CheckpointRule(settings.checkpoint_steps, settings.checkpoint_seconds),
            self.metrics,
            costs,
            self.patience,
            self.profile_dir,
        )
        backlog = Backlog(self.jobs, costs, settings.max_batch, self.metrics)
        policy = POLICIES[settings.scheduling]
        return Pool(renderer, backlog, policy, self.circuit, self.fleet.broken, self.on_change)
