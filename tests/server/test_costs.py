"""ETAs are learnt from what work did cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.messages import StepShape
from cinecat.server.costs import Costs, token_rows
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import new_job

TOKENS = 32
UNIFORM = (TOKENS, TOKENS)
PIXELS = 64 * 64 * 5


def job_in(state: pb.JobState.ValueType, step: int = 0, frames_decoded: int = 0) -> pb.Job:
    """A job of 2 steps and 5 frames of 64x64."""
    job = new_job()
    job.state = state
    job.progress.step, job.progress.frames_decoded = step, frames_decoded
    return job


@pytest.fixture
def costs() -> Costs:
    """A conditioning of 1 s, a step of 3 s and a decode of 10 s for the job above."""
    known = Costs()
    known.observe("condition", PIXELS, 1.0)
    known.observe("step", TOKENS, 3.0)
    known.observe("decode", PIXELS, 10.0)
    return known


def test_nothing_is_known_before_it_was_measured() -> None:
    unknown = Costs()
    assert unknown.seconds("step", 10) is None
    assert unknown.remaining(job_in(pb.JOB_STATE_QUEUED), UNIFORM) is None


def test_one_kind_of_work_says_nothing_about_another() -> None:
    partly = Costs()
    partly.observe("step", TOKENS, 3.0)
    assert partly.remaining(job_in(pb.JOB_STATE_QUEUED), UNIFORM) is None


@pytest.mark.parametrize(
    ("job", "seconds"),
    [
        (job_in(pb.JOB_STATE_QUEUED), 17.0),
        (job_in(pb.JOB_STATE_CONDITIONING), 17.0),
        (job_in(pb.JOB_STATE_DENOISING), 16.0),
        (job_in(pb.JOB_STATE_DENOISING, step=1), 13.0),
        (job_in(pb.JOB_STATE_DECODING, step=2), 10.0),
        (job_in(pb.JOB_STATE_DECODING, step=2, frames_decoded=1), 8.0),
        (job_in(pb.JOB_STATE_ENCODING, step=2, frames_decoded=5), 0.0),
    ],
)
def test_what_remains_shrinks_as_a_job_goes_on(costs: Costs, job: pb.Job, seconds: float) -> None:
    assert costs.remaining(job, UNIFORM) == pytest.approx(seconds)


def test_a_guided_step_counts_twice(costs: Costs) -> None:
    guided = job_in(pb.JOB_STATE_DENOISING)
    guided.clip.guidance_scale = 3.0
    assert token_rows(guided.clip, TOKENS) == 2 * TOKENS
    assert costs.remaining(guided, UNIFORM) == pytest.approx(22.0)


def test_a_cached_step_is_no_work_and_teaches_nothing(costs: Costs) -> None:
    costs.observe_step(StepShape("torch", 0), 1, 0.001)
    assert costs.seconds("step", TOKENS) == 3.0
    assert costs.remaining(job_in(pb.JOB_STATE_DENOISING), (TOKENS, 0)) == pytest.approx(13.0)
    assert costs.remaining(job_in(pb.JOB_STATE_DENOISING, step=1), (TOKENS, 0)) == pytest.approx(10.0)


def test_a_step_that_spends_fewer_tokens_takes_less(costs: Costs) -> None:
    merged = (TOKENS, TOKENS // 2)
    assert costs.remaining(job_in(pb.JOB_STATE_DENOISING), merged) == pytest.approx(14.5)
    assert costs.remaining(job_in(pb.JOB_STATE_DENOISING, step=1), merged) == pytest.approx(11.5)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(1, 10**6))
def test_estimates_converge_to_what_work_costs_now(first: float, now: float, units: int) -> None:
    costs = Costs()
    costs.observe("step", units, first)
    for _ in range(60):
        costs.observe("step", units, now)
    assert costs.seconds("step", 2 * units) == pytest.approx(2 * now, rel=1e-3)


def test_one_slow_step_hardly_moves_the_estimate() -> None:
    costs = Costs()
    for seconds in (1.0, 1.0, 1.0, 2.0):
        costs.observe("step", 1, seconds)
    estimate = costs.seconds("step", 1)
    assert estimate is not None
    assert 1.0 < estimate < 1.5
