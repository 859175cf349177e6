"""Which jobs ListJobs is asked for."""

from __future__ import annotations

import re

from google.protobuf.timestamp_pb2 import Timestamp

from cinecat.server.errors import Violation, invalid
from cinecat.server.store import JobFilter
from cinecat.v1 import generation_pb2, job_pb2

# As in the manifests of styles.
_STYLE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")

# The years 1 to 9999, as google.protobuf.Timestamp has them.
_SECONDS = range(-62_135_596_800, 253_402_300_800)
_NANOS = range(1_000_000_000)


def job_filter(request: generation_pb2.ListJobsRequest) -> JobFilter:
    """The filters of a request. Raises RequestError that names each field which is not allowed."""
    known = job_pb2.JobState.values()
    if len(request.states) > len(known):
        raise invalid([Violation("states", f"names {len(request.states)} states, there are {len(known)}")])
    violations = [
        Violation(f"states[{index}]", f"{state} is not a JobState")
        for index, state in enumerate(request.states)
        if state not in known or state == job_pb2.JOB_STATE_UNSPECIFIED
    ]
    after = _moment(request, "created_after", violations)
    before = _moment(request, "created_before", violations)
    if after is not None and before is not None and before <= after:
        violations.append(Violation("created_before", "is not later than created_after"))
    if request.style and not _STYLE_NAME.fullmatch(request.style):
        allowed = "a to z, 0 to 9 and -, at most 64 and no - in front"
        violations.append(Violation("style", f"{request.style[:64]!r} is not the name of a style; allowed: {allowed}"))
    if violations:
        raise invalid(violations)
    return JobFilter(tuple(request.states), after, before, request.style)


def _moment(request: generation_pb2.ListJobsRequest, field: str, violations: list[Violation]) -> int | None:
    """Microseconds since 1970."""
    if not request.HasField(field):  # type: ignore[arg-type]
        return None
    moment: Timestamp = getattr(request, field)
    if moment.seconds not in _SECONDS or moment.nanos not in _NANOS:
        violations.append(Violation(field, "is not a moment in the years 1 to 9999, with 0 to 999999999 nanoseconds"))
        return None
    return moment.ToMicroseconds()
