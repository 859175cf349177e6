"""A trace is made from what is stored, so that a restart cuts none in two."""

from __future__ import annotations

import asyncio
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from cinecat.server.settings import Settings, SettingsError
from cinecat.server.tracing import Visit, open_tracer, traceparent_of, visits
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import PATH_TO_SUCCESS, front, move, new_job

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    "value",
    ["", "x", GOOD.upper(), GOOD[:-1], GOOD + "-00", GOOD.replace("00f067aa0ba902b7", "0" * 16), "ff" + GOOD[2:]],
)
def test_a_context_that_cannot_be_read_is_none(value: str) -> None:
    assert traceparent_of([("traceparent", value)]) == ""
    assert traceparent_of([("other", GOOD), ("traceparent", GOOD)]) == GOOD
    assert traceparent_of(None) == ""


def test_the_states_of_a_job_follow_one_another_also_over_a_restart(tmp_path: Path) -> None:
    async def scenario() -> list[Visit]:
        async with front(tmp_path) as f:
            await move(f.jobs, await f.accept(new_job()), *PATH_TO_SUCCESS[:2])
        async with front(tmp_path) as f:
            (live,) = await f.jobs.restore()
            await move(f.jobs, live, *PATH_TO_SUCCESS)
            return list(visits(live.transitions))

    times = asyncio.run(scenario())
    assert [visit.state for visit in times] == [
        *(pb.JOB_STATE_QUEUED, *PATH_TO_SUCCESS[:2]),
        *(pb.JOB_STATE_QUEUED, *PATH_TO_SUCCESS[:-1]),
    ]
    assert all(before.end_ns == after.start_ns for before, after in pairwise(times))
    assert all(visit.start_ns <= visit.end_ns for visit in times)


def test_without_opentelemetry_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    open_tracer("").close()
    with pytest.raises(SettingsError, match=r"trace_endpoint: .* pip install 'cinecat\[otel\]'"):
        open_tracer("http://127.0.0.1:4318/v1/traces")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "grpc://host:1", "http://user:secret-word@host/v1/traces"])
def test_a_collector_is_a_url_without_a_password(endpoint: str) -> None:
    with pytest.raises(ValueError, match="must be http") as refused:
        Settings(trace_endpoint=endpoint)
    assert "secret-word" not in f"{refused.value}"
