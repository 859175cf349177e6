"""The job state machine: which transitions are legal. Code and tests read this one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from cinecat.v1 import job_pb2 as pb

if TYPE_CHECKING:
    State: TypeAlias = pb.JobState.ValueType

FINAL_STATES: frozenset[State] = frozenset({pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})

# A running job goes back to the queue when the engine core or the server stops under it.
_GIVEN_UP = {pb.JOB_STATE_QUEUED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED}

TRANSITIONS: Mapping[State, frozenset[State]] = {
    # A waiting job is queued anew by every restart: its event stores how far the sequence numbers have come.
    pb.JOB_STATE_QUEUED: frozenset({pb.JOB_STATE_CONDITIONING, *_GIVEN_UP}),
    pb.JOB_STATE_CONDITIONING: frozenset({pb.JOB_STATE_DENOISING, *_GIVEN_UP}),
    pb.JOB_STATE_DENOISING: frozenset({pb.JOB_STATE_DECODING, *_GIVEN_UP}),
    pb.JOB_STATE_DECODING: frozenset({pb.JOB_STATE_ENCODING, *_GIVEN_UP}),
    pb.JOB_STATE_ENCODING: frozenset({pb.JOB_STATE_SUCCEEDED, *_GIVEN_UP}),
    **dict.fromkeys(FINAL_STATES, frozenset()),
}


def state_name(state: State) -> str:
    """As people and dashboards read it: "queued", "succeeded"."""
    return pb.JobState.Name(state).removeprefix("JOB_STATE_").lower()


def check_transition(before: State, after: State) -> None:
    """Raises ValueError for a transition that the table does not have."""
    if after not in TRANSITIONS[before]:
        raise ValueError(f"a job cannot go from {state_name(before)} to {state_name(after)}")
