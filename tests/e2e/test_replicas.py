"""Replicas of a model over real gRPC: they work side by side, one of them may die, and a reload changes how many."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from cinecat import Client, Finished, JobState
from cinecat.server.local_server import LocalServer

STYLES = (None, "noir", "amber", None, ["noir:0.4", "amber:0.6"], None)


def metric(server: LocalServer, line: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next(float(found.rpartition(" ")[2]) for found in lines if found.startswith(line))


def replicas(server: LocalServer) -> float:
    return metric(server, 'cinecat_replicas{model="wan-tiny",state="ready"}')


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
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
    assert isinstance(list(client.watch(job_id))[-1], Finished)
    found: NDArray[np.float32] = load(client.download(job_id))["frames"]
    return found


def running(client: Client) -> int:
    return len(list(client.jobs(states=[JobState.DENOISING])))


@pytest.mark.slow
def test_jobs_run_side_by_side_and_outlive_a_replica_to_the_bit(
    start_server: Any, tmp_path: Path, frame_png: bytes
) -> None:
    options = ("--replicas", "2", "--max-batch", "1", "--checkpoint-steps", "4", "--engine", "torch")
    with start_server(tmp_path, *options) as pair, Client(pair.address) as client:
        assert replicas(pair) == len(pair.core_pids) == 2
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
        eventually(lambda: replicas(pair) == 2)


@pytest.mark.slow
def test_a_reload_changes_replicas_and_models_with_jobs_in_flight(
    start_server: Any, tmp_path: Path, frame_png: bytes
) -> None:
    config = tmp_path / "cinecat.toml"
    alone = "replicas = {replicas}\n"
    config.write_text(alone.format(replicas=1) + '[models.small]\nmodel = "wan-tiny"\ndefault_size = "48x48x5"\n')
    options = ("--max-batch", "1", "--engine", "torch", "--config", str(config))
    with start_server(tmp_path, *options) as server, Client(server.address) as client:

        def reload(text: str) -> None:
            config.write_text(text)
            server.process.send_signal(signal.SIGHUP)

        clips = [frames(client, submit(client, frame_png, number)) for number in range(6)]
        small = [client.submit(image=frame_png, prompt="a cat", model="small", steps=40).job_id for _ in range(3)]
        jobs = [submit(client, frame_png, number) for number in range(6)]
        reload(alone.format(replicas=2))
        eventually(lambda: replicas(server) == 2)
        assert [model.name for model in client.models()] == ["wan-tiny"]
        jobs += [submit(client, frame_png, number) for number in range(6)]
        reload(alone.format(replicas=1))
        eventually(lambda: replicas(server) == 1)
        for number, job_id in enumerate(jobs):
            assert np.array_equal(frames(client, job_id), clips[number % 6])
        assert all(isinstance(list(client.watch(job_id))[-1], Finished) for job_id in small)
        eventually(lambda: len(server.core_pids) == 1)
        # What cannot be used changes nothing.
        reload("replicas = 0\n")
        eventually(lambda: "the server stays as it is" in server.log.read_text())
        frames(client, submit(client, frame_png, 0))
