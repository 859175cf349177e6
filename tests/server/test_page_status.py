"""What the status page shows is gathered once for all who ask at the same moment, and seldom for strangers."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from cinecat.server.page import status as module
from cinecat.server.page.keys import READER, Viewer, is_addressed_to_loopback
from cinecat.server.page.status import Served, Statuses

ACME = Viewer(tenant="acme", may_act=True)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For whom it was gathered."""
    tenants: list[str] = []

    async def status(served: Served, viewer: Viewer) -> dict[str, Any]:
        tenants.append(viewer.tenant)
        await asyncio.sleep(0.01)
        return {"jobs of": viewer.tenant}

    monkeypatch.setattr(module, "status", status)
    return tenants


def test_many_who_ask_at_once_cost_one_answer_for_each_tenant(gathered: list[str]) -> None:
    async def scenario() -> None:
        statuses = Statuses(cast(Served, None))
        answers = await asyncio.gather(*(statuses.of(viewer) for viewer in (READER, ACME) * 50))
        assert answers == [{"jobs of": ""}, {"jobs of": "acme"}] * 50

    asyncio.run(scenario())
    assert gathered == ["", "acme"]


def test_whoever_has_a_key_sees_what_has_just_changed_and_strangers_wait(gathered: list[str]) -> None:
    async def scenario() -> None:
        statuses = Statuses(cast(Served, None))
        for viewer in (ACME, READER) * 3:
            await statuses.of(viewer)

    asyncio.run(scenario())
    assert (gathered.count("acme"), gathered.count("")) == (3, 1)


def test_the_answer_survives_whoever_asked_for_it_first(gathered: list[str]) -> None:
    async def scenario() -> None:
        statuses = Statuses(cast(Served, None))
        first = asyncio.create_task(statuses.of(ACME))
        second = asyncio.create_task(statuses.of(ACME))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == {"jobs of": "acme"}

    asyncio.run(scenario())
    assert gathered == ["acme"]


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("LOCALHOST:9464", True),
        ("127.0.0.1:9464", True),
        ("127.9.9.9", True),
        ("[::1]:9464", True),
        ("", False),
        ("[", False),
        ("localhost.example", False),
        ("127.0.0.1.example:9464", False),
        ("localhost@example", False),
        ("10.0.0.1:9464", False),
    ],
)
def test_only_names_of_this_machine_are_its_own(host: str, loopback: bool) -> None:
    assert is_addressed_to_loopback(host) is loopback
