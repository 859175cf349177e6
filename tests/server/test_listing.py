"""What ListJobs may be asked for; what it may not is named field by field."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from cinecat.server.errors import RequestError
from cinecat.server.services.listing import job_filter
from cinecat.server.store import JobFilter
from cinecat.v1 import generation_pb2
from cinecat.v1 import job_pb2 as pb

LAST = 253_402_300_799


def test_filters_become_those_of_the_database() -> None:
    request = generation_pb2.ListJobsRequest(
        states=[pb.JOB_STATE_FAILED],
        created_after=Timestamp(seconds=3, nanos=4_000),
        created_before=Timestamp(seconds=LAST, nanos=999_999_999),
        style="noir-2",
    )
    assert job_filter(request) == JobFilter((pb.JOB_STATE_FAILED,), 3_000_004, LAST * 10**6 + 999_999, "noir-2")
    assert job_filter(generation_pb2.ListJobsRequest()) == JobFilter()


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        ({"states": [0, 6, 99]}, ["states[0]", "states[2]"]),
        ({"states": [6] * 99}, ["states"]),
        ({"created_after": Timestamp(seconds=LAST + 1)}, ["created_after"]),
        ({"created_before": Timestamp(nanos=-1)}, ["created_before"]),
        ({"created_after": Timestamp(seconds=5), "created_before": Timestamp(seconds=5)}, ["created_before"]),
        ({"style": "no\0ir"}, ["style"]),
        ({"style": "Noir", "created_after": Timestamp(nanos=10**9)}, ["created_after", "style"]),
    ],
)
def test_bad_filters_are_named(request_: dict[str, object], fields: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        job_filter(generation_pb2.ListJobsRequest(**request_))  # type: ignore[arg-type]
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in refused.value.violations] == fields
