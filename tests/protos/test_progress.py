"""What a terminal without a cursor is told of a job that waits."""

from __future__ import annotations

import pytest

from cinecat.cli.progress import ProgressDisplay
from cinecat.events import event_from_proto
from cinecat.v1 import job_pb2

REASON = "no style slot is free: 2 of 2 are worn by running clips"


def queued(sequence: int, wait_reason: str = "") -> job_pb2.JobEvent:
    event = job_pb2.JobEvent(sequence=sequence)
    event.job.job_id = "a"
    event.job.state = job_pb2.JOB_STATE_QUEUED
    event.job.progress.wait_reason = wait_reason
    return event


def test_why_a_job_waits_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay(quiet=False)
    for event in (queued(1), queued(2, REASON), queued(3, REASON)):
        display.show(event_from_proto(event))
    assert capsys.readouterr().err.splitlines() == ["job a: queued", f"job a: queued ({REASON})"]
