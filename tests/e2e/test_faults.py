"""Processes that die. Nothing accepted is lost, and nobody is left hanging."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from cinecat.server.local_server import LocalServer, ServerFailed
from cinecat.v1 import clip_pb2, generation_pb2, generation_pb2_grpc
from cinecat.v1 import job_pb2 as pb

Stub = generation_pb2_grpc.GenerationStub


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def metric(server: LocalServer, line: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next(float(found.rpartition(" ")[2]) for found in lines if found.startswith(line))


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def until(stream: object, state: int) -> pb.JobEvent:
    return next(event for event in stream if event.job.state == state)  # type: ignore[attr-defined]


@pytest.fixture
def long_clip(small_clip: clip_pb2.ClipSpec) -> clip_pb2.ClipSpec:
    small_clip.steps, small_clip.guidance_scale = 100, 1.0
    return small_clip


def test_a_job_goes_on_from_its_checkpoint_however_often_its_core_dies(
    start_server: object, tmp_path: Path, long_clip: clip_pb2.ClipSpec
) -> None:
    options = ("--checkpoint-steps", "5")
    with start_server(tmp_path, *options) as server, grpc.insecure_channel(server.address) as channel:  # type: ignore[operator]
        generation = Stub(channel)
        # A core that dies with nothing to do is replaced without a request to find out.
        os.kill(server.core_pid, signal.SIGKILL)
        eventually(lambda: metric(server, "cinecat_core_restarts_total") == 1)
        eventually(lambda: metric(server, "cinecat_ready") == 1)

        stream = generation.Generate(generation_pb2.GenerateRequest(clip=long_clip))
        waiting = generation.Submit(generation_pb2.SubmitRequest(clip=long_clip))
        for at_least in (10, 40, 70):
            seen = next(event for event in stream if event.job.progress.step >= at_least).job.progress.step
            os.kill(server.core_pid, signal.SIGKILL)
            until(stream, pb.JOB_STATE_QUEUED)
            again = until(stream, pb.JOB_STATE_DENOISING).job.progress.step
            assert again >= seen - 5
        assert list(stream)[-1].job.state == pb.JOB_STATE_SUCCEEDED
        assert metric(server, "cinecat_resumes_total") >= 3  # the other job may have been in the core too
        # The job behind it is not the worse for it.
        events = list(generation.Watch(generation_pb2.WatchRequest(job_id=waiting.job_id)))
        assert events[-1].job.state == pb.JOB_STATE_SUCCEEDED
        assert not list((tmp_path / "data" / "artifacts" / ".scratch").iterdir())
        assert not list((tmp_path / "data" / "inputs").iterdir())
        assert not list((tmp_path / "data" / "checkpoints").iterdir())


def test_sigterm_keeps_what_it_cannot_finish_for_the_next_start_and_lets_a_short_job_finish(
    start_server: object, tmp_path: Path, long_clip: clip_pb2.ClipSpec
) -> None:
    with (
        start_server(tmp_path, "--drain-seconds", "0.2") as server,  # type: ignore[operator]
        grpc.insecure_channel(server.address) as channel,
    ):
        generation = Stub(channel)
        stream = generation.Generate(generation_pb2.GenerateRequest(clip=long_clip))
        running = until(stream, pb.JOB_STATE_DENOISING)
        waiting = generation.Submit(generation_pb2.SubmitRequest(clip=long_clip))
        core = server.core_pid
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as dropped:
            list(stream)
        assert dropped.value.code() == grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(30) == 0
    assert not is_alive(core)
    with start_server(tmp_path) as server, grpc.insecure_channel(server.address) as channel:  # type: ignore[operator]
        generation = Stub(channel)
        request = generation_pb2.WatchRequest(job_id=running.job.job_id, after_sequence=running.sequence)
        events = list(generation.Watch(request))
        assert all(event.sequence > running.sequence for event in events)
        assert events[-1].job.state == pb.JOB_STATE_SUCCEEDED
        done = list(generation.Watch(generation_pb2.WatchRequest(job_id=waiting.job_id)))
        assert done[-1].job.state == pb.JOB_STATE_SUCCEEDED

        long_clip.steps = 2
        stream = generation.Generate(generation_pb2.GenerateRequest(clip=long_clip))
        until(stream, pb.JOB_STATE_CONDITIONING)
        server.process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].job.state == pb.JOB_STATE_SUCCEEDED
        assert server.process.wait(30) == 0


def test_a_killed_server_takes_its_core_along_and_loses_no_job(
    start_server: object, tmp_path: Path, long_clip: clip_pb2.ClipSpec
) -> None:
    with contextlib.suppress(ServerFailed), start_server(tmp_path) as server:  # type: ignore[operator]
        generation = Stub(grpc.insecure_channel(server.address))
        job = generation.Submit(generation_pb2.SubmitRequest(clip=long_clip, request_id="once"))
        until(generation.Watch(generation_pb2.WatchRequest(job_id=job.job_id)), pb.JOB_STATE_DENOISING)
        core = server.core_pid
        server.process.kill()
        eventually(lambda: not is_alive(core))
    with start_server(tmp_path) as server, grpc.insecure_channel(server.address) as channel:  # type: ignore[operator]
        generation = Stub(channel)
        same = generation.Submit(generation_pb2.SubmitRequest(clip=long_clip, request_id="once"))
        assert same.job_id == job.job_id
        events = list(generation.Watch(generation_pb2.WatchRequest(job_id=job.job_id)))
        assert events[-1].job.state == pb.JOB_STATE_SUCCEEDED


def test_a_second_server_on_one_data_dir_is_refused(server: LocalServer, start_server: object, tmp_path: Path) -> None:
    refused = start_server(tmp_path, "--data-dir", str(server.log.parent / "data"))  # type: ignore[operator]
    with pytest.raises(ServerFailed, match=r"data_dir: .* is in use by another server"), refused:
        pass
