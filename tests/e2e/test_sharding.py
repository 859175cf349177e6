"""A replica whose work two ranks share: what it makes, and what becomes of it when one of them dies or hangs."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from cinecat import Client, Progress
from cinecat.client import Generation
from cinecat.server.local_server import LocalServer, ServerFailed
from tests.e2e.conftest import ServerFactory
from tests.e2e.test_faults import eventually, is_alive, metric

TOLERANCE = 2e-3
"""Of frames in [0, 1]: two shards round differently from one."""


@pytest.fixture(scope="module")
def sharded(start_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    options = ("--shard", "ulysses=2", "--device", "cpu", "--rank-timeout-seconds", "5", "--checkpoint-steps", "5")
    with start_server(tmp_path_factory.mktemp("sharded"), *options) as running:
        yield running


@pytest.fixture
def sharded_client(sharded: LocalServer) -> Iterator[Client]:
    with Client(sharded.address) as connected:
        yield connected


def follower_of(server: LocalServer) -> int:
    tasks = Path(f"/proc/{server.core_pid}/task").glob("*/children")
    (follower,) = (int(pid) for task in tasks for pid in task.read_text().split())
    return follower


def begin(client: Client, image: bytes, **asked: object) -> Generation:
    common = {"width": 80, "height": 48, "frames": 9, "seed": 21, "artifacts": ("frames_f32",)}
    return client.generate(image=image, prompt="a cat looks up", **{**common, **asked})  # type: ignore[arg-type]


def frames(generation: Generation) -> NDArray[np.float32]:
    clip = generation.result()
    assert clip.data is not None
    found: NDArray[np.float32] = load(clip.data)["frames"]
    return found


@pytest.mark.parametrize(
    "asked",
    [
        {"steps": 3, "guidance": 4.0},
        {"steps": 6, "tokenization": "cat", "keep_ratio": 0.6, "style": ["noir:0.8", "amber:0.3"]},
    ],
    ids=["uniform", "cat in two styles"],
)
def test_two_ranks_make_what_one_makes(
    client: Client, sharded_client: Client, sharded: LocalServer, frame_png: bytes, asked: dict[str, object]
) -> None:
    expected, found = (frames(begin(each, frame_png, **asked)) for each in (client, sharded_client))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE
    assert metric(sharded, "cinecat_communication_bytes_total") > 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_job_goes_on_from_its_checkpoint_when_a_rank(
    client: Client, sharded_client: Client, sharded: LocalServer, frame_png: bytes, fault: signal.Signals
) -> None:
    asked: dict[str, object] = {"steps": 60, "guidance": 1.0}
    restarts, resumes = (metric(sharded, f"cinecat_{name}_total") for name in ("core_restarts", "resumes"))
    generation = begin(sharded_client, frame_png, **asked)
    next(event for event in generation if isinstance(event, Progress) and event.step >= 12)
    core, follower = sharded.core_pid, follower_of(sharded)
    os.kill(follower, fault)
    found = frames(generation)
    assert metric(sharded, "cinecat_core_restarts_total") == restarts + 1
    assert metric(sharded, "cinecat_resumes_total") == resumes + 1
    assert np.abs(found - frames(begin(client, frame_png, **asked))).max() <= TOLERANCE
    eventually(lambda: not is_alive(core) and not is_alive(follower))


@pytest.mark.slow
def test_a_leader_that_hangs_is_ended_by_its_follower(sharded: LocalServer, sharded_client: Client) -> None:
    restarts = metric(sharded, "cinecat_core_restarts_total")
    core, follower = sharded.core_pid, follower_of(sharded)
    os.kill(core, signal.SIGSTOP)
    eventually(lambda: metric(sharded, "cinecat_core_restarts_total") == restarts + 1)
    eventually(lambda: metric(sharded, "cinecat_ready") == 1)
    eventually(lambda: not is_alive(core) and not is_alive(follower))


@pytest.mark.slow
def test_nothing_is_left_of_a_server_that_was_killed(start_server: ServerFactory, tmp_path: Path) -> None:
    with (
        contextlib.suppress(ServerFailed),
        start_server(tmp_path, "--shard", "ring=2", "--device", "cpu") as server,
    ):
        pids = server.core_pid, follower_of(server)
        server.process.kill()
        server.process.wait()
    eventually(lambda: not any(map(is_alive, pids)))


@pytest.mark.slow
def test_a_layout_that_does_not_suit_is_told_before_anything_is_loaded(
    start_server: ServerFactory, tmp_path: Path
) -> None:
    refused = start_server(tmp_path, "--shard", "ulysses=3", "--device", "cpu")
    with pytest.raises(ServerFailed, match="shard: ulysses=3 does not divide the model's 4 heads; 1, 2, 4 do"), refused:
        pass
