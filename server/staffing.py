"""How many replicas each model has, and which: as the settings want it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cinecat.server.cards import next_device
from cinecat.server.fleet import Fleet
from cinecat.server.loading import Loaded, Loader
from cinecat.server.settings import Settings, SettingsError


class Staffing:
    """Makes a fleet what the settings say."""

    def __init__(self, fleet: Fleet, loader: Loader) -> None:
        self._fleet = fleet
        self._loader = loader

    async def start(self, settings: Settings) -> None:
        """Loads every replica of every model, side by side.

        Raises:
            ModelError, CoreDied: one of them cannot be served; the fleet is to be stopped.
            SettingsError: two models have one name.
        """
        served = settings.served
        devices: dict[str, list[str]] = {}
        loading: dict[str, list[asyncio.Task[Loaded]]] = {}
        for name, own in served.items():
            devices[name], loading[name] = [], []
            for _ in range(own.replicas):
                others = [device for model, taken in devices.items() if model != name for device in taken]
                device = next_device(own.device, devices[name], others)
                devices[name].append(device)
                loading[name].append(asyncio.create_task(self._loader.load(name, own, device)))
        await _all_or_none([task for tasks in loading.values() for task in tasks])
        for name, own in served.items():
            replicas = [task.result() for task in loading[name]]
            if self._fleet.pool(model := replicas[0].model.name) is not None:
                raise SettingsError(f"models: {model} is what the first model is called; choose another name")
            pool = self._loader.pool(replicas[0], own)
            self._fleet.pools.append(pool)
            for loaded in replicas:
                await pool.join(loaded.replica)


async def _all_or_none(tasks: Sequence[asyncio.Task[Loaded]]) -> None:
    """Waits for all of them; the error of one ends the others."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
