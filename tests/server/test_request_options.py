"""What is refused of a request beside its clip."""

from __future__ import annotations

import pytest

from cinecat.server.request_options import check_previews, check_priority
from cinecat.v1 import job_pb2 as pb


@pytest.mark.parametrize("priority", pb.Priority.values())
def test_every_known_priority_is_taken(priority: int) -> None:
    assert check_priority(priority) == []


@pytest.mark.parametrize("priority", [-1, 3, 99])
def test_an_unknown_priority_is_refused_with_those_there_are(priority: int) -> None:
    (violation,) = check_priority(priority)
    assert violation.field == "priority"
    assert violation.description == f"{priority} is not one of PRIORITY_INTERACTIVE, PRIORITY_BATCH"


@pytest.mark.parametrize("every_steps", [0, 1, 30])
def test_rates_up_to_the_steps_of_the_clip_are_taken(every_steps: int) -> None:
    assert check_previews(pb.Previews(every_steps=every_steps, frames=True), 30) == []


@pytest.mark.parametrize("every_steps", [-1, 31])
def test_a_rate_that_gives_no_picture_is_refused_and_named(every_steps: int) -> None:
    (violation,) = check_previews(pb.Previews(every_steps=every_steps), 30)
    assert violation.field == "previews.every_steps"
    assert violation.description == f"{every_steps} is not between 0 (never) and 30, the steps of the clip"
