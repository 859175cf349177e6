"""Two replicas of the model over real gRPC: they work side by side, and one of them may die."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from cinecat import Client, Finished, JobState
from cinecat.server.local_server import LocalServer

STYLES = (None, "noir", "amber", None, ["noir:0.4", "amber:0.6"], None)


@pytest.fixture(scope="module")
def pair(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server of two replicas whose clips do not depend, to the bit, on what else is running."""
    options = ("--replicas", "2", "--max-batch", "1", "--checkpoint-steps", "4", "--engine", "torch")
    with start_server(tmp_path_factory.mktemp("pair"), *options) as server:
        yield server


def metric(server: LocalServer, line: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next(float(found.rpartition(" ")[2]) for found in lines if found.startswith(line))


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def submit(client: Client, image: bytes, number: int, steps: int = 24) -> str:
    return client.submit(
        image=image,
        prompt="a cat",
        style=STYLES[number],
        width=64,
        height=64,
        frames=5,
        steps=steps,
        guidance=1.0,
        seed=number,
        artifacts=("frames_f32",),
    ).job_id


def frames(client: Client, job_id: str) -> NDArray[np.float32]:
    last = list(client.watch(job_id))[-1]
    assert isinstance(last, Finished)
    found: NDArray[np.float32] = load(client.download(job_id))["frames"]
    return found


def running(client: Client) -> int:
    return len(list(client.jobs(states=[JobState.DENOISING])))


def test_jobs_run_side_by_side_and_outlive_a_replica_to_the_bit(pair: LocalServer, frame_png: bytes) -> None:
    with Client(pair.address) as client:
        assert metric(pair, 'cinecat_replicas{model="wan-tiny",state="ready"}') == 2
        assert len(pair.core_pids) == 2
        undisturbed = [submit(client, frame_png, number) for number in range(6)]
        eventually(lambda: running(client) >= 2)
        expected = [frames(client, job_id) for job_id in undisturbed]

        again = [submit(client, frame_png, number) for number in range(6)]
        eventually(lambda: running(client) >= 2)
        os.kill(pair.core_pids[1], signal.SIGKILL)
        eventually(lambda: metric(pair, "cinecat_core_restarts_total") == 1)
        assert metric(pair, "cinecat_ready") == 1
        for number, job_id in enumerate(again):
            assert np.array_equal(frames(client, job_id), expected[number])
        eventually(lambda: metric(pair, 'cinecat_replicas{model="wan-tiny",state="ready"}') == 2)
