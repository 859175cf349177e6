"""Whoever follows a job through traces and logs finds all of it, under the names that the caller gave."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cinecat.server.local_server import LocalServer, running_server
from cinecat.v1 import clip_pb2, generation_pb2, generation_pb2_grpc
from cinecat.v1 import job_pb2 as pb
from tests.e2e.collector import Collector, collector

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def traces() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.sdk")
    with collector() as started:
        yield started


@pytest.fixture(scope="module")
def server(traces: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    options = ("--trace-endpoint", traces.endpoint, "--log-format", "json", "--threads", "1")
    with running_server(tmp_path_factory.mktemp("traced"), *options) as started:
        yield started


def clip(photograph: Path, **changes: Any) -> clip_pb2.ClipSpec:
    spec = clip_pb2.ClipSpec(image=photograph.read_bytes(), prompt="a secret", width=64, height=64, frames=5, steps=3)
    spec.MergeFrom(clip_pb2.ClipSpec(**changes))
    return spec


def generate(
    server: LocalServer, request: generation_pb2.GenerateRequest, metadata: tuple[tuple[str, str], ...]
) -> tuple[pb.Job, Any]:
    """The job as it ended, and the call."""
    with grpc.insecure_channel(server.address) as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(request, metadata=metadata)
        *_, last = call
        call.code()
        return last.job, call


def log_lines(server: LocalServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def test_a_job_is_a_trace_below_its_callers_span(server: LocalServer, traces: Collector, photograph: Path) -> None:
    request = generation_pb2.GenerateRequest(clip=clip(photograph), request_id="shot-7")
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("cinecat-tenant", "acme"), ("x-request-id", "call-1"))
    job, call = generate(server, request, metadata)
    assert job.traceparent == f"00-{TRACE}-{PARENT}-01"
    assert ("x-request-id", "call-1") in [(key, value) for key, value in call.trailing_metadata()]

    spans = traces.trace(TRACE)
    stages = ["queue", "condition", "text_encode", "image_encode", "vae_encode", "denoise", "vae_decode", "mux"]
    assert sorted(spans) == sorted([*stages, "job"])
    whole = spans["job"]
    assert whole.parent_span_id.hex() == PARENT
    for name in stages:
        parent = spans["condition"] if name.endswith("_encode") else whole
        assert spans[name].parent_span_id == parent.span_id
        assert parent.start_time_unix_nano <= spans[name].start_time_unix_nano
        assert spans[name].start_time_unix_nano <= spans[name].end_time_unix_nano <= parent.end_time_unix_nano
    states = [spans[name] for name in ("queue", "condition", "denoise", "vae_decode", "mux")]
    assert all(a.end_time_unix_nano == b.start_time_unix_nano for a, b in itertools.pairwise(states))
    steps = [{each.key: each.value.int_value for each in event.attributes} for event in spans["denoise"].events]
    assert [(step["step"], step["tokens"]) for step in steps] == [(1, 32), (2, 32), (3, 32)]
    attributes = {each.key: each.value.string_value for each in whole.attributes}
    assert attributes["cinecat.tenant"] == "acme"
    assert attributes["cinecat.request_id"] == "shot-7"
    assert b"a secret" not in whole.SerializeToString()

    lines = [line for line in log_lines(server) if line.get("job_id") == job.job_id]
    assert {line["request_id"] for line in lines if line.get("process") != "core"} == {"shot-7"}
    accepted = next(line for line in lines if line["event"] == "job accepted")
    assert accepted["call_id"] == "call-1"
    assert accepted["tenant"] == "acme"


def test_a_job_without_a_context_has_a_trace_of_its_own_name(
    server: LocalServer, traces: Collector, photograph: Path
) -> None:
    request = generation_pb2.GenerateRequest(clip=clip(photograph))
    job, call = generate(server, request, (("traceparent", "00-nonsense-01"), ("x-request-id", "two words")))
    assert not job.traceparent
    given = dict(call.trailing_metadata())["x-request-id"]
    assert len(given) == 32
    assert traces.trace(job.job_id)["job"].parent_span_id == b""


def test_a_job_that_fails_ends_its_trace_with_the_error(
    server: LocalServer, traces: Collector, photograph: Path
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        blocker = stub.Submit(generation_pb2.SubmitRequest(clip=clip(photograph, steps=150, width=128, height=128)))
        queued = stub.Submit(generation_pb2.SubmitRequest(clip=clip(photograph, seed=2)))
        frames = server.log.parent / "data" / "inputs"
        for path in frames.rglob(f"*{queued.job_id}*"):
            path.unlink()
        stub.CancelJob(generation_pb2.CancelJobRequest(job_id=blocker.job_id))
        *_, last = stub.Watch(generation_pb2.WatchRequest(job_id=queued.job_id))
    assert last.job.state == pb.JOB_STATE_FAILED
    assert traces.trace(queued.job_id)["job"].status.code == 2
    cancelled = traces.trace(blocker.job_id)["job"]
    assert cancelled.status.code == 0
    assert "cancelled" in [each.value.string_value for each in cancelled.attributes]


def test_a_refused_call_is_in_the_answer_and_the_log_by_its_id(server: LocalServer, photograph: Path) -> None:
    request = generation_pb2.SubmitRequest(clip=clip(photograph, width=63))
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as refused:
        generation_pb2_grpc.GenerationStub(channel).Submit(request, metadata=(("x-request-id", "call-2"),))
    assert ("x-request-id", "call-2") in [tuple(pair) for pair in refused.value.trailing_metadata()]


def test_every_line_of_both_processes_is_one_json_object(server: LocalServer) -> None:
    lines = log_lines(server)
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
