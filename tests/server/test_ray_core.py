"""What is of cores on a Ray cluster alone: where they are placed, what they leave, and whose end is whose."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry

from cinecat.engines.errors import CoreDied
from cinecat.engines.messages import CoreConfig, Failure, Release, Released
from cinecat.server import core_process, ray_link
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.metrics import Metrics
from cinecat.server.ray_core import RayCore
from cinecat.server.ray_link import Placement
from tests.server import stub_core
from tests.server.ray_cluster import add_node, ray_cluster

CONFIG = CoreConfig(model="stub", device="cpu", dtype="float32", threads=1, style_slots=1, max_rank=8, cache_bytes=0)


def core_that_writes_a_log(connection: Connection, config: CoreConfig) -> None:
    os.write(2, b"a line of the core's log\n")
    stub_core.run(connection, config)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that has room for nobody."""
    with ray_cluster() as running:
        yield running


@pytest.fixture
def new_core(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayCore]:
    monkeypatch.setattr(core_process, "run_core", core_that_writes_a_log)

    def make(**changes: Any) -> RayCore:
        placement = replace(Placement(cluster.address, cpus=1, gpus=0), **changes)
        return RayCore(CONFIG, CoreGauges(Metrics(CollectorRegistry())), placement)

    return make


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def nothing_is_left(cluster: Any) -> bool:
    """No actor, no placement group, and all CPUs are free."""
    state = cluster.global_state
    actors = {actor["State"] for actor in state.actor_table(None).values()}
    groups = {group["state"] for group in state.placement_group_table().values()}
    free = sum(node.get("CPU", 0) for node in state.available_resources_per_node().values())
    return actors <= {"DEAD"} and groups <= {"REMOVED"} and free == state.cluster_resources().get("CPU", 0)


@contextlib.asynccontextmanager
async def stopping(core: RayCore) -> AsyncIterator[None]:
    """Whatever fails in the block, no link outlives it."""
    try:
        yield
    finally:
        await core.stop()


async def logged(logs: list[Any], key: str) -> Any:
    """What the log says under a key, once it does."""
    async with asyncio.timeout(120):
        while not any(key in entry for entry in logs):  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.05)
    return next(entry[key] for entry in logs if key in entry)


@pytest.mark.slow
def test_a_core_waits_for_room_and_leaves_nothing_behind(
    cluster: Any, new_core: Callable[..., RayCore], capfd: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> int:
        core = new_core()
        async with stopping(core):
            starting = asyncio.create_task(core.start())
            assert await logged(logs, "needs") == "1 CPU"
            await asyncio.sleep(2)
            assert not starting.done()
            nodes.append(add_node(cluster, 1))  # Ray wants the main thread for it
            assert await asyncio.wait_for(starting, 120) == stub_core.INFO
            process = await logged(logs, "node_pid")
            assert not is_gone(process)
            return int(process)

    nodes: list[Any] = []
    try:
        with structlog.testing.capture_logs() as logs:
            process = asyncio.run(scenario())
        eventually(lambda: is_gone(process) and nothing_is_left(cluster))
    finally:
        for node in nodes:
            cluster.remove_node(node)
    assert [entry["event"] for entry in logs if "needs" in entry] == [
        "no node has room for a replica; it waits until one has"
    ]
    assert "a line of the core's log\n" in capfd.readouterr().err


@pytest.mark.slow
def test_a_core_that_waits_for_room_can_be_stopped(cluster: Any, new_core: Callable[..., RayCore]) -> None:
    async def scenario() -> None:
        core = new_core(gpus=1)
        async with stopping(core):
            starting = asyncio.create_task(core.start())
            assert await logged(logs, "needs") == "1 CPU, 1 GPU"
        with pytest.raises(CoreDied):
            await starting

    with structlog.testing.capture_logs() as logs:
        asyncio.run(scenario())
    eventually(lambda: nothing_is_left(cluster))


@pytest.mark.slow
def test_the_core_ends_with_its_link_and_another_is_placed(cluster: Any, new_core: Callable[..., RayCore]) -> None:
    async def scenario() -> None:
        # No GPU is asked for where the cluster has none and none is needed.
        core = new_core(gpus=1, gpus_optional=True)
        async with stopping(core):
            await core.start()
            first, died = await logged(logs, "node_pid"), core.died
            assert core.pid is not None
            os.kill(core.pid, signal.SIGKILL)
            await asyncio.wait_for(died.wait(), 5)
            await core.restart()
            assert is_gone(first)
            assert await core.call(Release("any"), Released) == Released()

    node = add_node(cluster, 1)
    try:
        with structlog.testing.capture_logs() as logs:
            asyncio.run(scenario())
        eventually(lambda: nothing_is_left(cluster))
    finally:
        cluster.remove_node(node)


@pytest.mark.slow
def test_an_address_without_a_cluster_is_told_soon(new_core: Callable[..., RayCore]) -> None:
    async def scenario() -> None:
        core = new_core(address="127.0.0.1:1")
        async with stopping(core), asyncio.timeout(60):
            with pytest.raises(CoreDied, match=r"ray_address: there is no Ray cluster at 127\.0\.0\.1:1: .*refused"):
                await core.start()

    asyncio.run(scenario())


def test_where_ray_is_missing_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_link, "find_spec", lambda name: None)
    monkeypatch.setattr(ray_link, "configure_logging", lambda *how: None)
    monkeypatch.setattr(ray_link.signal, "signal", lambda *how: None)
    ours, theirs = multiprocessing.Pipe()
    ray_link.run_link(theirs, CONFIG, stub_core.run, Placement("auto", cpus=1, gpus=0))
    assert ours.recv() == Failure("model", "executor: ray is not installed; pip install 'cinecat[ray]'")
