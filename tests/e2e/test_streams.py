"""Streams that drop, come back, or never come back; jobs that are cancelled; retries that must not run twice."""

from __future__ import annotations

import uuid
from pathlib import Path

import grpc
import pytest

from cinecat.v1 import clip_pb2, generation_pb2, generation_pb2_grpc
from cinecat.v1 import job_pb2 as pb

Stub = generation_pb2_grpc.GenerationStub


@pytest.fixture
def long_clip(small_clip: clip_pb2.ClipSpec) -> clip_pb2.ClipSpec:
    """Many seconds of work, in short steps."""
    small_clip.steps = 200
    return small_clip


def watch(generation: Stub, job_id: str, after: int = 0) -> list[pb.JobEvent]:
    return list(generation.Watch(generation_pb2.WatchRequest(job_id=job_id, after_sequence=after)))


def begin(generation: Stub, clip: clip_pb2.ClipSpec) -> tuple[grpc.Call, str]:
    """An attached job that has begun to denoise, and its stream."""
    stream = generation.Generate(generation_pb2.GenerateRequest(clip=clip))
    for event in stream:
        if event.job.state == pb.JOB_STATE_DENOISING:
            return stream, event.job.job_id
    raise AssertionError("the stream ended before the first step")


def test_an_attached_job_is_cancelled_when_its_watcher_does_not_come_back(
    start_server: object, tmp_path: Path, long_clip: clip_pb2.ClipSpec
) -> None:
    with (
        start_server(tmp_path, "--grace-seconds", "0.3", "--drain-seconds", "0") as server,  # type: ignore[operator]
        grpc.insecure_channel(server.address) as channel,
    ):
        generation = Stub(channel)
        stream, job_id = begin(generation, long_clip)
        stream.cancel()
        # This watcher would keep the job alive if it came in time, so ask without attaching.
        state = pb.JOB_STATE_DENOISING
        while state == pb.JOB_STATE_DENOISING:
            state = generation.GetJob(generation_pb2.GetJobRequest(job_id=job_id)).state
        assert state == pb.JOB_STATE_CANCELLED
        next_stream, next_id = begin(generation, long_clip)  # the engine core is free again
        next_stream.cancel()
        assert next_id != job_id


def test_a_dropped_stream_is_taken_up_again_without_gap_or_repeat(
    generation: Stub, small_clip: clip_pb2.ClipSpec
) -> None:
    small_clip.steps = 30
    stream, job_id = begin(generation, small_clip)
    last = next(stream)
    stream.cancel()
    rest = watch(generation, job_id, last.sequence)
    assert rest[0].sequence > last.sequence
    assert rest[-1].job.state == pb.JOB_STATE_SUCCEEDED
    steps = [event.job.progress.step for event in rest if event.job.state == pb.JOB_STATE_DENOISING]
    assert steps == sorted(set(steps))


def test_a_watcher_who_comes_late_sees_every_transition(generation: Stub, small_clip: clip_pb2.ClipSpec) -> None:
    job = generation.Submit(generation_pb2.SubmitRequest(clip=small_clip))
    first = watch(generation, job.job_id)
    replayed = watch(generation, job.job_id)
    transitions = [event.job.state for event in replayed]
    assert transitions == list(dict.fromkeys(event.job.state for event in first))
    assert transitions[-1] == pb.JOB_STATE_SUCCEEDED
    assert watch(generation, job.job_id, replayed[2].sequence) == replayed[3:]


def test_a_submitted_job_runs_to_its_end_unwatched(generation: Stub, small_clip: clip_pb2.ClipSpec) -> None:
    job = generation.Submit(generation_pb2.SubmitRequest(clip=small_clip))
    assert job.state == pb.JOB_STATE_QUEUED
    assert job.detached
    while (now := generation.GetJob(generation_pb2.GetJobRequest(job_id=job.job_id))).state < pb.JOB_STATE_SUCCEEDED:
        pass
    assert now.state == pb.JOB_STATE_SUCCEEDED


def test_cancel_stops_a_running_job_and_frees_the_engine_for_the_next(
    generation: Stub, long_clip: clip_pb2.ClipSpec
) -> None:
    stream, job_id = begin(generation, long_clip)
    generation.CancelJob(generation_pb2.CancelJobRequest(job_id=job_id))
    events = list(stream)
    assert events[-1].job.state == pb.JOB_STATE_CANCELLED
    assert events[-1].job.progress.step < 200
    again = generation.CancelJob(generation_pb2.CancelJobRequest(job_id=job_id))
    assert again.state == pb.JOB_STATE_CANCELLED


def test_cancel_of_a_queued_job_is_immediate_and_positions_move_up(
    generation: Stub, long_clip: clip_pb2.ClipSpec
) -> None:
    stream, running = begin(generation, long_clip)
    waiting = [generation.Submit(generation_pb2.SubmitRequest(clip=long_clip)).job_id for _ in range(2)]
    get = [generation_pb2.GetJobRequest(job_id=job_id) for job_id in waiting]
    assert [generation.GetJob(request).progress.queue_position for request in get] == [1, 2]
    cancelled = generation.CancelJob(generation_pb2.CancelJobRequest(job_id=waiting[0]))
    assert cancelled.state == pb.JOB_STATE_CANCELLED
    assert generation.GetJob(get[1]).progress.queue_position == 1
    for job_id in (waiting[1], running):
        generation.CancelJob(generation_pb2.CancelJobRequest(job_id=job_id))
    assert list(stream)[-1].job.state == pb.JOB_STATE_CANCELLED


def test_a_request_sent_twice_is_one_job(generation: Stub, small_clip: clip_pb2.ClipSpec) -> None:
    key = uuid.uuid4().hex
    first = generation.Submit(generation_pb2.SubmitRequest(clip=small_clip, request_id=key))
    second = generation.Submit(generation_pb2.SubmitRequest(clip=small_clip, request_id=key))
    joined = list(generation.Generate(generation_pb2.GenerateRequest(clip=small_clip, request_id=key)))
    assert {first.job_id, second.job_id, joined[-1].job.job_id} == {first.job_id}
    small_clip.seed += 1
    with pytest.raises(grpc.RpcError) as refused:
        generation.Submit(generation_pb2.SubmitRequest(clip=small_clip, request_id=key))
    assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS


def test_jobs_are_listed_page_by_page_newest_first(generation: Stub, small_clip: clip_pb2.ClipSpec) -> None:
    ids = [generation.Submit(generation_pb2.SubmitRequest(clip=small_clip)).job_id for _ in range(3)]
    for job_id in ids:
        watch(generation, job_id)
    listed: list[str] = []
    token = ""
    while len(listed) < 3:
        page = generation.ListJobs(
            generation_pb2.ListJobsRequest(page_size=2, page_token=token, states=[pb.JOB_STATE_SUCCEEDED])
        )
        listed += [job.job_id for job in page.jobs]
        token = page.next_page_token
    assert listed[:3] == ids[::-1]
    assert not page.jobs[0].clip.image
