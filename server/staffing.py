"""How many replicas each model has, and which: as the settings want it, whenever they are read."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from cinecat.engines.errors import EngineError
from cinecat.engines.messages import ModelInfo
from cinecat.server.cards import Seat, next_seat
from cinecat.server.fleet import Fleet
from cinecat.server.loading import Loaded, Loader
from cinecat.server.models import describe_model
from cinecat.server.pool import Pool
from cinecat.server.replica import Replica
from cinecat.server.settings import PER_MODEL, Settings, SettingsError

_FRONT_ALONE = frozenset({"replicas", "default_size", "max_batch", "max_tokens", "max_steps"})
"""Settings of a model that no engine core was started with."""

log = structlog.get_logger(__name__)


@dataclass
class _Staffed:
    """A pool, and the settings that it has come to.

    Attributes:
        joining: what has replicas join in the background.
    """

    pool: Pool
    settings: Settings
    info: ModelInfo
    joining: list[asyncio.Task[None]] = field(default_factory=list)

    def joined(self, task: asyncio.Task[None]) -> None:
        """Takes note that one of those is done."""
        if task in self.joining:
            self.joining.remove(task)

    def cancel(self, joining: int) -> None:
        """Gives up all but so many of those that join."""
        kept = max(0, joining)
        for task in self.joining[kept:]:
            task.cancel()
        del self.joining[kept:]


class Staffing:
    """Makes a fleet what the settings say."""

    def __init__(self, fleet: Fleet, loader: Loader) -> None:
        self._fleet = fleet
        self._loader = loader
        self._settings = Settings()
        self._staffed: dict[str, _Staffed] = {}  # by the name in the settings
        self._made_by: dict[Replica, Settings] = {}  # what each replica was loaded with
        self._background: set[asyncio.Task[None]] = set()

    async def start(self, settings: Settings) -> None:
        """Loads every replica of every model, side by side; where they may have to wait for room, the first of each,
        and the others join as they can.

        Raises:
            ModelError, CoreDied: one of them cannot be served; the fleet is to be stopped.
            SettingsError: two models have one name.
        """
        self._settings = settings
        taken: list[Seat] = []
        loading: dict[str, list[asyncio.Task[Loaded]]] = {}
        for name, own in settings.served.items():
            seats: list[Seat] = []
            for _ in range(1 if _may_wait(own) else own.replicas):
                seats.append(next_seat(own.device, own.shard, seats, taken))
            loading[name] = [asyncio.create_task(self._loader.load(name, own, seat)) for seat in seats]
            taken += seats
        await _all_or_none([task for tasks in loading.values() for task in tasks])
        for name, own in settings.served.items():
            first, *others_loaded = [task.result() for task in loading[name]]
            self._made_by |= {loaded.replica: own for loaded in (first, *others_loaded)}
            pool = await self._open(name, own, first)
            for loaded in others_loaded:
                await pool.join(loaded.replica)
            await self._fill(name, own, pool)

    async def reconcile(self, settings: Settings) -> None:
        """Makes the running fleet what other settings say: what joins is loaded first, then leaves what leaves. A model
        for which that fails stays as it is, and the log says why; the next call tries again.
        """
        settings = self._with_what_stays(settings)
        served = settings.served
        for name in self._staffed.keys() - served.keys():
            gone = self._staffed.pop(name)
            gone.cancel(0)
            self._let_go(gone.pool)
        for name, own in served.items():
            try:
                await self._staff(name, own)
            except (EngineError, SettingsError, OSError) as error:
                log.error("model stays as it is", setting=f"models.{name}" if name else "model", error=f"{error}")
        order = list(served)
        places = {staffed.pool.model.name: order.index(name) for name, staffed in self._staffed.items()}
        # A new list: requests are checked in threads.
        self._fleet.pools = sorted(self._fleet.pools, key=lambda pool: places[pool.model.name])
        self._settings = settings
        log.info("settings read again", models=[model.name for model in self._fleet.models])

    async def close(self) -> None:
        """Ends what is still being done in the background; draining the fleet is its own affair."""
        for task in self._background:
            task.cancel()
        if self._background:
            await asyncio.wait(self._background)

    def _with_what_stays(self, settings: Settings) -> Settings:
        """Of new settings those that can change at run time, of the others what they were."""
        fixed = Settings.model_fields.keys() - PER_MODEL - {"models"}
        changed = sorted(name for name in fixed if getattr(settings, name) != getattr(self._settings, name))
        if changed:
            log.warning("settings that change with a restart only", settings=changed)
        return settings.model_copy(update={name: getattr(self._settings, name) for name in changed})

    async def _staff(self, name: str, own: Settings) -> None:
        staffed = self._staffed.get(name)
        if staffed is None:
            pool = await self._open(name, own, await self._load(name, own, None))
        elif any(self._is_outdated(replica, own) for replica in _present(staffed.pool)):
            pool = await self._roll(name, staffed, own)
        else:
            pool = staffed.pool
            if _differ(staffed.settings, own, _FRONT_ALONE - {"replicas"}):
                model = describe_model(staffed.info, own)
                model.engine = pool.model.engine
                pool.renew(model, pool.catalogue, own.max_batch)
        await self._fill(name, own, pool)
        self._staffed[name].settings = own

    async def _fill(self, name: str, own: Settings, pool: Pool) -> None:
        """Makes the replicas of a model as many as they should be."""
        staffed, present = self._staffed[name], _present(pool)
        staffed.cancel(own.replicas - len(present))
        for _ in range(own.replicas - len(present) - len(staffed.joining)):
            if _may_wait(own):
                task = self._in_background(self._join_sometime(name, own, pool))
                staffed.joining.append(task)
                task.add_done_callback(staffed.joined)
            else:
                loaded = await self._load(name, own, pool)
                await pool.join(loaded.replica)
        for replica in present[own.replicas :]:
            self._send_off(pool, replica)

    async def _join_sometime(self, name: str, own: Settings, pool: Pool) -> None:
        """Tries until there is one more replica, or the server drains."""
        for attempt in itertools.count():
            try:
                loaded = await self._load(name, own, pool)
            except (EngineError, OSError) as error:
                log.error("replica does not start", model=pool.model.name, attempt=attempt, error=f"{error}")
                if await self._loader.patience.drained_while_waiting(attempt + 1):
                    return
            else:
                await pool.join(loaded.replica)
                return

    async def _open(self, name: str, own: Settings, loaded: Loaded) -> Pool:
        """A pool with its first replica."""
        if any(pool.model.name == loaded.model.name for pool in self._fleet.pools):
            await self._loader.unload(loaded.replica)
            raise SettingsError(f"models: {loaded.model.name} is what the first model is called; choose another name")
        pool = self._loader.pool(loaded, own)
        self._staffed[name] = _Staffed(pool, own, loaded.info)
        self._fleet.pools.append(pool)
        await pool.join(loaded.replica)
        return pool

    async def _roll(self, name: str, staffed: _Staffed, own: Settings) -> Pool:
        """Replaces the outdated replicas of a model one after the other, as many as there are to be; the others leave.
        Where a load fails half through, the next call goes on from there, or back.
        """
        pool = staffed.pool
        present = sorted(_present(pool), key=lambda replica: self._is_outdated(replica, own))
        kept, leaving = present[: own.replicas], present[own.replicas :]
        staffed.cancel(0)
        for number, old in enumerate(each for each in kept if self._is_outdated(each, own)):
            stays = not _differ(self._made_by[old], own, frozenset({"device", "shard"}))
            loaded = await self._load(name, own, pool, old.seat if stays else None)
            if loaded.model.name != pool.model.name:
                # The first model is called what its checkpoint is called: it is another model.
                opened = await self._open(name, own, loaded)
                self._let_go(pool)
                return opened
            if number == 0:
                pool.renew(loaded.model, self._loader.catalogue(loaded), own.max_batch)
                staffed.info = loaded.info
            await pool.join(loaded.replica)
            await self._retire(pool, old)
        for old in leaving:
            self._send_off(pool, old)
        return pool

    def _is_outdated(self, replica: Replica, own: Settings) -> bool:
        return _differ(self._made_by[replica], own, PER_MODEL - _FRONT_ALONE)

    async def _load(self, name: str, own: Settings, pool: Pool | None, seat: Seat | None = None) -> Loaded:
        """A warm replica, on devices of its own where none is given."""
        mine = [] if pool is None else [replica.seat for replica in pool.replicas]
        pools = [*self._fleet.pools, *self._fleet.leaving]
        others = [replica.seat for each in pools if each is not pool for replica in each.replicas]
        if pool is not None:
            pool.loading += 1
        try:
            loaded = await self._loader.load(name, own, seat or next_seat(own.device, own.shard, mine, others))
            self._made_by[loaded.replica] = own
            return loaded
        finally:
            if pool is not None:
                pool.loading -= 1

    def _send_off(self, pool: Pool, replica: Replica) -> None:
        replica.state = "draining"  # at once, so that it is counted no more
        self._in_background(self._retire(pool, replica))

    async def _retire(self, pool: Pool, replica: Replica) -> None:
        await pool.retire(replica, self._settings.drain_seconds)
        await self._loader.unload(replica)
        self._made_by.pop(replica, None)

    def _let_go(self, pool: Pool) -> None:
        """No request is for the model any more, and its replicas leave when its jobs are done."""
        log.info("model leaves when its jobs are done", model=pool.model.name)
        self._fleet.pools = [each for each in self._fleet.pools if each is not pool]
        self._fleet.leaving.append(pool)
        self._in_background(self._close(pool))

    async def _close(self, pool: Pool) -> None:
        await pool.backlog.until_empty()
        await asyncio.gather(*(self._retire(pool, replica) for replica in _present(pool)))
        self._fleet.leaving.remove(pool)
        # Their requests were checked while the model was offered, and accepted when nobody took jobs of it any more.
        for late in pool.backlog.unfinished:
            pool.backlog.remove(late)
            self._fleet.enqueue(late.live)
        if self._fleet.pool(pool.model.name) is None:  # and it was not offered again meanwhile
            pool.unload()
        log.info("model has left", model=pool.model.name)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _may_wait(settings: Settings) -> bool:
    """Whether a replica's place is found by somebody who lets it wait for one."""
    return settings.executor == "ray"


def _present(pool: Pool) -> list[Replica]:
    return [replica for replica in pool.replicas if replica.state != "draining"]


def _differ(before: Settings, after: Settings, names: frozenset[str]) -> bool:
    return any(getattr(before, name) != getattr(after, name) for name in names)


async def _all_or_none(tasks: Sequence[asyncio.Task[Loaded]]) -> None:
    """Waits for all of them; the error of one ends the others."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
