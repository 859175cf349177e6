"""What is of cores on a Ray cluster alone: where they are placed, what they leave, and whose end is whose."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
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
from tests.server.samples import until

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


@pytest.mark.slow
def test_a_core_waits_for_room_and_leaves_nothing_behind(
    cluster: Any, new_core: Callable[..., RayCore], capfd: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> tuple[int, int]:
        core = new_core()
        starting = asyncio.create_task(core.start())
        await until(lambda: any("needs" in entry for entry in logs))
        await asyncio.sleep(2)
        assert not starting.done()
        node = await asyncio.to_thread(add_node, cluster, 1)
        try:
            assert await asyncio.wait_for(starting, 120) == stub_core.INFO
            (placed,) = (entry for entry in logs if entry["event"] == "engine core placed")
            link = core.pid
            assert link is not None
            assert not is_gone(placed["node_pid"])
            await core.stop()
            return link, placed["node_pid"]
        finally:
            await asyncio.to_thread(eventually, lambda: nothing_is_left(cluster))
            await asyncio.to_thread(cluster.remove_node, node)

    with structlog.testing.capture_logs() as logs:
        link, process = asyncio.run(scenario())
    assert [entry["event"] for entry in logs if "room" in entry["event"]] == [
        "no node has room for a replica; it waits until one has"
    ]
    assert next(entry["needs"] for entry in logs if "needs" in entry) == "1 CPU"
    assert is_gone(link)
    eventually(lambda: is_gone(process))
    assert "a line of the core's log\n" in capfd.readouterr().err


@pytest.mark.slow
def test_a_core_that_waits_for_room_can_be_stopped(cluster: Any, new_core: Callable[..., RayCore]) -> None:
    async def scenario() -> None:
        core = new_core(gpus=1)
        starting = asyncio.create_task(core.start())
        await until(lambda: any("needs" in entry for entry in logs))
        await core.stop()
        with pytest.raises(CoreDied):
            await starting

    with structlog.testing.capture_logs() as logs:
        asyncio.run(scenario())
    assert next(entry["needs"] for entry in logs if "needs" in entry) == "1 CPU, 1 GPU"
    eventually(lambda: nothing_is_left(cluster))


@pytest.mark.slow
def test_the_core_ends_with_its_link_and_another_is_placed(cluster: Any, new_core: Callable[..., RayCore]) -> None:
    async def scenario() -> None:
        # No GPU is asked for where the cluster has none and none is needed.
        core = new_core(gpus=1, gpus_optional=True)
        node = await asyncio.to_thread(add_node, cluster, 1)
        try:
            await core.start()
            (first,) = (entry["node_pid"] for entry in logs if "node_pid" in entry)
            died = core.died
            assert core.pid is not None
            os.kill(core.pid, signal.SIGKILL)
            await asyncio.wait_for(died.wait(), 5)
            await core.restart()
            assert is_gone(first)
            assert await core.call(Release("any"), Released) == Released()
        finally:
            await core.stop()
            await asyncio.to_thread(eventually, lambda: nothing_is_left(cluster))
            await asyncio.to_thread(cluster.remove_node, node)

    with structlog.testing.capture_logs() as logs:
        asyncio.run(scenario())


@pytest.mark.slow
def test_an_address_without_a_cluster_is_told(new_core: Callable[..., RayCore]) -> None:
    async def scenario() -> None:
        core = new_core(address="127.0.0.1:1")
        with pytest.raises(CoreDied, match=r"ray_address: there is no Ray cluster at 127\.0\.0\.1:1"):
            await core.start()
        await core.stop()

    asyncio.run(scenario())


def test_where_ray_is_missing_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_link, "find_spec", lambda name: None)
    monkeypatch.setattr(ray_link, "configure_logging", lambda *how: None)
    monkeypatch.setattr(ray_link.signal, "signal", lambda *how: None)
    ours, theirs = multiprocessing.Pipe()
    ray_link.run_link(theirs, CONFIG, stub_core.run, Placement("auto", cpus=1, gpus=0))
    assert ours.recv() == Failure("model", "executor: ray is not installed; pip install 'cinecat[ray]'")
