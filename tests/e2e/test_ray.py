"""Replicas on the nodes of a Ray cluster, behind a real server: cores and nodes may die, and nodes may join."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from cinecat import Client, Finished, JobState
from cinecat.server.local_server import LocalServer
from tests.server.ray_cluster import add_node, ray_cluster, raylet_pid

JOBS = 24
STYLES = (None, "noir", "amber", ["noir:0.4", "amber:0.6"])


def metric(server: LocalServer, line: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next(float(found.rpartition(" ")[2]) for found in lines if found.startswith(line))


def replicas(server: LocalServer, state: str) -> float:
    return metric(server, f'cinecat_replicas{{model="wan-tiny",state="{state}"}}')


def waits_for_room(server: LocalServer) -> int:
    """How often one was said to."""
    return server.log.read_text().count("no node has room for a replica")


def eventually(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def placed(server: LocalServer) -> list[int]:
    """Process ids of the engine cores in the order of their placing."""
    return [int(pid) for pid in re.findall(r"engine core placed .*node_pid=(\d+)", server.log.read_text())]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def node_of(cluster: Any, core: int) -> Any:
    """The core's parent is the host, whose parent is the node's raylet."""
    raylet = parent(parent(core))
    return next(node for node in cluster.list_all_nodes() if raylet_pid(node) == raylet)


def submit(client: Client, image: bytes, number: int) -> str:
    return client.submit(
        image=image,
        prompt="a cat",
        style=STYLES[number % len(STYLES)],
        width=64,
        height=64,
        frames=5,
        steps=24,
        guidance=1.0,
        seed=number % 4,
        artifacts=("frames_f32",),
    ).job_id


def finished(client: Client, job_id: str) -> bytes:
    last = list(client.watch(job_id))[-1]
    assert isinstance(last, Finished), f"{job_id}: {last}"
    return client.download(job_id)


def running(client: Client) -> int:
    return len(list(client.jobs(states=[JobState.DENOISING])))


@pytest.mark.slow
def test_jobs_outlive_a_core_and_a_node_and_nodes_that_join_take_work(
    start_server: Any, tmp_path: Path, frame_png: bytes
) -> None:
    with ray_cluster(1, 1) as cluster:
        options = ("--executor", "ray", "--ray-address", cluster.address, "--replicas", "3", "--device", "cpu")
        options += ("--max-batch", "1", "--checkpoint-steps", "4", "--engine", "torch")
        with start_server(tmp_path, *options) as server, Client(server.address) as client:
            eventually(lambda: replicas(server, "ready") == 2)
            eventually(lambda: waits_for_room(server) == 1)
            first, second = placed(server)
            assert node_of(cluster, first) is not node_of(cluster, second)

            jobs = [submit(client, frame_png, number) for number in range(JOBS)]
            eventually(lambda: running(client) == 2)
            os.kill(first, signal.SIGKILL)
            eventually(lambda: metric(server, "cinecat_core_restarts_total") == 1)
            eventually(lambda: replicas(server, "ready") == 2)
            eventually(lambda: running(client) == 2)

            cluster.remove_node(node_of(cluster, second), allow_graceful=False)
            eventually(lambda: waits_for_room(server) == 2)
            assert metric(server, "cinecat_ready") == 1

            joined = [add_node(cluster, 1), add_node(cluster, 1)]
            eventually(lambda: replicas(server, "ready") == 3)
            assert {id(node_of(cluster, core)) for core in placed(server)[-2:]} == {id(node) for node in joined}
            eventually(lambda: running(client) == 3)

            clips = [load(finished(client, job_id))["frames"] for job_id in jobs]
            assert waits_for_room(server) == 2
            # The same request gives the same clip, whoever rendered it and whatever died meanwhile.
            for number, clip in enumerate(clips):
                np.testing.assert_array_equal(clip, clips[number % 4])
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in placed(server)))
