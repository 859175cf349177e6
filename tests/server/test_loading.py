"""A core that does not come up leaves nothing behind, and the error says whose it is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cinecat.engines.errors import CoreDied, ModelError
from cinecat.engines.messages import ModelInfo
from cinecat.server import loading
from cinecat.server.cards import Seat
from cinecat.server.settings import Settings
from tests.server.house import House
from tests.server.samples import front
from tests.server.scripted_core import ScriptedCore


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("", ModelError("model: no such folder"), "model: no such folder"),
        ("other", ModelError("model: no such folder"), "models.other: model: no such folder"),
        ("other", CoreDied("exit code -9"), "exit code -9"),
    ],
)
def test_a_core_that_cannot_be_loaded_is_stopped_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, message: str
) -> None:
    class Broken(ScriptedCore):
        async def start(self) -> ModelInfo:
            raise error

    async def scenario() -> None:
        core: Any = Broken()
        monkeypatch.setattr(loading, "new_core", lambda settings, seat, gauges: core)
        async with front(tmp_path) as f:
            house = House(f, tmp_path)
            with pytest.raises(type(error)) as refused:
                await loading.Loader.load(house.loader, name, Settings(), Seat("cpu"))
            assert f"{refused.value}" == message
            assert (core.died.is_set(), house.fleet.cores) == (True, set())

    asyncio.run(scenario())
