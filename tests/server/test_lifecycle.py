"""The state machine: every job can come to an end, and nothing happens that the table does not have."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat.server.lifecycle import FINAL_STATES, TRANSITIONS, check_transition, state_name
from cinecat.v1 import job_pb2 as pb

STATES = [state for state in pb.JobState.values() if state != pb.JOB_STATE_UNSPECIFIED]
ILLEGAL = [(before, after) for before in STATES for after in STATES if after not in TRANSITIONS[before]]
IN_ORDER = [
    pb.JOB_STATE_QUEUED,
    pb.JOB_STATE_CONDITIONING,
    pb.JOB_STATE_DENOISING,
    pb.JOB_STATE_DECODING,
    pb.JOB_STATE_ENCODING,
    pb.JOB_STATE_SUCCEEDED,
]


def reachable(state: pb.JobState.ValueType) -> set[pb.JobState.ValueType]:
    found = {state}
    while grown := {after for before in found for after in TRANSITIONS[before]} - found:
        found |= grown
    return found


def test_every_state_of_the_contract_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(STATES)


@given(st.data())
def test_wherever_a_job_goes_every_end_but_success_is_one_step_away(data: st.DataObject) -> None:
    state = pb.JOB_STATE_QUEUED
    for _ in range(data.draw(st.integers(0, 12))):
        state = data.draw(st.sampled_from(sorted(TRANSITIONS[state]) or [state]))
    if state in FINAL_STATES:
        assert not TRANSITIONS[state]
    else:
        assert {pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED} <= TRANSITIONS[state]
        assert pb.JOB_STATE_SUCCEEDED in reachable(state)


def test_the_stages_follow_each_other() -> None:
    for before, after in itertools.pairwise(IN_ORDER):
        check_transition(before, after)


def test_no_stage_is_skipped() -> None:
    skips = [(a, b) for i, a in enumerate(IN_ORDER) for b in IN_ORDER[i + 2 :]]
    assert set(skips) <= set(ILLEGAL)


@pytest.mark.parametrize(("before", "after"), ILLEGAL)
def test_a_transition_that_the_table_does_not_have_is_refused(
    before: pb.JobState.ValueType, after: pb.JobState.ValueType
) -> None:
    with pytest.raises(ValueError, match=f"from {state_name(before)} to {state_name(after)}"):
        check_transition(before, after)


def test_states_are_named_as_people_read_them() -> None:
    assert [state_name(state) for state in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_SUCCEEDED)] == ["queued", "succeeded"]
