"""Jobs that are cancelled at any moment: they end, their work stops, and nothing of them is left."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from cinecat.server.local_server import LocalServer
from cinecat.v1 import clip_pb2, generation_pb2, generation_pb2_grpc
from cinecat.v1 import job_pb2 as pb
from tests.e2e.conftest import ServerFactory

Stub = generation_pb2_grpc.GenerationStub

FINAL = {pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED}
MOMENTS = (pb.JOB_STATE_QUEUED, pb.JOB_STATE_CONDITIONING, pb.JOB_STATE_DENOISING, pb.JOB_STATE_DECODING)

AT_ONCE = 20
STEPS = 12
CLIENTS = 4

# No cache, which every new prompt would fill a little more.
OPTIONS = ("--checkpoint-steps", "2", "--drain-seconds", "0", "--cache-mib", "0")

CORE_GROWTH_MIB = 16
"""Over eighty jobs: what allocators waver by, and less than the state of a single one in each of them would be."""


@dataclass(frozen=True)
class Cancelled:
    """A job that was asked to stop.

    Attributes:
        asked_in: its state when it was.
        answer: the last of CancelJob.
        streams: what each of its watchers saw.
    """

    asked_in: int
    answer: pb.Job
    streams: Sequence[Sequence[pb.JobEvent]]


@pytest.fixture(scope="module")
def quiet_server(start_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """Nobody else has jobs here."""
    with start_server(tmp_path_factory.mktemp("quiet"), *OPTIONS) as running:
        yield running


@pytest.fixture
def cancel_clip(small_clip: clip_pb2.ClipSpec) -> clip_pb2.ClipSpec:
    """A second of work, with four chunks to decode."""
    small_clip.steps, small_clip.frames, small_clip.guidance_scale = STEPS, 13, 1.0
    return small_clip


def cancel_until_ended(stub: Stub, job_id: str) -> pb.Job:
    while (job := stub.CancelJob(generation_pb2.CancelJobRequest(job_id=job_id))).state not in FINAL:
        time.sleep(0.005)
    return job


def cancel_one(stub: Stub, clip: clip_pb2.ClipSpec, number: int) -> Cancelled:
    """Has a clip made, and cancels it when it has got to the state whose turn it is by the number."""
    chance = random.Random(number)
    moment, step = MOMENTS[number % 4], chance.randrange(STEPS)
    own = clip_pb2.ClipSpec()
    own.CopyFrom(clip)
    own.prompt = f"a cat that is called off for the {number}th time"
    previews = pb.Previews(every_steps=1, frames=True)
    if number % 3:
        request = generation_pb2.SubmitRequest(clip=own, previews=previews, priority=1 + number % 2)
        job_id = stub.Submit(request).job_id
        stream = stub.Watch(generation_pb2.WatchRequest(job_id=job_id))
    else:
        stream = stub.Generate(generation_pb2.GenerateRequest(clip=own, previews=previews))
    first: list[pb.JobEvent] = []
    for event in stream:
        first.append(event)
        state = event.job.state
        if state > moment or (state == moment and event.job.progress.step >= (step if moment == MOMENTS[2] else 0)):
            break
    second = stub.Watch(generation_pb2.WatchRequest(job_id=first[-1].job.job_id))
    time.sleep(chance.random() * 0.03)
    answer = cancel_until_ended(stub, first[-1].job.job_id)
    return Cancelled(first[-1].job.state, answer, [[*first, *stream], list(second)])


def cancel_many(server: LocalServer, clip: clip_pb2.ClipSpec, numbers: range) -> list[Cancelled]:
    """All at once, by several clients."""
    with ExitStack() as stack, ThreadPoolExecutor(len(numbers)) as threads:
        own = [("grpc.use_local_subchannel_pool", 1)]
        channels = [stack.enter_context(grpc.insecure_channel(server.address, own)) for _ in range(CLIENTS)]
        stubs = [Stub(channel) for channel in channels]
        return list(threads.map(lambda number: cancel_one(stubs[number % CLIENTS], clip, number), numbers))


def steps_done(server: LocalServer) -> float:
    """By the engine, whosever they were."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("cinecat_engine_steps_total"))


def leftovers(server: LocalServer) -> list[Path]:
    data = server.log.parent / "data"
    folders = (data / "artifacts" / ".scratch", data / "inputs", data / "checkpoints")
    return [path for folder in folders if folder.exists() for path in folder.rglob("*") if path.is_file()]


def check_ends(jobs: Sequence[Cancelled]) -> None:
    for job in jobs:
        assert job.answer.state in (pb.JOB_STATE_CANCELLED, pb.JOB_STATE_SUCCEEDED)
        for events in job.streams:
            sequences = [event.sequence for event in events]
            assert sequences == sorted(set(sequences))
            assert [event.job.state in FINAL for event in events] == [False] * (len(events) - 1) + [True]
            assert events[-1].job == job.answer


def test_jobs_that_are_cancelled_at_any_moment_end_and_leave_nothing(
    quiet_server: LocalServer, cancel_clip: clip_pb2.ClipSpec
) -> None:
    before = steps_done(quiet_server)
    jobs = cancel_many(quiet_server, cancel_clip, range(AT_ONCE))
    # A step that was done after its job had ended would be in no job's count.
    done = steps_done(quiet_server)
    assert done - before == sum(job.answer.progress.step for job in jobs)
    assert leftovers(quiet_server) == []
    check_ends(jobs)
    cancelled = [job for job in jobs if job.answer.state == pb.JOB_STATE_CANCELLED]
    assert len(cancelled) >= AT_ONCE / 2
    assert {job.asked_in for job in cancelled} >= set(MOMENTS[:3])
    artifacts = quiet_server.log.parent / "data" / "artifacts"
    assert {path.name for path in artifacts.iterdir()}.isdisjoint(job.answer.job_id for job in cancelled)
    assert steps_done(quiet_server) == done


def test_no_step_is_done_once_cancel_has_answered_cancelled(
    quiet_server: LocalServer, cancel_clip: clip_pb2.ClipSpec
) -> None:
    cancel_clip.steps = 200
    with grpc.insecure_channel(quiet_server.address) as channel:
        stub = Stub(channel)
        for at_least in (1, 7, 20):
            before = steps_done(quiet_server)
            stream = stub.Generate(generation_pb2.GenerateRequest(clip=cancel_clip))
            job_id = next(event for event in stream if event.job.progress.step >= at_least).job.job_id
            answer = cancel_until_ended(stub, job_id)
            done = steps_done(quiet_server)
            assert answer.state == pb.JOB_STATE_CANCELLED
            assert done - before == answer.progress.step < 200
            time.sleep(0.3)
            assert steps_done(quiet_server) == done


@pytest.mark.slow
def test_a_hundred_cancelled_jobs_give_their_memory_back(
    quiet_server: LocalServer, cancel_clip: clip_pb2.ClipSpec
) -> None:
    core, resident = quiet_server.core_pid, []
    with shared_memory_of(quiet_server.process.pid) as buffers:
        for first in range(0, 5 * AT_ONCE, AT_ONCE):
            jobs = cancel_many(quiet_server, cancel_clip, range(first, first + AT_ONCE))
            check_ends(jobs)
            assert leftovers(quiet_server) == []
            resident.append(resident_mib(core))
    print("core's memory after every 20, MiB:", *map(round, resident))
    assert quiet_server.core_pid == core
    assert resident[-1] - resident[0] < CORE_GROWTH_MIB, resident
    assert buffers
    assert not [name for name in buffers if Path(name).exists()]


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@contextmanager
def shared_memory_of(pid: int) -> Iterator[set[str]]:
    """Collects the files of shared memory that a process maps."""
    names: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            words = Path(f"/proc/{pid}/maps").read_text().split()
            names.update(word for word in words if word.startswith("/dev/shm/"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield names
    finally:
        over.set()
        thread.join()
